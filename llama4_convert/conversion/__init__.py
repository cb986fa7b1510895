"""The commands `convert`, `plan`, `export` and `explain`: a request bound to its source, planned, and run.

It may import `streaming`, `fitting` and what lies below, not `validation` beside it; publishing, the reports, the samples and the
commands may import it. Begin with `convert.py`.
"""
