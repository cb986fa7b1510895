# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""How kernels read a matrix and write words of codes: tiles [inputs, LANES], whichever way the matrix lies in memory.

A tile holds some inputs of LANES neighbouring outputs. Kernels run over the outputs, one vector lane an output, so that each
sum runs over the inputs in their order: nothing is reassociated (there is no fastmath, and without it LLVM neither reorders
nor contracts into FMA), and the bytes depend neither on the machine's vector width nor on the number of threads.

Lanes of outputs that a matrix does not have must be 0 before a tile is read, and remain 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quant.kernels.bf16 import INFINITY, MAGNITUDE
from quant.kernels.jit import part

# Indices are unsigned: a signed one might be negative for all that LLVM knows, and its loop is not vectorized then.
U = np.uintp
LANES = U(128)  # outputs of a tile
TWO, THREE, FOUR = U(2), U(3), U(4)  # inputs are read by fours: fewer trips to what is noted in memory

_LOW_32, _EVEN_16 = np.uint64(0xFFFFFFFF), np.uint64(0x0000FFFF0000FFFF)
_BY_32, _BY_16 = np.uint64(32), np.uint64(16)
_SIGN = np.int16(-0x8000)


class Source(NamedTuple):
    """A matrix of bf16 bits in memory, [inputs, outputs] or [outputs, inputs]."""

    bits: NDArray[np.int16]  # flat, from the first element to the last
    stride: int  # elements from one row to the next
    in_out: bool  # a row is an input; else it is an output


class Tile(NamedTuple):
    """The buffers that a tile is read into, lent by one thread to call after call."""

    bits: NDArray[np.int16]  # [inputs, LANES], flat
    rows: NDArray[np.int16]  # [LANES, inputs + 4], flat: outputs that are to be transposed
    noted: NDArray[np.int16]  # [LANES] or [2, LANES], flat: maxima, see `_note_magnitude` and `_note_extremes`


def empty_tile(inputs: int, read_at_once: int, notes: int = 1) -> Tile:
    """Buffers for `inputs` inputs, at most `read_at_once` of them in one call; `notes` maxima are kept for each output."""
    lanes = int(LANES)
    pitch = read_at_once + int(FOUR)
    return Tile(
        np.empty(inputs * lanes, np.int16), np.empty(pitch * lanes, np.int16), np.empty(notes * lanes, np.int16)
    )


@part
def _note_magnitude(noted, j, b0, b1, b2, b3):
    """The largest magnitude of output `j` as bf16 bits; NaN counts as larger than all."""
    b0, b1, b2, b3 = b0 & MAGNITUDE, b1 & MAGNITUDE, b2 & MAGNITUDE, b3 & MAGNITUDE
    noted[j] = max(noted[j], max(max(b0, b1), max(b2, b3)))


@part
def _note_extremes(noted, j, b0, b1, b2, b3):
    """The largest positive and, LANES further, the largest negative magnitude, as bf16 bits; NaN counts as larger than all."""
    noted[j] = max(noted[j], max(max(b0, b1), max(b2, b3)))
    b0, b1, b2, b3 = b0 ^ _SIGN, b1 ^ _SIGN, b2 ^ _SIGN, b3 ^ _SIGN
    noted[LANES + j] = max(noted[LANES + j], np.int16(max(max(b0, b1), max(b2, b3))))


