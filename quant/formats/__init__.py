"""Formats: the names and bytes under which a runtime finds what a scheme computed. Begin with `compressed_tensors.py`."""
