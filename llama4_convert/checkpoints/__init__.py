"""Reading checkpoints: which tensors lie where in which file, without loading any and without executing anything."""

from __future__ import annotations

from pathlib import Path


def is_meta(path: Path) -> bool:
    """Whether a directory is read as Meta's: params.json decides, and so does the lack of a config.json."""
    return (path / "params.json").exists() or not (path / "config.json").exists()
