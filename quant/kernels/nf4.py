# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Compiled inner loops of the NF4 scheme; `quant/schemes/nf4.py` says what they compute and calls them.

A matrix is seen as rows of whole blocks. One call quantizes a band: some rows, LANES of them at a time, and some of their
blocks. Each block is a tile [weights, LANES]: what tiles.py calls outputs and inputs are here rows and their weights.

The error is known only when the scales have been quantized too, which needs the mean of all of them. So a band leaves
three sums a block, and `nest` makes the errors from these.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quant.kernels.bf16 import INFINITY, stored, widened
from quant.kernels.jit import compiled, part
from quant.kernels.tiles import (
    LANES,
    TWO,
    Tile,
    U,
    empty_tile,
    largest_of,
    not_finite,
    read_with_magnitudes,
    write_words,
)

_CODES_PER_WORD = U(8)  # codes of 4 bits
_TOGETHER = U(512)  # weights of a row whose words are written together

_LEAST = np.float32(1e-38)  # bitsandbytes divides by no less
_ONE, _HALF, _ZERO = np.float32(1), np.float32(0.5), np.float32(0)
_STEPS = np.float64(65535)  # of the table that finds the code of a scale

# NF4: quantiles of the normal distribution, as bitsandbytes lists them (functional.get_4bit_type).
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
NF4.flags.writeable = False
# Midpoints. What lies on one belongs to the lower code: bucketize in bitsandbytes/backends/default/ops.py.
_B0, _B1, _B2, _B3, _B4, _B5, _B6, _B7, _B8, _B9, _B10, _B11, _B12, _B13, _B14 = (NF4[:-1] + NF4[1:]) / np.float32(2)

# Where the rows of `Buffers.columns` begin.
_ROWS = 4
_INVERSE, _EE, _EV, _VV = (U(row * int(LANES)) for row in range(_ROWS))
SUMS = 3  # a block's sums of e^2, e v and v^2, v being weight / scale and e = v - its NF4 value


class Buffers(NamedTuple):
    """What one thread lends to `quantize_band`, call after call: 80 KiB at blocks of 64, 2.2 MiB at 4,096."""

    tile: Tile  # a block
    columns: NDArray[np.float32]  # numbers of each row
    words: NDArray[np.int32]  # words not yet written, [words, LANES]


