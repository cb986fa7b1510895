"""Checkpoints on disk: which tensor lies where in which file, without loading one and without executing a pickle.

Each format stands beside its inverse. Every folder may import this one; it may import the modules at the top of the package, the
tables and the quantizers. Begin with `tensors.py` (what every format lists), `meta.py` (Meta's directory) and `transformers.py`.
"""

from __future__ import annotations

from pathlib import Path


def is_meta(path: Path) -> bool:
    """Whether a directory is read as Meta's: params.json decides, and so does the lack of a config.json."""
    return (path / "params.json").exists() or not (path / "config.json").exists()
