"""How an adapter changes the numbers of a tensor: it adds products of small factors, or replaces whole tensors.

A change has an array of values, and placements that say to which boxes of which logical tensors the values belong, as they do for
any stored tensor. So the same strided copies bring a change to every output layout: fused, linear layers, transposed. Values are
computed when a run needs them, one matrix at a time, and added in fp32.

The arithmetic is PEFT's, operation by operation, on the same shapes and with the same library, since the last bit of a matrix
product depends on all three. torch is imported when the first product is computed, and nowhere else in a conversion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama4.weights import TensorReader
from llama4_convert.checkpoints.numbers import widened
from llama4_convert.checkpoints.tensors import span
from mappings import Box, Copy, Placement

Floats = NDArray[np.float32]

# A product above this many bytes is made in blocks of rows, each of at most that many: of Scout's matrices only the vocabulary's
# (4 GB) are. Blocks are aligned, so that the library computes their numbers as it does those of the whole.
_WHOLE_BYTES, _BLOCK_BYTES, _ALIGNED_ROWS = 512 << 20, 256 << 20, 64
_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class LowRankUpdate:
    """scaling * B @ A. A linear layer has A [r, k] and B [n, r]; E fused experts have A [r E, k] and B [n, r E] together."""

    reader: TensorReader
    a: str
    b: str
    scaling: float
    shape: tuple[int, int]  # of the product
    expert: tuple[int, int] | None = None  # which, of how many
    rows: tuple[int, int] | None = None  # of the product, where it is one block of several
    columns: tuple[int, int] | None = None
    replaces = False  # the values are added to the tensor's

    @property
    def nbytes(self) -> int:
        """Bytes of memory that `values` takes."""
        return 4 * prod(self.shape)

    @property
    def rank(self) -> int:
        return self.reader.shape(self.a)[0] // (self.expert[1] if self.expert else 1)

    def values(self) -> Floats:
        """float32, flat, in the element order that the placements count."""
        import torch

        rank = self.rank
        if self.expert:
            e, n_experts = self.expert
            a = _read(self.reader, self.a, (e * rank, (e + 1) * rank))
            b = _columns(self.reader, self.b, e, n_experts)
        else:
            a, b = _read(self.reader, self.a), _read(self.reader, self.b, self.rows)
            if self.columns:
                a = np.ascontiguousarray(a[:, slice(*self.columns)])
        left, right = torch.from_numpy(b), torch.from_numpy(a)
        if self.expert and self.expert[1] > 1:  # PEFT multiplies all experts in one batch
            product = torch.bmm(left[None], right[None])[0]
        else:
            product = left @ right
        found: Floats = product.mul_(self.scaling).numpy().reshape(-1)
        return found


@dataclass(frozen=True)
class TensorReplacement:
    """Rows of a stored tensor that replace the model's; with a `scaling` they are added instead (the bias of a factor)."""

    reader: TensorReader
    key: str
    rows: tuple[int, int]
    shape: tuple[int, ...]
    scaling: float | None = None

    @property
    def replaces(self) -> bool:
        return self.scaling is None

    @property
    def nbytes(self) -> int:
        return 4 * (self.rows[1] - self.rows[0]) * prod(self.shape[1:])

    def values(self) -> Floats:
        found = _read(self.reader, self.key, self.rows).reshape(-1)
        return found if self.scaling is None else found * np.float32(self.scaling)


Change = LowRankUpdate | TensorReplacement


class Changed(NamedTuple):
    """A change, and where its values belong."""

    change: Change
    placement: Placement


Changes = Mapping[str, Sequence[Changed]]  # by logical tensor


@dataclass(frozen=True)
class ChangePiece:
    """The part of a change that one output tensor takes: `copy` leads from its values into the tensor."""

    change: Change
    copy: Copy

    @property
    def start(self) -> int:
        """The first element of the tensor that is changed."""
        return self.copy.target_offset

    @cached_property
    def stop(self) -> int:
        """One past the last element of the tensor that is changed."""
        return self.start + span(self.copy.shape, self.copy.target_strides)


def _read(reader: TensorReader, key: str, rows: tuple[int, int] | None = None) -> Floats:
    return np.ascontiguousarray(widened(reader.read(key, rows), reader.dtype(key)))


