"""One checkpoint, looked at: what it is made of, its numbers, and whether its files are what was promised.

It imports `metadata` and what lies below. Publishing and the commands import it. Begin with `inspect.py` and `verify.py`.
"""
