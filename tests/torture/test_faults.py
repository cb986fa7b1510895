"""The n-th read or write fails, or does less than it was asked for: one line, exit 4, and the next run completes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama4_convert import convert, export
from llama4_convert.errors import EnvironmentFailed
from tests.support import commands

ALL = bool(os.environ.get("TORTURE"))
# What is run, with which options, and what makes its output a model.
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "convert": (convert, {"shard_size": 200_000}, "model.safetensors.index.json"),
    "recipe": (convert, {"shard_size": 200_000, "recipe": "nf4"}, "model.safetensors.index.json"),
    "export": (export, {"ranks": 4}, "params.json"),
}


def is_ours(path: Any, *_: Any) -> bool:
    """Of opening: a source or an output, not what Python opens for itself."""
    return str(path).endswith((".pth", ".partial"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "persistently"])
@pytest.mark.parametrize(
    ("name", "code"),
    [
        *[("preadv", errno.EIO), ("open", errno.EACCES), ("pwrite", errno.ENOSPC), ("pwrite", errno.EDQUOT)],
        *[("fsync", errno.EIO), ("replace", errno.EIO), ("posix_fallocate", errno.ENOSPC)],
    ],
    ids=["preadv", "open", "pwrite", "quota", "fsync", "replace", "allocate"],
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
    source = meta_checkpoint("maverick", 2).src
    run, options, marker = CASES[case]
    run(source, tmp_path / "straight", **options)
    straight, n, failures = commands.digests(tmp_path / "straight"), 1 if ALL else 2, 0
    while True:
        with monkeypatch.context() as patch:
            when = is_ours if name == "open" else lambda *_: True
            faults = commands.Faults(patch, (name,), code, left=n, for_ever=for_ever, when=when)
            target, message = tmp_path / "out", ""
            try:
                run(source, target, **options)
            except EnvironmentFailed as error:
                message = str(error)
        if not faults.raised:
            break
        if message:  # some failures are no reason to fail: of syncing a folder, of an O_DIRECT that is refused
            assert "\n" not in message
            assert os.strerror(code) in message
            assert not (target / marker).exists()
            failures += 1
        if not for_ever:
            assert not list(target.rglob("*.partial"))
        run(source, target, **options)
        assert commands.digests(target) == straight
        for path in sorted(target.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        n += 1 if ALL else 13
    assert failures >= (3 if ALL else 1)


@pytest.mark.parametrize("case", CASES)
def test_reads_and_writes_do_less_than_they_were_asked_for(
    meta_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    source = meta_checkpoint("maverick", 2).src
    run, options, _ = CASES[case]
    run(source, tmp_path / "straight", **options)
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
    run(source, tmp_path / "out", **options)
    assert min(calls.values()) > 20
    assert commands.digests(tmp_path / "out") == commands.digests(tmp_path / "straight")
