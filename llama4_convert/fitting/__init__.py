"""Whether a model fits onto GPUs, in which runtime, with how many tokens of context, and what would fit.

Formulas are code; runtimes and GPUs are tables. It may import `planning`, `metadata` and what lies below; folders above may
import it. Begin with `fit.py`, then `runtimes.toml`.
"""