def _columns(reader: TensorReader, key: str, first: int, step: int) -> Floats:
    """Every `step`-th column, some rows at a time: the factors of all experts are as large as an expert."""
    height, width = reader.shape(key)
    rows = max(1, _READ_BYTES // (4 * width))
    found = np.empty((height, width // step), np.float32)
    for start in range(0, height, rows):
        found[start : start + rows] = _read(reader, key, (start, start + rows))[:, first::step]
    return found


def row_blocks(
    shape: Sequence[int], placements: Sequence[Placement]
) -> Iterator[tuple[tuple[int, int], Sequence[Placement]]]:
    """Ranges of rows (of the first dimension) of a tensor that are computed at once, and the placements in each range."""
    height, row = shape[0], prod(shape[1:])
    if 4 * height * row <= _WHOLE_BYTES:
        yield (0, height), placements
        return
    n = -(-4 * height * row // _BLOCK_BYTES)
    step = -(-height // n)
    step += -step % _ALIGNED_ROWS if step > _ALIGNED_ROWS else 0
    for start in range(0, height, step):
        stop = min(start + step, height)
        yield (start, stop), [_rows_of(p, row, start, stop) for p in placements]


def _rows_of(placement: Placement, row: int, start: int, stop: int) -> Placement:
    axis, first, size = placement.strides.index(row), list(placement.box.start), list(placement.box.size)
    first[axis], size[axis] = start, stop - start
    return replace(placement, box=Box(tuple(first), tuple(size)))


class ChangeApplier:
    """Changes ranges of tensors, in order. Keeps the values that the last range needed: of one matrix, or of two neighbours."""

    def __init__(self) -> None:
        self._values: dict[Change, Floats] = {}

    def changed(
        self, pieces: Sequence[ChangePiece], first: int, bits: NDArray[np.generic], dtype: str
    ) -> Floats | None:
        """The tensor's numbers from element `first` on, in fp32, with all changes made; None if none concerns them."""
        here = [piece for piece in pieces if piece.start < first + bits.size and piece.stop > first]
        if not here:
            return None
        needed = {piece.change for piece in here}
        self._values = {change: values for change, values in self._values.items() if change in needed}
        numbers = widened(bits, dtype)
        for piece in sorted(here, key=lambda piece: not piece.change.replaces):
            if piece.change not in self._values:
                self._values[piece.change] = piece.change.values()
            numbers = _with(numbers, first, piece, self._values[piece.change])
        return numbers


def _with(numbers: Floats, first: int, piece: ChangePiece, values: Floats) -> Floats:
    """`numbers`, from element `first` of a tensor on, with one change made."""
    copy, last = piece.copy, first + numbers.size
    *outer, width = copy.shape
    assert len(outer) <= 1, "a change is of one matrix, or of whole rows"
    if outer:  # all rows that the range touches
        pitch, source_pitch = copy.target_strides[0], copy.source_strides[0]
        row, end = max(0, (first - piece.start) // pitch), min(outer[0], -(-(last - piece.start) // pitch))
        at, start, rows = piece.start + row * pitch, copy.source_offset + row * source_pitch, end - row
    else:  # one run, as far as the range reaches
        at = max(first, piece.start)
        width, start = min(piece.stop, last) - at, copy.source_offset + (at - piece.start) * copy.source_strides[-1]
        pitch, source_pitch, rows = width, 0, 1
    # Rows that the range cuts are made whole for a moment.
    low, high = min(first, at), max(last, at + (rows - 1) * pitch + width)
    wide = numbers
    if (low, high) != (first, last):
        wide = np.zeros(high - low, np.float32)
        wide[first - low : last - low] = numbers
    steps = 4 * source_pitch, 4 * copy.source_strides[-1]
    source = np.ndarray((rows, width), np.float32, values.data, 4 * start, steps)
    target = np.ndarray((rows, width), np.float32, wide.data, 4 * (at - low), (4 * pitch, 4))
    if piece.change.replaces:
        target[:] = source
    else:
        target += source
    return wide[first - low : last - low]


def most_bytes(pieces: Sequence[ChangePiece]) -> int:
    """The most bytes of values that are in memory at once while a tensor is changed from its first element to its last."""
    most = 0
    open_pieces: list[ChangePiece] = []
    for piece in sorted(pieces, key=lambda piece: piece.start):
        open_pieces = [p for p in open_pieces if p.stop > piece.start] + [piece]
        most = max(most, sum(change.nbytes for change in {p.change for p in open_pieces}))
    return most
