"""The commands `convert`, `plan`, `export` and `explain`: a request bound to its source, planned, and run.

It joins `metadata`, `planning` and `streaming`; only the samples and the commands import it. Begin with `convert.py`.
"""
