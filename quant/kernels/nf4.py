# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Compiled inner loops of the NF4 scheme; `quant/schemes/nf4.py` says what they compute and calls them.

A matrix is seen as rows of whole blocks. One call quantizes a band: some rows, LANES of them at a time, and some of their
blocks. Each block is first brought into the form [weights, LANES]; every loop below then runs over the rows, one vector
lane a row, and each sum runs over the weights in their order. So nothing is reassociated, and the bytes depend neither
on the machine's vector width nor on the number of threads.

The error is known only when the scales have been quantized too, which needs the mean of all of them. So a band leaves
three sums a block, and `nest` makes the errors from these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.kernels.jit import compiled, part

# Indices are unsigned: a signed one might be negative for all that LLVM knows, and its loop is not vectorized then.
_U = np.uintp
LANES = _U(128)  # rows at a time
_TWO, _THREE, _FOUR = _U(2), _U(3), _U(4)  # weights are read by fours
_CODES = _U(8)  # codes of 4 bits in a word
_TOGETHER = _U(512)  # weights of a row whose words are written together

_BY_16, _BY_32 = np.uint64(16), np.uint64(32)
_LOW_32, _EVEN_16 = np.uint64(0xFFFFFFFF), np.uint64(0x0000FFFF0000FFFF)

_MAGNITUDE = np.int16(0x7FFF)
_INFINITY = 0x7F80  # as bf16 bits: magnitudes from here on are infinite or NaN
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

# Where the rows of the per-lane float32 buffer begin.
_COLUMN_ROWS = 4
_INVERSE, _EE, _EV, _VV = (_U(row * int(LANES)) for row in range(_COLUMN_ROWS))
SUMS = 3  # a block's sums of e^2, e v and v^2, v being weight / scale and e = v - its NF4 value


