"""Compiled inner loops of the schemes, on shared tiles. Only `quant` imports them. Begin with `tiles.py`, then `int4.py`."""
