"""Fills byte ranges of an output tensor from the pieces of the source that it is made of: strided copies, in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from llama4_convert.checkpoints.tensors import Record
from llama4_convert.planning.plan import Piece, PlannedTensor, RecordKey
from llama4_convert.streaming.source import SCRATCH_BYTES, Source

Fill = Callable[[int, memoryview], None]  # makes a byte range: where it begins, and where to put it


class Gather:
    """Fills byte ranges of one output tensor, in order, from its pieces."""

    def __init__(self, tensor: PlannedTensor, source: Source, streamed: Collection[RecordKey]) -> None:
        """`streamed`: the records whose CRC is checked as they are read."""
        self.tensor, self.source = tensor, source
        self.item = tensor.pieces[0].source.itemsize
        self.streamed = [piece.record_key in streamed for piece in tensor.pieces]

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
            self._read(piece.file, record, base + begin, into[at : at + end - begin], streamed)
            return
        chunk = max(SCRATCH_BYTES // width, 1) * width if width <= SCRATCH_BYTES else SCRATCH_BYTES
        while begin < end:
            # Chunks end where rows end, but for the first and the last: ranges of a tensor may begin and end inside a row.
            n = min(end - begin, chunk - begin % min(chunk, width))
            view = self.source.scratch(n)
            self._read(piece.file, record, base + begin, view, streamed)
            _scatter(view, begin, width, pitch, into, first - start)
            begin += n

    def _read(self, file: int, record: Record, at: int, into: memoryview, streamed: bool) -> None:
        for i in range(0, len(into), SCRATCH_BYTES):
            part = into[i : i + SCRATCH_BYTES]
            self.source.read(file, record, at + i, part)
            if streamed:
                self.source.check(file, record, at + i, part)

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
        room = SCRATCH_BYTES - ((piece.copy.shape[-1] - 1) * piece.copy.source_strides[-1] + 1) * self.item
        return room // block.source_pitch + 1 if block.source_pitch and room > 0 else 1

    def _window(self, piece: Piece, block: _Block, first: int, rows: int, into: memoryview, at: int) -> None:
        n, step = piece.copy.shape[-1], piece.copy.source_strides[-1] * self.item
        span = (rows - 1) * block.source_pitch + (n - 1) * step + self.item
        view = self.source.scratch(span)
        self.source.read(piece.file, piece.source.record, block.source + first * block.source_pitch, view)
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
            self.source.read(piece.file, piece.source.record, begin, target)
            return
        mapped, offset = self.source.map(piece.file, piece.source.record, begin, ((n - 1) * step + 1) * item)
        with contextlib.closing(mapped):
            run = np.ndarray((n,), f"V{item}", mapped, offset, (step * item,))
            np.frombuffer(target, f"V{item}")[:] = run
            del run  # the mapping cannot be closed while an array looks into it


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
        np.ndarray((whole, width), np.uint8, into, at, (pitch, 1))[:] = data
        done += whole * width
        row += whole
    if done < len(view):
        at = shift + row * pitch
        into[at : at + len(view) - done] = view[done:]


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
