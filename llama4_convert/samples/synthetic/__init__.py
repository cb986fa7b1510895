"""Random checkpoints in the format of Meta's original files: full size, cut down, or tiny. Begin with `synth.py`."""
