"""Checkpoints in Meta's layout and their conversions, of the geometries of `tests.support.meta_model`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama4_convert import convert
from tests.support import commands


@pytest.fixture(scope="session")
def source(meta_checkpoint: Callable[..., Any]) -> Callable[..., Path]:
    return lambda geometry="scout": meta_checkpoint(geometry, ranks=2).src


@pytest.fixture(scope="session")
def converted(source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Read only, as the checkpoint that it was made from."""
    made: dict[Any, Path] = {}

    def get(geometry: str = "scout", **options: Any) -> Path:
        key = (geometry, *options.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{geometry}-hf-") / "out"
            convert(source(geometry), made[key], **options)
        return made[key]

    return get


@pytest.fixture
def copy(converted: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A converted directory to be damaged."""
    return lambda geometry="scout": commands.copy(converted(geometry), tmp_path / f"{geometry}-copy")
