"""Whether a model fits onto GPUs, by runtime, and what would."""
