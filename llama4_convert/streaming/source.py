"""The opened files of a source: byte ranges of their records, each checked against the CRC that its archive promises."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from llama4_convert.checkpoints.meta_quantized import DequantizedView, Dequantizer
from llama4_convert.checkpoints.pth import DamagedRecord, PthIndex, truncated
from llama4_convert.checkpoints.tensors import Record, StoredTensor
from llama4_convert.errors import BadInput, from_os_error
from llama4_convert.planning.plan import RecordKey
from llama4_convert.streaming.resume import Running

# Read granularity: small enough to stay in the processor's cache between reading, checking and scattering.
SCRATCH = 1 << 20
# What the disk is asked for before it is read, of each record: a rank's part of a tensor is read in turn with the others'.
_AHEAD = 16 << 20


class Source:
    """The opened rank files, and the CRC of each record that is read front to back, up to where it has been read."""

    def __init__(self, ranks: Sequence[PthIndex], running: Running | None = None) -> None:
        """`running`: records that an earlier run has read in part, see `resuming`; it is kept up to date."""
        self.ranks = ranks
        self._fds: list[int] = []
        self.running: Running = {} if running is None else running
        self._dequantizer = Dequantizer()
        self._codes: NDArray[np.uint8] = np.empty(0, np.uint8)  # that the last read of a quantized record was made of
        self._advised: dict[RecordKey, int] = {}  # record -> up to where the disk has been asked for it
        self._scratch = memoryview(bytearray(SCRATCH))

    def __enter__(self) -> Source:
        for index in self.ranks:
            self._fds.append(os.open(index.path, os.O_RDONLY))
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._fds:
            os.close(fd)

    def read(self, rank: int, record: Record, start: int, into: memoryview) -> None:
        """Fill `into` from byte `start` of a record. Raises BadInput if the file ends early, EnvironmentFailed if it fails."""
        if isinstance(record, DequantizedView):
            self._dequantize(rank, record, start, into)
            return
        done = 0
        while done < len(into):
            try:
                n = os.preadv(self._fds[rank], [into[done:]], record.offset + start + done)
            except OSError as error:
                raise from_os_error(error, f"reading {self.ranks[rank].path.name}") from error
            if n == 0:
                raise BadInput(truncated(self.ranks[rank].path))
            done += n
        self._read_ahead(rank, record, start + done)

    def _dequantize(self, rank: int, record: DequantizedView, start: int, into: memoryview) -> None:
        begin, end = record.codes_for(start, start + len(into))
        self._codes = np.empty(end - begin, np.uint8)
        self.read(rank, record.codes.record, begin, self._codes.data)
        made = self._dequantizer.numbers(record, begin, self._codes)
        skipped = start - begin * made.itemsize * record.format.inputs_a_row
        into[:] = made.reshape(-1).view(np.uint8)[skipped : skipped + len(into)].data

    def _read_ahead(self, rank: int, record: Record, position: int) -> None:
        """Have the kernel fetch what follows `position` of a record while what came before is worked on."""
        advise: Callable[[int, int, int, int], None] | None = getattr(os, "posix_fadvise", None)
        advised = max(position, self._advised.get((rank, record.name), 0))
        ahead = min(position + _AHEAD, record.size)
        if advise and ahead - advised >= min(_AHEAD // 2, record.size - advised) > 0:
            with contextlib.suppress(OSError):  # an advice: file systems may not know it
                advise(self._fds[rank], record.offset + advised, ahead - advised, os.POSIX_FADV_WILLNEED)
            self._advised[rank, record.name] = ahead

    def scratch(self, n: int) -> memoryview:
        return self._scratch[:n]

    def map(self, rank: int, record: Record, start: int, size: int) -> tuple[mmap.mmap, int]:
        """A read-only mapping that covers a byte range, and where the range begins in it."""
        assert not isinstance(record, DequantizedView)  # its numbers lie in their order, and nowhere
        begin = record.offset + start
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._fds[rank], begin + size - page, access=mmap.ACCESS_READ, offset=page)
        return mapped, begin - page

    def check(self, rank: int, record: Record, start: int, data: memoryview) -> None:
        """Take the next bytes of a streamed record, which were read last, into its CRC; at its end compare. Raises BadInput."""
        position, crc = self.running.pop((rank, record.name), (0, 0))
        if position != start:
            raise AssertionError(f"{record.name} read at {start}, expected {position}")
        position += len(data)
        if isinstance(record, DequantizedView):  # the CRC is that of the codes
            new = record.codes_until(position) - record.codes_until(start)
            data = self._codes[len(self._codes) - new :].data
        crc = crc32(data, crc)
        if position < record.size:
            self.running[rank, record.name] = position, crc
        elif crc != record.crc:
            raise DamagedRecord(self.ranks[rank], record)

    def check_scales(self) -> None:
        """Look at all scales of quantized tensors. Raises BadInput if one is not finite."""
        for index in self.ranks:
            for tensor in index.tensors.values():
                if isinstance(tensor.record, DequantizedView):
                    for expert in range(tensor.record.experts):
                        tensor.record.scales_of(expert)

    def same(self, key: str, rank: int) -> bool:
        """Whether `rank` holds the same bits as rank 0 under `key`, whatever the strides of either."""
        first, other = (self._array(r, self.ranks[r].tensors[key]) for r in (0, rank))
        if not first.shape:
            return bool(first == other)
        step = max(1, SCRATCH // max(1, first[:1].nbytes))
        return all(np.array_equal(first[i : i + step], other[i : i + step]) for i in range(0, len(first), step))

    def _array(self, rank: int, tensor: StoredTensor) -> NDArray[Any]:
        """The bits of a tensor, mapped. The mapping is gone when the array is."""
        item = tensor.itemsize
        if 0 in tensor.shape:
            return np.empty(tensor.shape, f"u{item}")
        span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)) + 1
        mapped, offset = self.map(rank, tensor.record, tensor.offset * item, span * item)
        return np.ndarray(tensor.shape, f"u{item}", mapped, offset, tuple(s * item for s in tensor.strides))
