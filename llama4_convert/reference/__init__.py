"""A checkpoint as a running model: the package `llama4` bound to a directory in either layout.

It imports `checkpoints` and `metadata`, and torch when a model runs. Validation and the samples import it. Begin with
`checkpoint.py`.
"""
