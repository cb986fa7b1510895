# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Compiled inner loops of the FP8 scheme; `quant/schemes/fp8.py` says what they compute and calls them.

One call quantizes a band: LANES neighbouring outputs and all their inputs, which are first read into one tile, so that the
source is read once although the scale depends on all of it.

Errors are summed in units of the scale, where nothing overflows, and multiplied by its square in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quant.kernels import e4m3, fp8_search
from quant.kernels.bf16 import INFINITY, MAGNITUDE, scale_of, stored, widened
from quant.kernels.jit import compiled, part
from quant.kernels.tiles import (
    FOUR,
    LANES,
    THREE,
    TWO,
    Tile,
    U,
    empty_tile,
    largest_of,
    not_finite,
    read_with_magnitudes,
    write_words,
)

BLOCK = LANES  # outputs and inputs of a block that shares a scale
_TOGETHER = BLOCK * FOUR  # inputs whose words of four codes are written together

CHANNEL, BY_BLOCK, TENSOR = range(3)

_OFFSETS = np.uint32(e4m3.OFFSET * 0x01010101 % 2**32)
_TINY, _GROW = np.float32(2**-60), np.float32(2**64)  # see _set_scale
# What to add to a quotient's bits before it is rounded to e4m3, and which of them to keep then: those of bf16, or all.
_IN_BF16 = np.uint32(0x8000), np.uint32(0xFFFF0000)
_AS_IT_IS = np.uint32(0), np.uint32(0xFFFFFFFF)

# Where the rows of `Buffers.columns` begin.
_ROWS = 5
_SCALE, _FACTOR, _INVERSE, _ERROR, _POWER = (U(row * int(LANES)) for row in range(_ROWS))


class Buffers(NamedTuple):
    """What one thread lends to `quantize_band`, call after call: 256 bytes an input and 650 KiB."""

    tile: Tile
    columns: NDArray[np.float32]  # numbers of each output
    scales: NDArray[np.uint16]  # [LANES]
    words: NDArray[np.int32]  # words not yet written, [words, LANES]
    search: fp8_search.Buffers


