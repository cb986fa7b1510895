"""What some file systems and systems lack (macOS, NFS, FUSE, overlays): found out by trying, and the same bytes without it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from llama4_convert import convert
from llama4_convert.streaming import execution, writer
from tests.support import commands

needs_o_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="O_DIRECT is Linux's")


def wants_o_direct(path: Any, flags: int, *_: Any) -> bool:
    return bool(flags & os.O_DIRECT)


def is_folder(fd: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{fd}")


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@needs_o_direct
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_opening_with_o_direct_is_refused(
    source: Path, straight: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refused = commands.Faults(monkeypatch, ("open",), code, left=1, for_ever=True, when=wants_o_direct)
    convert(source, tmp_path / "out", shard_size=commands.SHARD)
    assert refused.raised
    assert commands.digests(tmp_path / "out") == straight


@needs_o_direct
@pytest.mark.parametrize("after", [0, 1])
def test_writing_with_o_direct_is_refused(
    source: Path,
    straight: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    """By the first write or, where the device's blocks are larger than ours, by a later one."""
    seen: dict[int, int] = {}

    def direct(fd: int, *_: Any) -> bool:
        seen[fd] = seen.get(fd, 0) + 1
        return is_direct(fd) and seen[fd] > after

    refused = commands.Faults(monkeypatch, ("pwrite",), errno.EINVAL, left=1, for_ever=True, when=direct)
    monkeypatch.setattr(execution, "buffer_bytes", lambda _: 64 << 10)
    convert(source, tmp_path / "out", shard_size=commands.SHARD)
    assert refused.raised
    assert commands.digests(tmp_path / "out") == straight


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV])
def test_allocating_is_refused(
    source: Path, straight: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refused = commands.Faults(monkeypatch, ("posix_fallocate",), code, left=1, for_ever=True)
    convert(source, tmp_path / "out", shard_size=commands.SHARD)
    assert refused.raised
    assert commands.digests(tmp_path / "out") == straight


def test_advice_and_syncing_folders_are_refused(
    source: Path, straight: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_O_DIRECT", 0)
    monkeypatch.setattr(writer, "_DROP_EVERY_BYTES", 1)
    refused = commands.Faults(monkeypatch, ("posix_fadvise",), errno.ENOSYS, left=1, for_ever=True)
    commands.Faults(monkeypatch, ("fsync",), errno.EINVAL, left=1, for_ever=True, when=is_folder)
    convert(source, tmp_path / "out", shard_size=commands.SHARD)
    assert refused.raised
    assert commands.digests(tmp_path / "out") == straight


def test_a_system_without_any_of_it(
    source: Path, straight: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_O_DIRECT", 0)
    for name in ("posix_fallocate", "posix_fadvise", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    convert(source, tmp_path / "out", shard_size=commands.SHARD)
    assert commands.digests(tmp_path / "out") == straight


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_of_many_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """Through the page cache it is given back behind the writing, by and by; what was given back is still in the file."""
    given: list[tuple[int, int]] = []
    if not direct:
        monkeypatch.setattr(writer, "_O_DIRECT", 0)
    monkeypatch.setattr(writer, "_DROP_EVERY_BYTES", 128 << 10)
    monkeypatch.setattr(writer, "_DROP_BEHIND_BYTES", 256 << 10)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, n, _: given.append((start, n)), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    data = os.urandom(1_000_003)
    with (
        writer.Buffers(3, 64 << 10) as buffers,
        writer.FileWriter(tmp_path / "file", len(data), buffers) as file,
    ):
        for position in range(0, len(data), 10_007):
            file.write(data[position : position + 10_007])
        file.commit()
    assert (tmp_path / "file").read_bytes() == data
    if not direct:
        assert given == [
            (max(0, end - (256 << 10)), min(end, 256 << 10)) for end in range(128 << 10, 983_041, 128 << 10)
        ]
