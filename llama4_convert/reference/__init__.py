"""A checkpoint as a running model: the package `llama4` bound to a directory in either layout.

It may import `checkpoints` and `metadata`, and torch when a model runs; packages above may import it. Begin with `checkpoint.py`.
"""
