"""Reading checkpoints: which tensors lie where in which file, without loading any and without executing anything."""
