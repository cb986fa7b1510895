"""Walks a plan: reads source slices, scatters them into output buffers, checks what it reads, hands the buffers on.

Memory is a few reused buffers, whatever the size of a tensor. One thread reads, checks and scatters, front to back through
each output file; the digest and the disk have a thread each (see `writer`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama4_convert import nonfinite
from llama4_convert.binding import mismatch
from llama4_convert.cast import cast
from llama4_convert.changes import Merger
from llama4_convert.checkpoints.meta_quantized import Dequantizer, QuantizedRecord
from llama4_convert.checkpoints.pth import ITEM_SIZES, PthIndex, Record, StoredTensor
from llama4_convert.errors import BadInput, from_os_error
from llama4_convert.expert_codes import ExpertCodes
from llama4_convert.nonfinite import NonFinite
from llama4_convert.planned import Part, Piece, Plan, PlannedFile, PlannedMatrix, PlannedTensor
from llama4_convert.resuming import Key, Running
from llama4_convert.writer import Buffers, FileWriter
from quant.encoding import Encoded
from quant.schemes import NotFinite

try:  # the same CRC-32 at several times the speed, where its wheel is installed
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

Progress = Callable[[int], None]
Fill = Callable[[int, memoryview], None]  # makes a byte range: where it begins, and where to put it

# Read granularity: small enough to stay in the processor's cache between reading, checking and scattering.
_SCRATCH = 1 << 20
_GATHER_AHEAD = 96 << 20  # the largest matrix that is gathered while another is encoded: Scout's experts have 80 MiB
_GATHER = 16 << 20  # of a matrix, between two reports of progress
# What the disk is asked for before it is read, of each record: a rank's part of a tensor is read in turn with the others'.
_AHEAD = 16 << 20
# Own memory of a run beside its buffers: numpy, the plan of a 48-layer model, scratch, the tokenizer's conversion.
BASE_MEMORY = 64 << 20
COMPILER_MEMORY = 96 << 20  # numba, and what it compiles
MERGER_MEMORY = 256 << 20  # torch, which multiplies an adapter's factors


class DamagedRecord(BadInput):
    """Bytes that do not match the archive's CRC; `key` is the record's rank and name."""

    def __init__(self, message: str, key: Key) -> None:
        super().__init__(message)
        self.key = key


class Source:
    """The opened rank files, and the CRC of each record that is read front to back, up to where it has been read."""

    def __init__(self, ranks: Sequence[PthIndex], running: Running | None = None) -> None:
        """`running`: records that an earlier run has read in part, see `resuming`; it is kept up to date."""
        self.ranks = ranks
        self._fds: list[int] = []
        self.running: Running = {} if running is None else running
        self._dequantizer = Dequantizer()
        self._codes: NDArray[np.uint8] = np.empty(0, np.uint8)  # that the last read of a quantized record was made of
        self._advised: dict[tuple[int, str], int] = {}  # record -> up to where the disk has been asked for it
        self._scratch = memoryview(bytearray(_SCRATCH))

    def __enter__(self) -> Source:
        for index in self.ranks:
            self._fds.append(os.open(index.path, os.O_RDONLY))
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._fds:
            os.close(fd)

    def read(self, rank: int, record: Record, start: int, into: memoryview) -> None:
        """Fill `into` from byte `start` of a record. Raises BadInput if the file ends early, EnvironmentFailed if it fails."""
        if isinstance(record, QuantizedRecord):
            self._dequantize(rank, record, start, into)
            return
        done = 0
        while done < len(into):
            try:
                n = os.preadv(self._fds[rank], [into[done:]], record.offset + start + done)
            except OSError as error:
                raise from_os_error(error, f"reading {self.ranks[rank].path.name}") from error
            if n == 0:
                raise BadInput(
                    f"{self.ranks[rank].path.name} ends in the middle of a tensor: it changed or is truncated"
                )
            done += n
        self._read_ahead(rank, record, start + done)

    def _dequantize(self, rank: int, record: QuantizedRecord, start: int, into: memoryview) -> None:
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
        assert not isinstance(record, QuantizedRecord)  # its numbers lie in their order, and nowhere
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
        if isinstance(record, QuantizedRecord):  # the CRC is that of the codes
            new = record.codes_until(position) - record.codes_until(start)
            data = self._codes[len(self._codes) - new :].data
        crc = crc32(data, crc)
        if position < record.size:
            self.running[rank, record.name] = position, crc
        elif crc != record.crc:
            raise self.damaged(rank, record)

    def damaged(self, rank: int, record: Record) -> DamagedRecord:
        index = self.ranks[rank]
        keys = [key for key, tensor in index.tensors.items() if tensor.record.name == record.name]
        what = keys[0] if keys else record.name
        message = (
            f"{index.path.name}: {what} is damaged (its bytes do not match the archive's CRC): download the file again"
        )
        return DamagedRecord(message, (rank, record.name))

    def check_whole(self, rank: int, record: Record, progress: Progress) -> None:
        """Read a record just to check it."""
        if isinstance(record, QuantizedRecord):
            record = record.codes.record
        position, crc = 0, 0
        while position < record.size:
            view = self.scratch(min(_SCRATCH, record.size - position))
            self.read(rank, record, position, view)
            crc, position = crc32(view, crc), position + len(view)
            progress(len(view))
        self._advised.pop((rank, record.name), None)  # it will be read again
        if record.crc is not None and crc != record.crc:
            raise self.damaged(rank, record)

    def check_scales(self) -> None:
        """Look at all scales of quantized tensors. Raises BadInput if one is not finite."""
        for index in self.ranks:
            for tensor in index.tensors.values():
                if isinstance(tensor.record, QuantizedRecord):
                    for expert in range(tensor.record.experts):
                        tensor.record.scales_of(expert)

    def same(self, key: str, rank: int) -> bool:
        """Whether `rank` holds the same bits as rank 0 under `key`, whatever the strides of either."""
        first, other = (self._array(r, self.ranks[r].tensors[key]) for r in (0, rank))
        if not first.shape:
            return bool(first == other)
        step = max(1, _SCRATCH // max(1, first[:1].nbytes))
        return all(np.array_equal(first[i : i + step], other[i : i + step]) for i in range(0, len(first), step))

    def _array(self, rank: int, tensor: StoredTensor) -> NDArray[Any]:
        """The bits of a tensor, mapped. The mapping is gone when the array is."""
        item = tensor.itemsize
        if 0 in tensor.shape:
            return np.empty(tensor.shape, f"u{item}")
        span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)) + 1
        mapped, offset = self.map(rank, tensor.record, tensor.offset * item, span * item)
        return np.ndarray(tensor.shape, f"u{item}", mapped, offset, tuple(s * item for s in tensor.strides))


@dataclass
class RunResult:
    """What a run has to say besides its files."""

    overflows: dict[str, int] = field(default_factory=dict)  # finite numbers that a cast made infinite, by tensor
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # by module: sums of squares, error and weight
    nonfinite: dict[str, NonFinite] = field(default_factory=dict)  # by tensor, where there are any
    scales: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # by key, for the file that is written next

    def count(self, name: str, found: NonFinite) -> None:
        """Add to what a tensor has of NaN and infinities."""
        if any(found):
            before = self.nonfinite.get(name, NonFinite())
            self.nonfinite[name] = NonFinite(before.nan + found.nan, before.inf + found.inf)

    def taken_nonfinite(self) -> dict[str, NonFinite]:
        """Those since the last call."""
        taken, self.nonfinite = self.nonfinite, {}
        return taken


def check_unread(plan: Plan, source: Source, progress: Progress) -> None:
    """Check what the run will not read front to back. Raises BadInput on the first damaged record, or copy that differs."""
    for rank, record in plan.unread:
        source.check_whole(rank, record, progress)
    source.check_scales()
    for key, rank in plan.compare:
        if not source.same(key, rank):
            raise BadInput(mismatch(key, source.ranks[0].path.name, source.ranks[rank].path.name))


def write_file(
    plan: Plan,
    file: PlannedFile,
    source: Source,
    writer: FileWriter,
    result: RunResult,
    progress: Progress,
    allow_nonfinite: bool = False,
) -> None:
    """Stream one planned file into `writer`. `allow_nonfinite`: matrices with NaN or infinities are quantized, too."""
    envelope, checksum, merger = file.envelope(), _Checksum(), Merger()
    with ThreadPoolExecutor(1, "gather") as thread:
        encoder = _Encoder(plan, file, source, result, progress, thread, allow_nonfinite, merger)
        _put(envelope.head(), writer)
        for tensor in file.tensors:
            _put(envelope.begin(), writer)
            if tensor.part:  # its matrix is counted as it is gathered
                _put(encoder.take(tensor.part), writer)
            else:
                fill = _filler(tensor, plan, source, result, merger)
                if tensor.name not in file.replicas:
                    fill = _counting(fill, tensor, result)
                if envelope.has_checksums:
                    fill = checksum.of(fill)
                _stream(tensor.nbytes, fill, writer, progress)
            _put(envelope.finish(checksum.taken()), writer)
        _put(envelope.tail(), writer)


class _Checksum:
    """The CRC-32 of what a filler makes."""

    def __init__(self) -> None:
        self._crc = 0

    def of(self, fill: Fill) -> Fill:
        def checked(start: int, into: memoryview) -> None:
            fill(start, into)
            self._crc = crc32(into, self._crc)

        return checked

    def taken(self) -> int:
        """The sum so far; the next one begins anew."""
        crc, self._crc = self._crc, 0
        return crc


def _filler_of(data: bytes | memoryview) -> Fill:
    def fill(start: int, into: memoryview) -> None:
        into[:] = data[start : start + len(into)]

    return fill


def _put(data: bytes | memoryview, writer: FileWriter) -> None:
    _stream(len(data), _filler_of(data), writer)


def _stream(size: int, fill: Fill, writer: FileWriter, progress: Progress = lambda n: None) -> None:
    """Have `fill` make the next `size` bytes of the file."""
    position = 0
    while position < size:
        space = writer.space()
        n = min(len(space), size - position)
        fill(position, space[:n])
        writer.advance(n)
        position += n
        progress(n)


def _counting(fill: Fill, tensor: PlannedTensor, result: RunResult) -> Fill:
    """The same, with what is not finite counted. Tensors lie at multiples of their item size, so no number is cut."""

    def counted(start: int, into: memoryview) -> None:
        fill(start, into)
        result.count(tensor.name, nonfinite.count(into, tensor.dtype))

    return counted


def _filler(tensor: PlannedTensor, plan: Plan, source: Source, result: RunResult, merger: Merger) -> Fill:
    if not tensor.pieces:
        return _filler_of(result.scales.pop(tensor.name).reshape(-1).view(np.uint8).data)
    if tensor.scales:
        gather = _filler(replace(tensor, dtype="BF16", scales=None), plan, source, result, merger)
        return ExpertCodes(tensor, tensor.scales, gather, result)
    if tensor.changes or tensor.dtype != tensor.source_dtype:
        return _Cast(tensor, plan, source, result, merger)
    return _Gather(tensor, plan, source)


class _Encoder:
    """Gathers matrices whole, encodes them, and holds their parts until each is written.

    While one matrix is encoded the next one is gathered, on another thread: encoding waits for no disk. Only where no other
    tensor lies between the two: all reading stays in the order of the plan, and nothing else reads meanwhile.
    """

    def __init__(
        self,
        plan: Plan,
        file: PlannedFile,
        source: Source,
        result: RunResult,
        progress: Progress,
        thread: Executor,
        allow_nonfinite: bool,
        merger: Merger,
    ) -> None:
        self.plan, self.source, self.result, self.progress, self.thread = plan, source, result, progress, thread
        self.allow_nonfinite, self.merger = allow_nonfinite, merger
        self.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._following = _following(file)
        self._held: dict[str, list[memoryview | None]] = {}
        self._ahead: bytearray | None = None  # the following matrix, gathered
        self._spare = bytearray()  # reused: matrices of a layer are of a size

    def take(self, part: Part) -> bytes | memoryview:
        """The bytes of one part, once. Raises BadInput for a matrix with numbers that are not finite."""
        if part.constant is not None:
            return part.constant
        module = part.matrix.matrix.module
        if module not in self._held:
            self._held[module] = self._encode(part.matrix)
        parts = self._held[module]
        taken, parts[part.index] = parts[part.index], None
        if not any(p is not None for p in parts):
            del self._held[module]
        assert taken is not None
        return taken

    def _encode(self, planned: PlannedMatrix) -> list[memoryview | None]:
        gathered, self._ahead = self._ahead or self._gather(planned), None
        following = self._following.get(planned.matrix.module)
        ahead = self.thread.submit(self._gather, following) if following else None
        try:
            encoded = self._encoded(planned, gathered)
        finally:
            if ahead:
                wait([ahead])
        self._spare = gathered
        self._ahead = ahead.result() if ahead else None
        if planned.scheme and not planned.keeps_bits:
            self.result.errors[planned.matrix.module] = encoded.squared_error, encoded.squared_sum
        return [np.ascontiguousarray(p).data.cast("B") for p in encoded.parts]

    def _encoded(self, planned: PlannedMatrix, gathered: bytearray) -> Encoded:
        tensor, matrix = planned.gathered, planned.matrix
        bits = np.frombuffer(gathered, f"u{ITEM_SIZES[tensor.dtype]}").reshape(tensor.shape)
        if planned.scheme is None or planned.keeps_bits:
            self.result.count(tensor.name, nonfinite.count(gathered, tensor.dtype))
            return planned.encoder.encode(bits, matrix.in_out, self.threads)
        try:
            return planned.encoder.encode(bits, matrix.in_out, self.threads)
        except NotFinite as error:
            if not self.allow_nonfinite:
                found = nonfinite.count(gathered, tensor.dtype)
                raise BadInput(
                    f"{tensor.name} has {found} of {tensor.numel:,} numbers, which {planned.scheme.kind} cannot hold:"
                    " leave it out of the recipe, or take them as 0 and the largest magnitude with --allow-nonfinite --overwrite"
                ) from error
            self.result.count(tensor.name, nonfinite.make_finite(gathered, tensor.dtype))
            return planned.encoder.encode(bits, matrix.in_out, self.threads)

    def _gather(self, planned: PlannedMatrix) -> bytearray:
        tensor = planned.gathered
        into, self._spare = self._spare, bytearray()
        if len(into) != tensor.nbytes:
            into = bytearray()  # never both
            into = bytearray(tensor.nbytes)
        fill = _filler(tensor, self.plan, self.source, self.result, self.merger)
        for start in range(0, tensor.nbytes, _GATHER):
            n = min(_GATHER, tensor.nbytes - start)
            fill(start, memoryview(into)[start : start + n])
            self.progress(n)
        return into


def _following(file: PlannedFile) -> dict[str, PlannedMatrix]:
    """By module: the matrix to be read next, where a matrix is what is read next, and two of them may be in memory."""
    return {
        one.matrix.module: other
        for one, other in pairwise(file.reads())
        if isinstance(one, PlannedMatrix)
        and isinstance(other, PlannedMatrix)
        and max(one.gathered.nbytes, other.gathered.nbytes) <= _GATHER_AHEAD
    }


class _Gather:
    """Fills byte ranges of one output tensor, in order, from its pieces."""

    def __init__(self, tensor: PlannedTensor, plan: Plan, source: Source) -> None:
        self.tensor, self.source = tensor, source
        self.item = tensor.pieces[0].source.itemsize
        self.streamed = [(p.rank, p.source.record.name) in plan.streamed for p in tensor.pieces]

    def __call__(self, start: int, into: memoryview) -> None:
        """`start`: byte position in the tensor (source dtype) of `into`'s first byte."""
        for piece, streamed in zip(self.tensor.pieces, self.streamed, strict=True):
            if piece.is_sequential:
                self._sequential(piece, streamed, start, into)
            else:
                self._strided(piece, start, into)

    def _sequential(self, piece: Piece, streamed: bool, start: int, into: memoryview) -> None:
        """A piece whose source is one contiguous range: read it chunk by chunk, scatter the rows."""
        item, record = self.item, piece.source.record
        rows = piece.copy.shape[0] if len(piece.copy.shape) == 2 else 1
        width = piece.copy.shape[-1] * item
        pitch = piece.copy.target_strides[0] * item if rows > 1 else width
        first = piece.copy.target_offset * item
        begin = _linear(start - first, rows, width, pitch)
        end = _linear(start + len(into) - first, rows, width, pitch)
        base = piece.copy.source_offset * item
        if rows == 1 or pitch == width:
            at = first + begin - start
            self._read(piece.rank, record, base + begin, into[at : at + end - begin], streamed)
            return
        chunk = max(_SCRATCH // width, 1) * width if width <= _SCRATCH else _SCRATCH
        while begin < end:
            # Chunks end where rows end, but for the first and the last: ranges of a tensor may begin and end inside a row.
            n = min(end - begin, chunk - begin % min(chunk, width))
            view = self.source.scratch(n)
            self._read(piece.rank, record, base + begin, view, streamed)
            _scatter(view, begin, width, pitch, into, first - start)
            begin += n

    def _read(self, rank: int, record: Record, at: int, into: memoryview, streamed: bool) -> None:
        for i in range(0, len(into), _SCRATCH):
            part = into[i : i + _SCRATCH]
            self.source.read(rank, record, at + i, part)
            if streamed:
                self.source.check(rank, record, at + i, part)

    def _strided(self, piece: Piece, start: int, into: memoryview) -> None:
        """A transposed piece, columns of a wider matrix, or a view: many short runs, each contiguous in the target."""
        item, width = self.item, piece.copy.shape[-1] * self.item
        for block in _blocks(piece, item):
            first, last = block.rows_touching(start, start + len(into), width)
            # A row that begins before the range or ends behind it is cut; the others are taken many at a time.
            while first < last:
                at = block.target + first * block.target_pitch - start
                whole = (len(into) - width - at) // block.target_pitch + 1 if block.target_pitch else 1
                rows = min(last - first, whole, self._rows_at_once(piece, block)) if at >= 0 and whole > 0 else 0
                if rows > 1:
                    self._window(piece, block, first, rows, into, at)
                else:
                    self._run(piece, block.source + first * block.source_pitch, at, into)
                first += max(1, rows)

    def _rows_at_once(self, piece: Piece, block: _Block) -> int:
        """How many neighbouring rows a read into the scratch buffer holds, with what lies between them."""
        room = _SCRATCH - ((piece.copy.shape[-1] - 1) * piece.copy.source_strides[-1] + 1) * self.item
        return room // block.source_pitch + 1 if block.source_pitch and room > 0 else 1

    def _window(self, piece: Piece, block: _Block, first: int, rows: int, into: memoryview, at: int) -> None:
        n, step = piece.copy.shape[-1], piece.copy.source_strides[-1] * self.item
        span = (rows - 1) * block.source_pitch + (n - 1) * step + self.item
        view = self.source.scratch(span)
        self.source.read(piece.rank, piece.source.record, block.source + first * block.source_pitch, view)
        numbers = f"V{self.item}"
        taken = np.ndarray((rows, n), numbers, view, 0, (block.source_pitch, step))
        np.ndarray((rows, n), numbers, into, at, (block.target_pitch, self.item))[:] = taken

    def _run(self, piece: Piece, source_at: int, at: int, into: memoryview) -> None:
        """One row, as far as it lies in `into`; `at`: where it would begin there."""
        item, step = self.item, piece.copy.source_strides[-1]
        skip = max(0, -at) // item
        n = min(piece.copy.shape[-1], (len(into) - at) // item) - skip
        if n <= 0:
            return
        begin, target = source_at + skip * step * item, into[at + skip * item : at + (skip + n) * item]
        if step == 1:
            self.source.read(piece.rank, piece.source.record, begin, target)
            return
        mapped, offset = self.source.map(piece.rank, piece.source.record, begin, ((n - 1) * step + 1) * item)
        with contextlib.closing(mapped):
            run = np.ndarray((n,), f"V{item}", mapped, offset, (step * item,))
            np.frombuffer(target, f"V{item}")[:] = run
            del run  # the mapping cannot be closed while an array looks into it


class _Cast:
    """The same through a cast: gathers the source's dtype, hands on the target's. An adapter's changes are made in between."""

    def __init__(self, tensor: PlannedTensor, plan: Plan, source: Source, result: RunResult, merger: Merger) -> None:
        self.gather = _Gather(tensor, plan, source)
        self.tensor, self.result, self.merger = tensor, result, merger
        self.ratio = tensor.nbytes // tensor.numel, self.gather.item

    def __call__(self, start: int, into: memoryview) -> None:
        target_item, source_item = self.ratio
        for i in range(0, len(into), _SCRATCH):
            part = into[i : i + _SCRATCH]
            raw = bytearray(len(part) // target_item * source_item)
            first = (start + i) // target_item
            self.gather(first * source_item, memoryview(raw))
            part[:], lost = self._cast(first, raw)
            if lost:
                self.result.overflows[self.tensor.name] = self.result.overflows.get(self.tensor.name, 0) + lost

    def _cast(self, first: int, raw: bytearray) -> tuple[bytes | bytearray, int]:
        tensor = self.tensor
        bits = np.frombuffer(raw, f"u{self.gather.item}")
        changed = self.merger.changed(tensor.changes, first, bits, tensor.source_dtype)
        if changed is not None:
            return cast(changed.data.cast("B"), "F32", tensor.dtype)
        if tensor.dtype == tensor.source_dtype:
            return raw, 0
        return cast(bytes(raw), tensor.source_dtype, tensor.dtype)


def _linear(target: int, rows: int, width: int, pitch: int) -> int:
    """How many bytes of a piece, counted along its rows, lie before byte `target` of the tensor."""
    if target <= 0:
        return 0
    row, column = divmod(target, pitch)
    return min(row, rows) * width + (min(column, width) if row < rows else 0)


def _scatter(view: memoryview, begin: int, width: int, pitch: int, into: memoryview, shift: int) -> None:
    """Spread bytes `begin`.. of a piece, `width` a row, over rows `pitch` apart; `shift`: where row 0 begins in `into`."""
    row, column = divmod(begin, width)
    done = 0
    if column:
        done = min(width - column, len(view))
        at = shift + row * pitch + column
        into[at : at + done] = view[:done]
        row += 1
    whole = (len(view) - done) // width
    if whole:
        at = shift + row * pitch
        data = np.frombuffer(view, np.uint8, whole * width, done).reshape(whole, width)
        _rows(into, at, whole, width, pitch)[:] = data
        done += whole * width
        row += whole
    if done < len(view):
        at = shift + row * pitch
        into[at : at + len(view) - done] = view[done:]


def _rows(into: memoryview, at: int, rows: int, width: int, pitch: int) -> NDArray[np.uint8]:
    return np.ndarray((rows, width), np.uint8, into, at, (pitch, 1))


@dataclass(frozen=True)
class _Block:
    """Rows of a piece at even distances: where the first begins, and from each to the next, in bytes."""

    source: int
    target: int
    source_pitch: int
    target_pitch: int
    rows: int

    def rows_touching(self, start: int, end: int, width: int) -> tuple[int, int]:
        """The rows, first and behind the last, of which a byte lies from `start` to `end` in the target."""
        if self.rows == 1:
            return 0, int(self.target < end and self.target + width > start)
        first = -(-(start - self.target - width + 1) // self.target_pitch)
        last = -(-(end - self.target) // self.target_pitch)
        return max(0, first), min(self.rows, last)


def _blocks(piece: Piece, item: int) -> Iterator[_Block]:
    copy = piece.copy
    outer = len(copy.shape) - 2
    rows = copy.shape[outer] if outer >= 0 else 1
    pitches = (copy.source_strides[outer] * item, copy.target_strides[outer] * item) if outer >= 0 else (0, 0)
    for steps in np.ndindex(copy.shape[: max(outer, 0)]):
        source = copy.source_offset + sum(i * s for i, s in zip(steps, copy.source_strides, strict=False))
        target = copy.target_offset + sum(i * t for i, t in zip(steps, copy.target_strides, strict=False))
        yield _Block(source * item, target * item, *pitches, rows)


def planned_buffers(max_memory: int) -> Buffers:
    """Buffers that keep a run within `max_memory` bytes: three, of up to 16 MiB."""
    size = min(16 << 20, max(64 << 10, max_memory // 16))
    return Buffers(3, size - size % mmap.PAGESIZE)


def peak_memory(max_memory: int, tokenizer_bytes: int, plan: Plan) -> int:
    """Bytes of own memory above an idle interpreter that a run takes, as measured (docs/benchmarks.md).

    The buffers and what a recipe needs, or the conversion of a tokenizer.model of `tokenizer_bytes` (0: none), which ends
    before they are filled: 113 MiB for Llama 4's 3.6 MB.
    """
    run = 3 * planned_buffers(max_memory).size + BASE_MEMORY
    matrices, tensors = plan.matrices, plan.tensors
    experts = [t.numel // t.scales.experts for t in tensors if t.scales]
    if matrices or experts or any(isinstance(p.source.record, QuantizedRecord) for t in tensors for p in t.pieces):
        run += COMPILER_MEMORY
    if experts:  # one in bf16 and in codes, and the scales of a rank
        run += 3 * max(experts) + max(f.size for f in plan.files if f.made_with)
    if matrices:
        # Gathered, and encoded to half its bytes at most, or as many where it only becomes linear; the next one gathered.
        largest = max(
            m.gathered.nbytes * (4 if m.scheme is None else 3) // 2
            + (m.gathered.nbytes if m.gathered.nbytes <= _GATHER_AHEAD else 0)
            for m in matrices
        )
        run += largest
    if plan.changed:
        run += MERGER_MEMORY + plan.change_bytes
    return max(run, (80 << 20) + 10 * tokenizer_bytes)
