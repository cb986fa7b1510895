"""Writes output files front to back: digest and disk each in a thread of its own, through a few reused page-aligned buffers.

Where the file system allows it the page cache is bypassed (O_DIRECT): a copy pays mostly for allocating cache pages that
nobody reads again. Elsewhere the same writes go through the cache, a part of the file at a time. Which one it is, is found out by
trying.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from llama4_convert.files import PARTIAL_SUFFIX, sync_folder

_BLOCK_BYTES = (
    4096  # O_DIRECT wants buffer, offset and length in multiples of the device's block; 4 KiB satisfies all in use
)
_DROP_EVERY_BYTES, _DROP_BEHIND_BYTES = (
    16 << 20,
    256 << 20,
)  # where writes go through the page cache, see `_drop_written`


class Buffers:
    """A ring of page-aligned buffers, and the two threads that hash and write them. Both release the GIL while they work.

    A buffer comes back once the work queued on it has ended.
    """

    def __init__(self, count: int, size: int) -> None:
        """`size` in bytes, a multiple of 4,096."""
        self._ring: list[tuple[mmap.mmap, list[Future[None]]]] = [(mmap.mmap(-1, size), []) for _ in range(count)]
        self.size = size
        self.hash = ThreadPoolExecutor(1, "sha256")
        self.disk = ThreadPoolExecutor(1, "write")

    def __enter__(self) -> Buffers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.hash.shutdown(wait=True, cancel_futures=True)
        self.disk.shutdown(wait=True, cancel_futures=True)

    def take(self) -> mmap.mmap:
        """The next buffer, waiting for its last use. An error of that use is raised here."""
        buffer, pending = self._ring.pop(0)
        for future in pending:
            future.result()
        return buffer

    def give_back(self, buffer: mmap.mmap, pending: list[Future[None]]) -> None:
        self._ring.append((buffer, pending))

    def drain(self) -> None:
        """Wait for all queued work to end, then raise its first error: the file may be closed after this, error or not."""
        pending = [future for _, futures in self._ring for future in futures]
        wait(pending)
        for future in pending:
            future.result()


class FileWriter:
    """One output file under a temporary name. `write`, or fill `space()` and `advance(n)`; at the end `commit()`.

    Leaving the `with` block without a commit removes the temporary file.
    """

    def __init__(self, path: Path, size: int, buffers: Buffers) -> None:
        """`size` in bytes is allocated at once where the file system can, so that a full disk shows before the work."""
        self.path, self.size = path, size
        self.temporary = path.with_name(path.name + PARTIAL_SUFFIX)
        self._buffers = buffers
        self._digest = hashlib.sha256()
        self._fd, self._direct = _open(self.temporary)
        self._dropped = 0  # position up to which the kernel was last asked to drop cached pages
        self._position = 0  # file offset of the current buffer
        self._buffer = buffers.take()
        self._filled = 0
        self._committed = False

    def __enter__(self) -> FileWriter:
        try:
            _allocate(self._fd, self.size)
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._committed:
            return
        self._buffers.give_back(self._buffer, [])
        with contextlib.suppress(OSError):  # an earlier error is being raised; without one the next run meets this
            self._buffers.drain()
        os.close(self._fd)
        self.temporary.unlink(missing_ok=True)

    def space(self) -> memoryview:
        """The unfilled rest of the current buffer."""
        return memoryview(self._buffer)[self._filled :]

    def advance(self, n: int) -> None:
        """Say that the first `n` bytes of `space()` have been filled."""
        self._filled += n
        if self._filled == self._buffers.size:
            self._flush()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            n = min(len(view), self._buffers.size - self._filled)
            self.space()[:n] = view[:n]
            self.advance(n)
            view = view[n:]

    def _flush(self) -> None:
        buffer, n, position = self._buffer, self._filled, self._position
        view = memoryview(buffer)[:n]
        pending: list[Future[None]] = [
            self._buffers.hash.submit(self._digest.update, view),
            self._buffers.disk.submit(self._write, buffer, n, position),
        ]
        self._buffers.give_back(buffer, pending)
        self._position += n
        self._filled = 0
        self._buffer = self._buffers.take()

    def _write(self, buffer: mmap.mmap, n: int, position: int) -> None:
        if self._direct and n % _BLOCK_BYTES:
            n += -n % _BLOCK_BYTES  # the tail block; `commit` cuts the file to its size
        view, done = memoryview(buffer)[:n], 0
        while done < n:
            try:
                done += os.pwrite(self._fd, view[done:], position + done)
            except OSError as error:
                if not (self._direct and error.errno == errno.EINVAL):
                    raise
                # Opened with O_DIRECT, but writes are refused: some network and overlay file systems do that.
                fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~_O_DIRECT)
                self._direct = False
        if not self._direct:
            self._drop_written(position + n)

    def _drop_written(self, end: int) -> None:
        """Have the kernel write what the page cache holds of the file up to `end`, and give back what is written already.

        The disk works while the next bytes are made, and the next pages are those just given back, not new ones to allocate:
        that is most of what writing through the cache costs.
        """
        advise: Callable[[int, int, int, int], None] | None = getattr(os, "posix_fadvise", None)
        if advise and end - self._dropped >= _DROP_EVERY_BYTES:
            self._dropped = end
            start = max(0, end - _DROP_BEHIND_BYTES)
            with contextlib.suppress(OSError):  # an advice: file systems may not know it
                advise(self._fd, start, end - start, os.POSIX_FADV_DONTNEED)

    def commit(self) -> str:
        """Write the rest, fsync, rename to the final name, fsync the folder. Returns the SHA-256 of the file, in hex."""
        if self._filled:
            self._flush()
        self._buffers.give_back(self._buffer, [])
        self._committed = True
        try:
            self._buffers.drain()
            if self._position != self.size:
                raise AssertionError(f"{self.path.name}: {self._position} bytes made, {self.size} planned")
            os.ftruncate(self._fd, self.size)
            os.fsync(self._fd)
            os.replace(self.temporary, self.path)
        except BaseException:
            self.temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(self._fd)
        sync_folder(self.path.parent)
        return self._digest.hexdigest()


_O_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux only


def _open(path: Path) -> tuple[int, bool]:
    # A leftover of a killed run may be a link that somebody planted: never write through it.
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    if _O_DIRECT:
        try:
            return os.open(path, flags | _O_DIRECT, 0o666), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            path.unlink(missing_ok=True)  # Linux creates the file before it refuses the flag
    return os.open(path, flags, 0o666), False


def _allocate(fd: int, size: int) -> None:
    allocate: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    if allocate is None or size == 0:
        return
    try:
        allocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
            raise