def _reader(note):
    """`read` for a way to note four inputs of an output. A closure, as numba caches no kernel that passes functions on."""

    @part
    def read_in_out(source, stride, k0, size, n0, width, bits, to, noted):
        for four in range(size // FOUR):
            start = (k0 + four * FOUR) * stride + n0
            at = to + four * FOUR * LANES
            for j in range(width):
                b0 = source[start + j]
                b1 = source[start + stride + j]
                b2 = source[start + stride * TWO + j]
                b3 = source[start + stride * THREE + j]
                bits[at + j] = b0
                bits[at + LANES + j] = b1
                bits[at + TWO * LANES + j] = b2
                bits[at + THREE * LANES + j] = b3
                note(noted, j, b0, b1, b2, b3)
        for r in range(size // FOUR * FOUR, size):
            start = (k0 + r) * stride + n0
            for j in range(width):
                b0 = source[start + j]
                bits[to + r * LANES + j] = b0
                note(noted, j, b0, b0, b0, b0)
        for i in range(size * LANES, (size + THREE) // FOUR * FOUR * LANES):
            bits[to + i] = np.int16(0)

    @part
    def note_tile(bits, to, fours, noted):
        for four in range(fours):
            at = to + four * FOUR * LANES
            for j in range(LANES):
                b0, b1 = bits[at + j], bits[at + LANES + j]
                note(noted, j, b0, b1, bits[at + TWO * LANES + j], bits[at + THREE * LANES + j])

    @part
    def read(source, k0, size, n0, width, tile, to):
        """Inputs k0 .. k0+size of outputs n0 .. n0+width into the tile from `to` on, with zeros up to the next four inputs."""
        stride = U(source.stride)
        if source.in_out:
            read_in_out(source.bits, stride, k0, size, n0, width, tile.bits, to, tile.noted)
        else:
            _read_out_in(source.bits, stride, k0, size, n0, width, tile.rows, tile.bits, to)
            note_tile(tile.bits, to, (size + THREE) // FOUR, tile.noted)

    return read


@part
def _read_out_in(source, stride, k0, size, n0, width, rows, bits, to):
    """Transposes, four by four in uint64 (halves of 32 bits change places, then of 16).

    The rows are first copied together: in the source they may lie a power of two apart and would share few cache sets.
    """
    quads = (size + THREE) // FOUR
    pitch = quads * FOUR + FOUR
    for j in range(width):
        start = (n0 + j) * stride + k0
        for r in range(size):
            rows[j * pitch + r] = source[start + r]
        for r in range(size, quads * FOUR):
            rows[j * pitch + r] = np.int16(0)
    for j in range(width * pitch, (width + THREE) // FOUR * FOUR * pitch):
        rows[j] = np.int16(0)  # lanes without an output
    pitch //= FOUR
    fours = rows.view(np.uint64)
    lanes = bits.view(np.uint64)
    for r in range(quads):
        at = (to + r * FOUR * LANES) // FOUR
        for j in range((width + THREE) // FOUR):
            i = j * FOUR * pitch + r
            a0, a1, a2, a3 = fours[i], fours[i + pitch], fours[i + TWO * pitch], fours[i + THREE * pitch]
            b0 = (a0 & _LOW_32) | (a2 << _BY_32)
            b1 = (a1 & _LOW_32) | (a3 << _BY_32)
            b2 = (a0 >> _BY_32) | (a2 & ~_LOW_32)
            b3 = (a1 >> _BY_32) | (a3 & ~_LOW_32)
            lanes[at + j] = (b0 & _EVEN_16) | ((b1 & _EVEN_16) << _BY_16)
            lanes[at + LANES // FOUR + j] = ((b0 >> _BY_16) & _EVEN_16) | (b1 & ~_EVEN_16)
            lanes[at + LANES // TWO + j] = (b2 & _EVEN_16) | ((b3 & _EVEN_16) << _BY_16)
            lanes[at + LANES // FOUR * THREE + j] = ((b2 >> _BY_16) & _EVEN_16) | (b3 & ~_EVEN_16)


read_with_magnitudes = _reader(_note_magnitude)
read_with_extremes = _reader(_note_extremes)


@part
def largest_of(noted):
    """The largest of the maxima of all outputs."""
    largest = np.int16(0)
    for j in range(U(len(noted))):
        largest = max(largest, noted[j])
    return largest


@part
def not_finite(bits, inputs):
    """How many weights of a tile's first inputs are NaN or infinite."""
    count = 0
    for i in range(inputs * LANES):
        count += (bits[i] & MAGNITUDE) >= INFINITY
    return count


@part
def write_words(words, n0, width, first, count, packed):
    """Transposes words [count, LANES] into `packed` [outputs, words of an output] from word `first` on.

    Kernels call it with the words of some inputs together, as each output's row may be another page.
    """
    for j in range(width):
        for w in range(count):
            packed[n0 + j, first + w] = words[w * LANES + j]
