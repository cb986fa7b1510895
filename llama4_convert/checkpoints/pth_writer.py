"""A `.pth` file as `torch.save` writes it, tensor by tensor, without torch: memory is one chunk, whatever the size.

The layout is that of PyTorch's `caffe2/serialize/inline_container.cc` and miniz: an uncompressed zip of
`<name>/data.pkl`, `<name>/byteorder`, `<name>/data/0..N` and `<name>/version`. Every record starts at a multiple of 64
bytes (an "FB" extra field pads the local header), CRCs stand in data descriptors and in the central directory, zip64
fields appear where a size or an offset needs them. `state_dict_pickle` makes the pickle inside.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from llama4_convert.checkpoints.state_dict_pickle import STORAGES, PthBytes, PthTensor, state_dict_pickle

ALIGNMENT = 64
# A size or offset from here on goes into zip64 fields (miniz counts the limit itself in).
ZIP64_LIMIT = 0xFFFFFFFF
Chunk: TypeAlias = bytes | bytearray | memoryview


class PthArchive:
    """The bytes around the tensors of a `.pth`: ask for them front to back, with each tensor's data in between.

        head(), then for each tensor begin(), its data, finish(CRC-32 of the data), then tail()

    `stem` is the file's name without its suffix. Raises ValueError for entries that no state dict can hold.
    """

    has_checksums = True

    def __init__(self, stem: str, entries: Iterable[PthTensor | PthBytes]) -> None:
        listed = list(entries)
        keys = [entry.key for entry in listed]
        if len(set(keys)) != len(keys):
            raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
        for entry in listed:
            if isinstance(entry, PthTensor) and entry.dtype not in STORAGES:
                raise ValueError(f"{entry.key}: dtype {entry.dtype!r} is none of {', '.join(STORAGES)}")
        self.stem = stem
        self.tensors = [entry for entry in listed if isinstance(entry, PthTensor)]
        self._pickle = state_dict_pickle(listed)
        self._offset = 0
        self._begun = 0
        self._central: list[bytes] = []
        self._open: tuple[bytes, int, int, bytes] | None = None  # of the record: name, size, offset, zip64 fields

    @property
    def size(self) -> int:
        """Bytes of the whole file, tensors included."""
        alike = PthArchive(self.stem, [])
        alike._pickle, alike.tensors = self._pickle, self.tensors
        total = len(alike.head())
        for tensor in self.tensors:
            total += len(alike.begin()) + tensor.nbytes + len(alike.finish(0))
        return total + len(alike.tail())

    def head(self) -> bytes:
        return self._whole("data.pkl", self._pickle) + self._whole("byteorder", b"little")

    def begin(self) -> bytes:
        """What stands before the next tensor's data."""
        tensor = self.tensors[self._begun]
        self._begun += 1
        return self._begin(f"data/{self._begun - 1}", tensor.nbytes)

    def finish(self, crc: int) -> bytes:
        """What stands behind the data: their CRC. Sizes and CRC follow the data, unless there is no data."""
        assert self._open is not None
        name, size, offset, zip64 = self._open
        self._open = None
        descriptor = b""
        if size:
            descriptor = struct.pack("<4sIQQ" if zip64 else "<4sIII", b"PK\7\b", crc, size, size)
        short_size = size if size < ZIP64_LIMIT else 0xFFFFFFFF
        short_offset = offset if offset < ZIP64_LIMIT else 0xFFFFFFFF
        self._central.append(
            struct.pack("<4s6H3I", b"PK\1\2", 0, 0, _flags(size), 0, 0, 0, crc, short_size, short_size)
            + struct.pack("<5H2I", len(name), len(zip64), 0, 0, 0, 0, short_offset)
            + name
            + zip64
        )
        self._offset += size + len(descriptor)
        return descriptor

    def tail(self) -> bytes:
        """The last record, and the central directory; its zip64 end stands always, as in PyTorch's files."""
        version = self._whole("version", b"3\n")
        start, directory, count = self._offset, b"".join(self._central), len(self._central)
        end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x31E, 45, 0, 0, count, count, len(directory), start)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, start + len(directory), 1)
        count, start = min(count, 0xFFFF), min(start, 0xFFFFFFFF)
        end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), start, 0)
        return version + directory + end

    def _whole(self, record: str, data: bytes) -> bytes:
        return self._begin(record, len(data)) + data + self.finish(zlib.crc32(data))

    def _begin(self, record: str, size: int) -> bytes:
        """A local header, and the padding that aligns the data."""
        name = f"{self.stem}/{record}".encode()
        offset = self._offset
        wide = ([size, size] if size >= ZIP64_LIMIT else []) + ([offset] if offset >= ZIP64_LIMIT else [])
        zip64 = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        padding = -(offset + 30 + len(name) + len(zip64) + 4) % ALIGNMENT
        extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        header = struct.pack("<4s5H3I2H", b"PK\3\4", 0, _flags(size), 0, 0, 0, 0, 0, 0, len(name), len(extra))
        self._open = name, size, offset, zip64
        self._offset += len(header) + len(name) + len(extra)
        return header + name + extra


