"""One owner for an output directory: a lock file held by the kernel, so that a dead owner's lock is free at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from llama4_convert.errors import EnvironmentFailed, from_os_error

NAME = ".llama4-convert.lock"


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` (which must exist). Raises EnvironmentFailed, naming the owner, if another process does."""
    path = folder / NAME
    fd = _acquire(path)
    try:
        yield
    finally:
        # Removed while still held: whoever waits on this file finds it gone and makes a new one (see _acquire).
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(fd)


def _acquire(path: Path) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise from_os_error(error, f"taking the lock of {path.parent}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(fd)
            raise EnvironmentFailed(
                f"{path.parent} is being written by {owner}: wait for it, or choose another directory"
            ) from None
        except OSError as error:
            os.close(fd)
            raise from_os_error(error, f"taking the lock of {path.parent}") from error
        if _is_file_at(path, fd):
            with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return fd
        os.close(fd)  # the owner that we waited for has just removed this file


def _is_file_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False