def buffers(inputs: int) -> Buffers:
    lanes, four = int(LANES), int(FOUR)
    return Buffers(
        empty_tile(-(-inputs // four) * four, int(BLOCK)),
        np.empty(_ROWS * lanes, np.float32),
        np.empty(lanes, np.uint16),
        np.empty(int(_TOGETHER) // four * lanes, np.int32),
        fp8_search.buffers(),
    )


@compiled
def scale_bits(largest):
    """The scale that brings a magnitude to 448, both as bf16 bits."""
    return scale_of(largest, e4m3.LARGEST)


@compiled
def largest_magnitude(source, first, last, columns):
    """Largest magnitude in rows first .. last of a `Source` as bf16 bits, and how many of them are NaN or infinite."""
    bits, stride, columns = source.bits, U(source.stride), U(columns)
    maxima = np.zeros(LANES, np.int16)
    for row in range(U(first), U(last)):
        start = row * stride
        for chunk in range(columns // LANES):
            at = start + chunk * LANES
            for j in range(LANES):
                maxima[j] = max(maxima[j], bits[at + j] & MAGNITUDE)
        for j in range(columns % LANES):
            maxima[j] = max(maxima[j], bits[start + columns // LANES * LANES + j] & MAGNITUDE)
    largest = largest_of(maxima)
    bad = 0
    if largest >= INFINITY:
        for row in range(U(first), U(last)):
            for j in range(columns):
                bad += (bits[row * stride + j] & MAGNITUDE) >= INFINITY
    return largest, bad


@part
def _significant(quotient, add, keep):
    """The quotient, rounded to bf16 or as it is, and without the sign of a zero.

    Adding 0 takes that sign away, as compressed-tensors' adding of its zero point does.

    To bf16: the quotient came from a multiplication with the inverse, right to 2**-22 of it; yet it rounds as the exact one does:
    numbers of 8 significant bits never have a quotient on the midpoint of two bf16 (its 9 bits would have to divide 8),
    and so it lies at least 2**-17 away from one.
    """
    bits = (np.float32(quotient).view(np.uint32) + add) & keep
    return np.uint32(bits).view(np.float32) + np.float32(0)


@part
def _encode(tile, to, fours, columns, add, keep, words, w0):
    """Codes of weight / scale, four inputs to a word, the first lowest; squared error and power of each output.

    `add` and `keep`: _IN_BF16 or _AS_IT_IS.
    """
    for j in range(LANES):
        columns[_ERROR + j] = np.float32(0)
        columns[_POWER + j] = np.float32(0)
    for four in range(fours):
        r0 = to + four * FOUR * LANES
        for j in range(LANES):
            factor = columns[_FACTOR + j]
            inverse = columns[_INVERSE + j]
            q0 = widened(tile[r0 + j]) * factor * inverse
            q1 = widened(tile[r0 + LANES + j]) * factor * inverse
            q2 = widened(tile[r0 + TWO * LANES + j]) * factor * inverse
            q3 = widened(tile[r0 + THREE * LANES + j]) * factor * inverse
            h0, h1 = _significant(q0, add, keep), _significant(q1, add, keep)
            h2, h3 = _significant(q2, add, keep), _significant(q3, add, keep)
            m0, m1, m2, m3 = e4m3.magnitude(h0), e4m3.magnitude(h1), e4m3.magnitude(h2), e4m3.magnitude(h3)
            r_0, r_1, r_2, r_3 = e4m3.rounder(m0), e4m3.rounder(m1), e4m3.rounder(m2), e4m3.rounder(m3)
            t0, t1, t2, t3 = m0 + r_0, m1 + r_1, m2 + r_2, m3 + r_3
            low = e4m3.code(t0, r_0) + (e4m3.code(t1, r_1) << np.uint32(8))
            high = (e4m3.code(t2, r_2) << np.uint32(16)) + (e4m3.code(t3, r_3) << np.uint32(24))
            sign_low = (e4m3.sign(h0) >> np.uint32(24)) | (e4m3.sign(h1) >> np.uint32(16))
            sign_high = (e4m3.sign(h2) >> np.uint32(8)) | e4m3.sign(h3)
            words[w0 + four * LANES + j] = np.int32(np.uint32(low + high - _OFFSETS) | (sign_low | sign_high))
            d0, d1, d2, d3 = abs(q0) - (t0 - r_0), abs(q1) - (t1 - r_1), abs(q2) - (t2 - r_2), abs(q3) - (t3 - r_3)
            columns[_ERROR + j] = (((columns[_ERROR + j] + d0 * d0) + d1 * d1) + d2 * d2) + d3 * d3
            columns[_POWER + j] = (((columns[_POWER + j] + q0 * q0) + q1 * q1) + q2 * q2) + q3 * q3


@part
def _set_scale(columns, j, bits):
    """The scale, and what weights are multiplied with; a tiny scale has an inverse only once weights and scale have grown."""
    scale = widened(bits)
    factor = _GROW if scale < _TINY else np.float32(1)
    columns[_SCALE + j] = scale
    columns[_FACTOR + j] = factor
    columns[_INVERSE + j] = np.float32(1) / (scale * factor)


@compiled
def quantize_band(source, n0, width, inputs, granularity, search, given, packed, scales, sums, buffers):
    """Quantizes outputs n0 .. n0+width of a `Source` into `packed` (four codes a word) and `scales`, the sums into `sums`.

    `given` is the scale's bits for TENSOR, that of a search where there is one. `sums` takes squared error, squared sum and
    the count of NaN and infinite weights.
    """
    n0, width, inputs = U(n0), U(width), U(inputs)
    tile, columns, bits_of_scales, words = buffers.tile, buffers.columns, buffers.scales, buffers.words
    by_block = granularity == BY_BLOCK
    chunks = (inputs + BLOCK - U(1)) // BLOCK
    largest = np.int16(0)
    if width < LANES:
        tile.bits[:] = np.int16(0)
    tile.noted[:] = np.int16(0)
    for c in range(chunks):
        k0 = c * BLOCK
        size = min(BLOCK, inputs - k0)
        read_with_magnitudes(source, k0, size, n0, width, tile, k0 * LANES)
        if by_block:
            largest_of_block = largest_of(tile.noted)
            largest = max(largest, largest_of_block)
            tile.noted[:] = np.int16(0)
            if largest < INFINITY:
                bits = scale_bits(largest_of_block)
                if search:
                    bits = fp8_search.search_block(tile.bits, k0 * LANES, size, bits, buffers.search)
                scales[n0 // BLOCK, c] = bits
    largest = max(largest, largest_of(tile.noted))
    if largest >= INFINITY:
        sums[2] = not_finite(tile.bits, (inputs + THREE) // FOUR * FOUR)
        return
    bits_of_scales[:] = given
    if granularity == CHANNEL:
        for j in range(LANES):
            bits_of_scales[j] = scale_bits(tile.noted[j])
        if search:
            fp8_search.search_outputs(tile.bits, inputs, bits_of_scales, buffers.search)
        for j in range(width):
            scales[n0 + j, 0] = bits_of_scales[j]
    for j in range(LANES):
        _set_scale(columns, j, bits_of_scales[j])
    add, keep = _AS_IT_IS if search else _IN_BF16
    error_sum = 0.0
    power_sum = 0.0
    for c in range(chunks):
        k0 = c * BLOCK
        fours = (min(BLOCK, inputs - k0) + THREE) // FOUR
        if by_block:
            for j in range(LANES):
                _set_scale(columns, j, scales[n0 // BLOCK, c])
        begun = k0 // _TOGETHER * _TOGETHER
        _encode(tile.bits, k0 * LANES, fours, columns, add, keep, words, (k0 - begun) // FOUR * LANES)
        for j in range(LANES):
            square = np.float64(columns[_SCALE + j]) * np.float64(columns[_SCALE + j])
            error_sum += np.float64(columns[_ERROR + j]) * square
            power_sum += np.float64(columns[_POWER + j]) * square
        if c + U(1) == chunks or (k0 + BLOCK) % _TOGETHER == U(0):
            write_words(words, n0, width, begun // FOUR, (k0 - begun) // FOUR + fours, packed)
    sums[0] = error_sum
    sums[1] = power_sum
    sums[2] = 0


@compiled
def dequantize(codes, scales, n0, per_scale, values, result):
    """scale * values[code] of all rows, exact in float32 or, if that is what `result` holds, rounded to bf16 bits.

    `per_scale` outputs share a scale; row 0 is output n0 of the matrix whose scales these are.
    """
    for n in range(codes.shape[0]):
        row_scales = scales[min((n0 + n) // per_scale, scales.shape[0] - 1)]
        for g in range(U(scales.shape[1])):
            scale = widened(row_scales[g])
            first = g * BLOCK
            last = U(codes.shape[1]) if g + U(1) == U(scales.shape[1]) else first + BLOCK
            for k in range(first, last):
                result[n, k] = stored(scale * values[codes[n, k]], result)
