"""Checkpoints on disk: which tensor lies where in which file, without loading one and without executing a pickle.

Each format stands beside its inverse. Every folder may import this one; it may import the modules at the top of the package, the
tables and the quantizers. Begin with `layouts.py` (what a path is), `tensors.py` (what every format lists), `meta.py` (Meta's
directory) and `transformers.py`.
"""
