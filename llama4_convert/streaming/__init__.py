"""A plan carried out in bounded memory: read, gather, encode, write, hash, and go on after an interruption.

Only this folder writes weights. Folders above may import it; it may import `planning`, `metadata` and `checkpoints`. Begin with
`execution.py`; `write_file.py` fills one file, `writer.py` brings it to the disk.
"""
