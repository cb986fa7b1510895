"""One checkpoint, looked at: what it is made of, its numbers, and whether its files are what was promised.

It may import `planning` and `checkpoints` and what lies below; folders above may import it. Begin with `inspect.py` and
`verify.py`.
"""
