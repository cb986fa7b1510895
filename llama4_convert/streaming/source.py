"""The opened files of a source: reads byte ranges of records, and checks each record against the CRC in its archive."""

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
from llama4_convert.checkpoints.pth import DamagedRecord, truncated
from llama4_convert.checkpoints.tensors import Record, StoredTensor, TensorFile, span
from llama4_convert.errors import BadInput, from_os_error
from llama4_convert.planning.plan import RecordKey
from llama4_convert.streaming.resume import Running

# Read granularity: small enough to stay in the processor's cache between reading, checking and scattering.
SCRATCH_BYTES = 1 << 20
# How far the kernel reads ahead in each record: the parts of a tensor are read from the ranks in turn.
_READ_AHEAD_BYTES = 16 << 20


class Source:
    """The opened files, and for each record that is read front to back its position and the CRC up to there."""

    def __init__(self, files: Sequence[TensorFile], running: Running) -> None:
        """`running`: records that an earlier run has read in part (see `resume`); `check` keeps it up to date."""
        self.files = files
        self._fds: list[int] = []
        self.running = running
        self._dequantizer = Dequantizer()
        self._codes: NDArray[np.uint8] = np.empty(0, np.uint8)  # codes that the last read of a quantized record took
        self._advised: dict[RecordKey, int] = {}  # record -> where the last read ahead ends
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))

    def __enter__(self) -> Source:
        for index in self.files:
            self._fds.append(os.open(index.path, os.O_RDONLY))
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._fds:
            os.close(fd)

    def read(self, file: int, record: Record, start: int, into: memoryview) -> None:
        """Fill `into` from byte `start` of a record. Raises BadInput if the file ends early, EnvironmentFailed if it fails."""
        if isinstance(record, DequantizedView):
            self._dequantize(file, record, start, into)
            return
        done = 0
        while done < len(into):
            try:
                n = os.preadv(self._fds[file], [into[done:]], record.offset + start + done)
            except OSError as error:
                raise from_os_error(error, f"reading {self.files[file].path.name}") from error
            if n == 0:
                raise BadInput(truncated(self.files[file].path))
            done += n
        self._read_ahead(file, record, start + done)

    def _dequantize(self, file: int, record: DequantizedView, start: int, into: memoryview) -> None:
        begin, end = record.codes_for(start, start + len(into))
        self._codes = np.empty(end - begin, np.uint8)
        self.read(file, record.codes.record, begin, self._codes.data)
        made = self._dequantizer.numbers(record, begin, self._codes)
        skipped = start - begin * made.itemsize * record.format.inputs_a_row
        into[:] = made.reshape(-1).view(np.uint8)[skipped : skipped + len(into)].data

    def _read_ahead(self, file: int, record: Record, position: int) -> None:
        """Have the kernel fetch what follows `position` of a record while what came before is worked on."""
        advise: Callable[[int, int, int, int], None] | None = getattr(os, "posix_fadvise", None)
        advised = max(position, self._advised.get((file, record.name), 0))
        ahead = min(position + _READ_AHEAD_BYTES, record.size)
        if advise and ahead - advised >= min(_READ_AHEAD_BYTES // 2, record.size - advised) > 0:
            with contextlib.suppress(OSError):  # an advice: file systems may not know it
                advise(self._fds[file], record.offset + advised, ahead - advised, os.POSIX_FADV_WILLNEED)
            self._advised[file, record.name] = ahead

    def scratch(self, n: int) -> memoryview:
        return self._scratch[:n]

    def map(self, file: int, record: Record, start: int, size: int) -> tuple[mmap.mmap, int]:
        """A read-only mapping that covers a byte range, and where the range begins in it."""
        assert not isinstance(record, DequantizedView)  # computed when it is read: no bytes to map
        begin = record.offset + start
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._fds[file], begin + size - page, access=mmap.ACCESS_READ, offset=page)
        return mapped, begin - page

    def check(self, file: int, record: Record, start: int, data: memoryview) -> None:
        """Take the next bytes of a streamed record, which were read last, into its CRC; at its end compare. Raises BadInput."""
        position, crc = self.running.pop((file, record.name), (0, 0))
        if position != start:
            raise AssertionError(f"{record.name} read at {start}, expected {position}")
        position += len(data)
        if isinstance(record, DequantizedView):  # the CRC is that of the codes
            new = record.codes_until(position) - record.codes_until(start)
            data = self._codes[len(self._codes) - new :].data
        crc = crc32(data, crc)
        if position < record.size:
            self.running[file, record.name] = position, crc
        elif crc != record.crc:
            raise DamagedRecord(self.files[file], record)

    def check_scales(self) -> None:
        """Look at all scales of quantized tensors. Raises BadInput if one is not finite."""
        for index in self.files:
            for tensor in index.tensors.values():
                if isinstance(tensor.record, DequantizedView):
                    for expert in range(tensor.record.experts):
                        tensor.record.scales_of(expert)

    def same(self, key: str, file: int) -> bool:
        """Whether files 0 and `file` store the same bits under `key`, whatever the strides of either."""
        first, other = (self._array(r, self.files[r].tensors[key]) for r in (0, file))
        if not first.shape:
            return bool(first == other)
        step = max(1, SCRATCH_BYTES // max(1, first[:1].nbytes))
        return all(np.array_equal(first[i : i + step], other[i : i + step]) for i in range(0, len(first), step))

    def _array(self, file: int, tensor: StoredTensor) -> NDArray[Any]:
        """The bits of a tensor, mapped. The mapping is gone when the array is."""
        item = tensor.itemsize
        if 0 in tensor.shape:
            return np.empty(tensor.shape, f"u{item}")
        size = span(tensor.shape, tensor.strides) * item
        mapped, offset = self.map(file, tensor.record, tensor.offset * item, size)
        return np.ndarray(tensor.shape, f"u{item}", mapped, offset, tuple(s * item for s in tensor.strides))