def scratch(block: int) -> tuple[NDArray[Any], ...]:
    """The buffers that one thread lends to `quantize_band`, call after call: 80 KiB at blocks of 64, 2.2 MiB at 4,096."""
    lanes, together = int(LANES), max(int(_TOGETHER), block)
    return (
        np.empty(block * lanes, np.int16),  # tile: the block as it was read, [block, LANES]
        np.empty((block + int(_FOUR)) * lanes, np.int16),  # rows: before transposing
        np.empty(lanes, np.int16),  # the largest magnitude of each row
        np.empty(_COLUMN_ROWS * lanes, np.float32),
        np.empty(together // int(_CODES) * lanes, np.int32),  # words not yet written
    )


@part
def _widened(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@part
def _to_bf16(value):
    """Bits of a finite float32 rounded to bf16, ties to even."""
    wide = np.float32(value).view(np.uint32)
    return np.uint16((wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@part
def _note(maxima, j, b0, b1, b2, b3):
    """The largest magnitude as bf16 bits, NaN above all."""
    b0, b1, b2, b3 = b0 & _MAGNITUDE, b1 & _MAGNITUDE, b2 & _MAGNITUDE, b3 & _MAGNITUDE
    maxima[j] = max(maxima[j], max(max(b0, b1), max(b2, b3)))


@part
def _read_in_out(source, stride, k0, n0, block, width, tile, maxima):
    for four in range(block // _FOUR):
        start = (k0 + four * _FOUR) * stride + n0
        at = four * _FOUR * LANES
        for j in range(width):
            b0 = source[start + j]
            b1 = source[start + stride + j]
            b2 = source[start + stride * _TWO + j]
            b3 = source[start + stride * _THREE + j]
            tile[at + j] = b0
            tile[at + LANES + j] = b1
            tile[at + _TWO * LANES + j] = b2
            tile[at + _THREE * LANES + j] = b3
            _note(maxima, j, b0, b1, b2, b3)


@part
def _read_out_in(source, stride, k0, n0, block, width, rows, tile, maxima):
    """Transposes, four by four in uint64 (halves of 32 bits change places, then of 16).

    The rows are first copied together: in the source they may lie a power of two apart and would share few cache sets.
    """
    pitch = block + _FOUR
    for j in range(width):
        start = (n0 + j) * stride + k0
        for r in range(block):
            rows[j * pitch + r] = source[start + r]
    for j in range(width * pitch, (width + _THREE) // _FOUR * _FOUR * pitch):
        rows[j] = np.int16(0)  # of rows that there are not
    pitch //= _FOUR
    fours = rows.view(np.uint64)
    lanes = tile.view(np.uint64)
    for r in range(block // _FOUR):
        at = r * LANES
        for j in range((width + _THREE) // _FOUR):
            i = j * _FOUR * pitch + r
            a0, a1, a2, a3 = fours[i], fours[i + pitch], fours[i + _TWO * pitch], fours[i + _THREE * pitch]
            b0 = (a0 & _LOW_32) | (a2 << _BY_32)
            b1 = (a1 & _LOW_32) | (a3 << _BY_32)
            b2 = (a0 >> _BY_32) | (a2 & ~_LOW_32)
            b3 = (a1 >> _BY_32) | (a3 & ~_LOW_32)
            lanes[at + j] = (b0 & _EVEN_16) | ((b1 & _EVEN_16) << _BY_16)
            lanes[at + LANES // _FOUR + j] = ((b0 >> _BY_16) & _EVEN_16) | (b1 & ~_EVEN_16)
            lanes[at + LANES // _TWO + j] = (b2 & _EVEN_16) | ((b3 & _EVEN_16) << _BY_16)
            lanes[at + LANES // _FOUR * _THREE + j] = ((b2 >> _BY_16) & _EVEN_16) | (b3 & ~_EVEN_16)
    for four in range(block // _FOUR):
        at = four * _FOUR * LANES
        for j in range(LANES):
            b0, b1 = tile[at + j], tile[at + LANES + j]
            _note(maxima, j, b0, b1, tile[at + _TWO * LANES + j], tile[at + _THREE * LANES + j])


@part
def _not_finite(tile, block):
    count = 0
    for i in range(block * LANES):
        count += (tile[i] & _MAGNITUDE) >= _INFINITY
    return count


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
    for two in range(block // _TWO):
        r0 = two * _TWO * LANES
        to = w0 + (two >> _U(2)) * LANES
        shift = np.uint32((two & _U(3)) << _U(3))
        kept = np.uint32(0) if shift == 0 else np.uint32(0xFFFFFFFF)  # the first byte starts a word afresh
        for j in range(LANES):
            inverse = columns[_INVERSE + j]
            v0 = _widened(tile[r0 + j]) * inverse
            v1 = _widened(tile[r0 + LANES + j]) * inverse
            c0, c1 = _code(v0), _code(v1)
            byte = np.uint32(c0 << np.uint32(4)) | c1
            words[to + j] = np.int32((np.uint32(words[to + j]) & kept) | np.uint32(byte << shift))
            e0, e1 = v0 - NF4[c0], v1 - NF4[c1]
            columns[_EE + j] = (columns[_EE + j] + e0 * e0) + e1 * e1
            columns[_EV + j] = (columns[_EV + j] + e0 * v0) + e1 * v1
            columns[_VV + j] = (columns[_VV + j] + v0 * v0) + v1 * v1


@part
def _write(words, n0, width, first, count, packed):
    """Transposes words into the rows: some together, as each row may be another page."""
    for j in range(width):
        for w in range(count):
            packed[n0 + j, first + w] = words[w * LANES + j]


@compiled
def quantize_band(
    source, stride, in_out, n_first, n_last, first, last, block, packed, absmax, sums, bad, tile, rows, maxima, columns, words
):  # fmt: skip
    """Quantizes rows n_first .. n_last and blocks first .. last of each into `packed`, `absmax` and `sums`.

    `sums` is [rows, blocks, SUMS]; `bad` takes the count of NaN and infinite weights, of which `absmax` says nothing.
    """
    stride, block, first, last = _U(stride), _U(block), _U(first), _U(last)
    per_block = block // _CODES
    together = max(_TOGETHER // block, _U(1))
    count = 0
    n0 = _U(n_first)
    while n0 < _U(n_last):
        width = min(LANES, _U(n_last) - n0)
        if width < LANES:
            tile[:] = np.int16(0)
        for g in range(first, last):
            maxima[:] = np.int16(0)
            if in_out:
                _read_in_out(source, stride, g * block, n0, block, width, tile, maxima)
            else:
                _read_out_in(source, stride, g * block, n0, block, width, rows, tile, maxima)
            largest = np.int16(0)
            for j in range(LANES):
                largest = max(largest, maxima[j])
                columns[_INVERSE + j] = _ONE / max(_widened(maxima[j]), _LEAST)
            if largest >= _INFINITY:
                count += _not_finite(tile, block)
            slot = (g - first) % together
            _encode(tile, block, columns, words, slot * per_block * LANES)
            for j in range(width):
                absmax[n0 + j, g] = _widened(maxima[j])
                sums[n0 + j, g, 0] = columns[_EE + j]
                sums[n0 + j, g, 1] = columns[_EV + j]
                sums[n0 + j, g, 2] = columns[_VV + j]
            if slot + _U(1) == together or g + _U(1) == last:
                _write(words, n0, width, (g - slot) * per_block, (slot + _U(1)) * per_block, packed)
        n0 += LANES
    bad[0] = count


@compiled
def add_up(values, first, last):
    """The sum in float64, in order."""
    total = 0.0
    for i in range(_U(first), _U(last)):
        total += np.float64(values[i])
    return total


@part
def _scale_code(value, inverse, table):
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
    first, last, nested_block = _U(first), _U(last), _U(nested_block)
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
def dequantize_f32(packed, scales, block, first, result):
    """NF4 value * scale, for all of `packed`, whose first weight is number `first` of a matrix of flat blocks."""
    first, block = _U(first), _U(block)
    for b in range(_U(len(packed))):
        at = b * _U(2)
        scale = scales[(first + at) // block]
        result[at] = NF4[packed[b] >> np.uint8(4)] * scale
        result[at + _U(1)] = NF4[packed[b] & np.uint8(0xF)] * scale


@compiled
def dequantize_bf16(packed, scales, block, first, result):
    """The same, rounded to bf16."""
    first, block = _U(first), _U(block)
    half = block // _TWO
    made = np.empty(16, np.uint16)
    b0 = _U(0)
    while b0 < _U(len(packed)):
        scale = scales[(first + b0 * _U(2)) // block]
        for code in range(16):
            made[code] = _to_bf16(NF4[code] * scale)
        for b in range(b0, b0 + half):
            result[b * _U(2)] = made[packed[b] >> np.uint8(4)]
            result[b * _U(2) + _U(1)] = made[packed[b] & np.uint8(0xF)]
        b0 += half
