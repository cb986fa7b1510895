"""Quantization of Llama 4's weights: schemes (the arithmetic), formats (the names and bytes that runtimes load)."""
