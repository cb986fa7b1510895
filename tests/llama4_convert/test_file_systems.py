"""What some file systems and systems lack (macOS, NFS, FUSE, overlays): found out by trying, and the same bytes without it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest

from llama4_convert import convert, run, writer

SHARD = 200_000


@pytest.fixture
def source(meta_checkpoint: Callable[..., Any]) -> Path:
    path: Path = meta_checkpoint("maverick", 2).src
    return path


@pytest.fixture(scope="module")
def expected(meta_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    target = tmp_path_factory.mktemp("expected") / "out"
    convert(meta_checkpoint("maverick", 2).src, target, shard_size=SHARD)
    return commands.digests(target)


class Refusing:
    """Functions of `os` as a file system may refuse them; counts what it refused and what it saw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch, self.refused, self.buffered = monkeypatch, 0, 0

    def __call__(self, name: str, code: int, when: Callable[..., bool] = lambda *_: True) -> None:
        function = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if when(*arguments):
                self.refused += 1
                raise OSError(code, os.strerror(code))
            return function(*arguments, **options)

        self.patch.setattr(os, name, call)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refusing:
    return Refusing(monkeypatch)


needs_o_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="O_DIRECT is Linux's")


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@needs_o_direct
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_opening_with_o_direct_is_refused(
    source: Path, expected: dict[str, str], tmp_path: Path, refuse: Refusing, code: int
) -> None:
    refuse("open", code, lambda path, flags, *_: bool(flags & os.O_DIRECT))
    convert(source, tmp_path / "out", shard_size=SHARD)
    assert refuse.refused
    assert commands.digests(tmp_path / "out") == expected


@needs_o_direct
@pytest.mark.parametrize("after", [0, 1])
def test_writing_with_o_direct_is_refused(
    source: Path,
    expected: dict[str, str],
    tmp_path: Path,
    refuse: Refusing,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    """By the first write or, where the device's blocks are larger than ours, by a later one."""
    seen: dict[int, int] = {}

    def direct(fd: int, *_: Any) -> bool:
        seen[fd] = seen.get(fd, 0) + 1
        return is_direct(fd) and seen[fd] > after

    refuse("pwrite", errno.EINVAL, direct)
    monkeypatch.setattr(run, "planned_buffers", lambda _: writer.Buffers(3, 64 << 10))
    convert(source, tmp_path / "out", shard_size=SHARD)
    assert refuse.refused
    assert commands.digests(tmp_path / "out") == expected


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV])
def test_allocating_is_refused(
    source: Path, expected: dict[str, str], tmp_path: Path, refuse: Refusing, code: int
) -> None:
    refuse("posix_fallocate", code)
    convert(source, tmp_path / "out", shard_size=SHARD)
    assert refuse.refused
    assert commands.digests(tmp_path / "out") == expected


def test_advice_and_syncing_folders_are_refused(
    source: Path, expected: dict[str, str], tmp_path: Path, refuse: Refusing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_O_DIRECT", 0)
    monkeypatch.setattr(writer, "_DROP_EVERY", 1)
    refuse("posix_fadvise", errno.ENOSYS)
    refuse("fsync", errno.EINVAL, lambda fd: os.path.isdir(f"/proc/self/fd/{fd}"))
    convert(source, tmp_path / "out", shard_size=SHARD)
    assert refuse.refused
    assert commands.digests(tmp_path / "out") == expected


def test_a_system_without_any_of_it(
    source: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_O_DIRECT", 0)
    for name in ("posix_fallocate", "posix_fadvise", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    convert(source, tmp_path / "out", shard_size=SHARD)
    assert commands.digests(tmp_path / "out") == expected


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_of_many_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """Through the page cache it is given back behind the writing, by and by; what was given back is still in the file."""
    given: list[tuple[int, int]] = []
    if not direct:
        monkeypatch.setattr(writer, "_O_DIRECT", 0)
    monkeypatch.setattr(writer, "_DROP_EVERY", 128 << 10)
    monkeypatch.setattr(writer, "_DROP_BEHIND", 256 << 10)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, n, _: given.append((start, n)), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    data = os.urandom(1_000_003)
    with writer.Workers() as workers:
        buffers = writer.Buffers(3, 64 << 10)
        with writer.FileWriter(tmp_path / "file", len(data), buffers, workers) as file:
            position = 0
            while position < len(data):
                space = file.space()
                n = min(len(space), len(data) - position, 10_007)
                space[:n] = data[position : position + n]
                file.advance(n)
                position += n
            file.commit()
    assert (tmp_path / "file").read_bytes() == data
    if not direct:
        assert given == [
            (max(0, end - (256 << 10)), min(end, 256 << 10)) for end in range(128 << 10, 983_041, 128 << 10)
        ]