def _flags(size: int) -> int:
    """Names are UTF-8 (bit 11); sizes and CRC follow the data (bit 3), unless there is no data."""
    return 0x800 | (8 if size else 0)


class PthWriter:
    """Writes one `.pth`: the entries up front, then each tensor's bytes (little-endian) in the same order.

        with PthWriter(path, entries) as writer:
            for tensor in tensors:
                writer.write_tensor(tensor.key, chunks_of(tensor))

    The file grows as `<path>.part`. When the block ends it is flushed to the disk and takes its name; when the block
    raises it is removed. Raises ValueError where entries or chunks contradict what was announced, and OSError as the
    system does.
    """

    def __init__(self, path: str | os.PathLike[str], entries: Iterable[PthTensor | PthBytes]) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self._archive = PthArchive(self.path.stem, entries)
        self._written = 0

    def __enter__(self) -> Self:
        self._file = self.part.open("wb")
        try:
            self._file.write(self._archive.head())
        except BaseException:
            self._discard()
            raise
        return self

    def write_tensor(self, key: str, chunks: Iterable[Chunk]) -> None:
        """Write the next tensor; a chunk is done with, and may be overwritten, once the next one is asked for."""
        tensor = self._next(key)
        crc = size = 0
        for chunk in chunks:
            self._file.write(chunk)
            size += memoryview(chunk).nbytes
            crc = zlib.crc32(chunk, crc)
        if size != tensor.nbytes:
            raise ValueError(f"{key}: {size} bytes came, {tensor.nbytes} were announced")
        self._file.write(self._archive.finish(crc))

    def write_zeros(self, key: str) -> None:
        """Write the next tensor as a hole of zeros, which takes no space on file systems that have holes."""
        tensor = self._next(key)
        self._file.seek(tensor.nbytes, os.SEEK_CUR)
        self._file.write(self._archive.finish(_crc_of_zeros(tensor.nbytes)))

    def _next(self, key: str) -> PthTensor:
        tensors = self._archive.tensors
        tensor = tensors[self._written] if self._written < len(tensors) else None
        if tensor is None or tensor.key != key:
            raise ValueError(f"{key} is out of turn: expected {tensor.key if tensor else 'no more tensors'}")
        self._written += 1
        self._file.write(self._archive.begin())
        return tensor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._written < len(self._archive.tensors):
                    raise ValueError(f"{self._archive.tensors[self._written].key} was never written")
                self._file.write(self._archive.tail())
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self.part.replace(self.path)
        finally:
            self._discard()

    def _discard(self) -> None:
        # Closing flushes, which a full disk refuses once more; the error to report is the first one.
        with suppress(OSError):
            self._file.close()
        self.part.unlink(missing_ok=True)


@lru_cache(maxsize=256)  # layers and ranks have tensors of the same few sizes
def _crc_of_zeros(size: int) -> int:
    crc, chunk = 0, bytes(min(size, 1 << 20))
    for _ in range(size >> 20):
        crc = zlib.crc32(chunk, crc)
    return zlib.crc32(chunk[: size & ((1 << 20) - 1)], crc)
