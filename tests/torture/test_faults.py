"""The n-th read or write fails, or does less than it was asked for: one line, exit 4, and the next run completes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest

from llama4_convert import convert
from llama4_convert.errors import EnvironmentFailed
from llama4_convert.manifest import INDEX

ALL = bool(os.environ.get("TORTURE"))
OPTIONS: dict[str, dict[str, Any]] = {
    "convert": {"shard_size": 200_000},
    "recipe": {"shard_size": 200_000, "recipe": "nf4"},
}


def is_ours(path: Any, *_: Any) -> bool:
    """Of opening: a source or an output, not what Python opens for itself."""
    return str(path).endswith((".pth", ".partial"))


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "persistently"])
@pytest.mark.parametrize(
    ("name", "code"),
    [("preadv", errno.EIO), ("open", errno.EACCES), ("pwrite", errno.ENOSPC), ("fsync", errno.EIO)],
    ids=["preadv", "open", "pwrite", "fsync"],
)
def test_the_nth_call_fails(
    meta_checkpoint: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    for_ever: bool,
    name: str,
    code: int,
) -> None:
    source, options = meta_checkpoint("maverick", 2).src, OPTIONS[case]
    convert(source, tmp_path / "straight", **options)
    straight, n, failures = commands.digests(tmp_path / "straight"), 1 if ALL else 2, 0
    while True:
        with monkeypatch.context() as patch:
            when = is_ours if name == "open" else lambda *_: True
            faults = commands.Faults(patch, (name,), code, left=n, for_ever=for_ever, when=when)
            target, message = tmp_path / "out", ""
            try:
                convert(source, target, **options)
            except EnvironmentFailed as error:
                message = str(error)
        if not faults.raised:
            break
        if message:  # some failures are no reason to fail: of syncing a folder, of an O_DIRECT that is refused
            assert "\n" not in message
            assert os.strerror(code) in message
            assert not (target / INDEX).exists()
            failures += 1
        if not for_ever:
            assert not list(target.rglob("*.partial"))
        convert(source, target, **options)
        assert commands.digests(target) == straight
        for path in sorted(target.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        n += 1 if ALL else 13
    assert failures >= (5 if ALL else 1)


@pytest.mark.parametrize("case", OPTIONS)
def test_reads_and_writes_do_less_than_they_were_asked_for(
    meta_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    source, options = meta_checkpoint("maverick", 2).src, OPTIONS[case]
    convert(source, tmp_path / "straight", **options)
    preadv, pwrite, calls = os.preadv, os.pwrite, {"preadv": 0, "pwrite": 0}

    def short_read(fd: int, buffers: list[Any], offset: int) -> int:
        calls["preadv"] += 1
        view = memoryview(buffers[0])
        return preadv(fd, [view[: max(1, len(view) // 3)]], offset)

    def short_write(fd: int, data: Any, offset: int) -> int:
        calls["pwrite"] += 1
        return pwrite(fd, memoryview(data)[: max(1, len(data) // 3)], offset)

    monkeypatch.setattr(os, "preadv", short_read)
    monkeypatch.setattr(os, "pwrite", short_write)
    convert(source, tmp_path / "out", **options)
    assert min(calls.values()) > 20
    assert commands.digests(tmp_path / "out") == commands.digests(tmp_path / "straight")
