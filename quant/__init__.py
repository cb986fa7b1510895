"""How a tensor becomes fewer bits: schemes (the arithmetic), formats (the names and bytes that runtimes load), recipes.

It imports neither the tables, the model nor `llama4_convert`, which alone may import it. Begin with `schemes/int4.py` for the
arithmetic; `encoding.py` is what an encoder promises, `encoders.py` joins a scheme and a format to one.
"""
