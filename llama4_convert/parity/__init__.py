"""`validate`: two checkpoints side by side, in what they say, hold and compute. Computes with torch."""