def buffers(block: int) -> Buffers:
    lanes, together = int(LANES), max(int(_TOGETHER), block)
    return Buffers(
        empty_tile(block, block),
        np.empty(_ROWS * lanes, np.float32),
        np.empty(together // int(_CODES_PER_WORD) * lanes, np.int32),
    )


@part
def _code(v):
    """How many midpoints are less than v."""
    low = np.uint32(v > _B0) + np.uint32(v > _B1) + np.uint32(v > _B2) + np.uint32(v > _B3) + np.uint32(v > _B4)
    mid = np.uint32(v > _B5) + np.uint32(v > _B6) + np.uint32(v > _B7) + np.uint32(v > _B8) + np.uint32(v > _B9)
    top = np.uint32(v > _B10) + np.uint32(v > _B11) + np.uint32(v > _B12) + np.uint32(v > _B13) + np.uint32(v > _B14)
    return np.uint32(low + mid + top)


@part
def _encode(tile, block, columns, words, w0):
    """Codes packed eight to a word: two to a byte, the first in the high half, bytes in their order; and the sums."""
    for j in range(LANES):
        columns[_EE + j] = _ZERO
        columns[_EV + j] = _ZERO
        columns[_VV + j] = _ZERO
    for two in range(block // TWO):
        r0 = two * TWO * LANES
        to = w0 + (two >> U(2)) * LANES
        shift = np.uint32((two & U(3)) << U(3))
        kept = np.uint32(0) if shift == 0 else np.uint32(0xFFFFFFFF)  # the first byte starts a word afresh
        for j in range(LANES):
            inverse = columns[_INVERSE + j]
            v0 = widened(tile[r0 + j]) * inverse
            v1 = widened(tile[r0 + LANES + j]) * inverse
            c0, c1 = _code(v0), _code(v1)
            byte = np.uint32(c0 << np.uint32(4)) | c1
            words[to + j] = np.int32((np.uint32(words[to + j]) & kept) | np.uint32(byte << shift))
            e0, e1 = v0 - NF4[c0], v1 - NF4[c1]
            columns[_EE + j] = (columns[_EE + j] + e0 * e0) + e1 * e1
            columns[_EV + j] = (columns[_EV + j] + e0 * v0) + e1 * v1
            columns[_VV + j] = (columns[_VV + j] + v0 * v0) + v1 * v1


@compiled
def quantize_band(source, n_first, n_last, first, last, block, packed, absmax, sums, bad, buffers):
    """Quantizes rows n_first .. n_last of a `Source`, blocks first .. last of each, into `packed`, `absmax` and `sums`.

    `sums` is [rows, blocks, SUMS]; `bad` takes the count of NaN and infinite weights, of which `absmax` says nothing.
    """
    block, first, last = U(block), U(first), U(last)
    tile, columns, words = buffers.tile, buffers.columns, buffers.words
    words_per_block = block // _CODES_PER_WORD
    together = max(_TOGETHER // block, U(1))
    count = 0
    n0 = U(n_first)
    while n0 < U(n_last):
        width = min(LANES, U(n_last) - n0)
        if width < LANES:
            tile.bits[:] = np.int16(0)
        for g in range(first, last):
            tile.noted[:] = np.int16(0)
            read_with_magnitudes(source, g * block, block, n0, width, tile, U(0))
            for j in range(LANES):
                columns[_INVERSE + j] = _ONE / max(widened(tile.noted[j]), _LEAST)
            if largest_of(tile.noted) >= INFINITY:
                count += not_finite(tile.bits, block)
            slot = (g - first) % together
            _encode(tile.bits, block, columns, words, slot * words_per_block * LANES)
            for j in range(width):
                absmax[n0 + j, g] = widened(tile.noted[j])
                sums[n0 + j, g, 0] = columns[_EE + j]
                sums[n0 + j, g, 1] = columns[_EV + j]
                sums[n0 + j, g, 2] = columns[_VV + j]
            if slot + U(1) == together or g + U(1) == last:
                write_words(words, n0, width, (g - slot) * words_per_block, (slot + U(1)) * words_per_block, packed)
        n0 += LANES
    bad[0] = count


@compiled
def add_up(values, first, last):
    """The sum in float64, in order."""
    total = 0.0
    for i in range(U(first), U(last)):
        total += np.float64(values[i])
    return total


@part
def _scale_code(value, inverse, table):
    """The code of a scale less the offset; `inverse` is that of the nested scale, `table` the codes of 65,536 steps."""
    v = min(max(value * inverse, -_ONE), _ONE)
    # bitsandbytes' x86 build: a fused multiply-add in float32, which float64 does exactly before it rounds.
    step = np.float32(np.float64((v + _ONE) * _HALF) * _STEPS + 0.5)
    return table[np.int64(step)]


@compiled
def nest(absmax, sums, first, last, offset, nested_block, table, values, codes, nested, result):
    """Quantizes scales first .. last, whole nested blocks, to `codes` and `nested`; their weights' errors into `result`.

    Without double quantization (`nested` is empty) only the errors, with the scales as they are.
    """
    error_sum = 0.0
    power_sum = 0.0
    first, last, nested_block = U(first), U(last), U(nested_block)
    begun = first
    while begun < last:
        end = min(begun + nested_block, last)
        largest, inverse = _ZERO, _ZERO
        double = len(nested) > 0
        if double:
            for i in range(begun, end):
                largest = max(largest, abs(absmax[i] - offset))
            if largest > _ZERO:
                inverse = _ONE / largest
            nested[begun // nested_block] = largest
            flat = largest == _ZERO or inverse == np.inf
        for i in range(begun, end):
            scale = absmax[i]
            if double:
                codes[i] = np.uint8(0) if flat else _scale_code(absmax[i] - offset, inverse, table)
                scale = values[codes[i]] * largest + offset
            unit = np.float64(max(absmax[i], _LEAST))
            ee, ev, vv = np.float64(sums[i, 0]), np.float64(sums[i, 1]), np.float64(sums[i, 2])
            # weight - scale c = unit v - scale c = unit e + (unit - scale) c, and c = v - e.
            off = unit - np.float64(scale)
            error_sum += unit * unit * ee + 2 * unit * off * (ev - ee) + off * off * (vv - 2 * ev + ee)
            power_sum += unit * unit * vv
        begun = end
    result[0] = error_sum
    result[1] = power_sum


@compiled
def dequantize(packed, scales, block, first, result):
    """NF4 value * scale of all codes, in float32 or, if that is what `result` holds, rounded to bf16 bits.

    `packed` begins with weight `first`, which begins a block, of a matrix of flat blocks.
    """
    first, block = U(first), U(block)
    half = block // TWO
    values = np.empty(16, result.dtype)
    b0 = U(0)
    while b0 < U(len(packed)):
        scale = scales[(first + b0 * TWO) // block]
        for code in range(16):
            values[code] = stored(NF4[code] * scale, result)
        for b in range(b0, b0 + half):
            result[b * TWO] = values[packed[b] >> np.uint8(4)]
            result[b * TWO + U(1)] = values[packed[b] & np.uint8(0xF)]
        b0 += half
