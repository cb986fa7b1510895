"""A plan carried out in bounded memory: read, gather, encode, write, hash, and go on after an interruption.

This is the only folder that writes weights. Conversion and the samples import it; it imports `planning` and `checkpoints`. Begin
with `execution.py`, then `write_file.py`.
"""
