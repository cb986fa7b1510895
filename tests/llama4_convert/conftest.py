"""A checkpoint that makes many files, and these files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama4_convert import convert
from tests.support import commands


@pytest.fixture
def source(meta_checkpoint: Callable[..., Any]) -> Path:
    path: Path = meta_checkpoint("maverick", 2).src
    return path


@pytest.fixture(scope="session")
def straight(meta_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a conversion of `source` that nothing interrupts, in shards of `commands.SHARD`."""
    target = tmp_path_factory.mktemp("straight") / "out"
    convert(meta_checkpoint("maverick", 2).src, target, shard_size=commands.SHARD)
    found = commands.digests(target)
    assert len(found) > 12
    return found
