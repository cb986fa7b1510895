"""Whether a model fits onto GPUs, in which runtime, with how many tokens of context, and what would fit.

Formulas are code, and runtimes and GPUs are tables. It imports `planning` and what lies below; conversion and the commands import
it. Begin with `fit.py`.
"""
