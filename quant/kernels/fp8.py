# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Compiled inner loops of the FP8 scheme; `quant/schemes/fp8.py` says what they compute and calls them.

One call quantizes a band: BLOCK neighbouring outputs and all their inputs, which are first read into a buffer of the form
[inputs, BLOCK], so that the source is read once although the scale depends on all of it. Every loop then runs over the
outputs, one vector lane an output, and each sum runs over the inputs in their order, whichever way the source lies:
the bytes and the sums depend neither on the machine's vector width nor on the number of threads.

Errors are summed in units of the scale, where nothing overflows, and multiplied by its square in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.kernels.jit import compiled, part

# Indices are unsigned: a signed one might be negative for all that LLVM knows, and its loop is not vectorized then.
_U = np.uintp
BLOCK = _U(128)  # outputs at a time, and both sides of a block that shares a scale
_TWO, _THREE, _FOUR = _U(2), _U(3), _U(4)  # inputs are read and coded by fours: a word holds four codes
_TOGETHER = BLOCK * _U(4)  # inputs whose words are written together

CHANNEL, BY_BLOCK, TENSOR = range(3)

_BY_16, _BY_32 = np.uint64(16), np.uint64(32)
_LOW_32, _EVEN_16 = np.uint64(0xFFFFFFFF), np.uint64(0x0000FFFF0000FFFF)

_MAGNITUDE = np.int16(0x7FFF)
_INFINITY = 0x7F80  # as bf16 bits: magnitudes from here on are infinite or NaN
_EPSILON = 0x3C00  # 2**-7, bf16's epsilon: compressed-tensors puts it where the scale would be 0
_LARGEST = np.float32(448)  # of e4m3
_LARGEST_BITS = np.uint32(0x43E00000)
_TO_ROUNDER = np.uint32((23 - 3) << 23)  # from a magnitude to the float32 whose last bit is worth e4m3's there
_ROUND_BITS = np.uint32(0x46800000)  # 2**14, the rounder of e4m3's smallest exponent: multiples of 2**-9
_OFFSET = 0x468  # what _code adds to a code: the upper bits of the smallest rounder
_OFFSETS = np.uint32(_OFFSET * 0x01010101 % 2**32)
_TOP = np.uint32(0x80000000)
_TINY, _GROW = np.float32(2**-60), np.float32(2**64)  # see _set_scale

# Where the rows of the per-output float32 buffer begin.
_COLUMN_ROWS = 5
_SCALE, _FACTOR, _INVERSE, _ERROR, _POWER = (_U(row * int(BLOCK)) for row in range(_COLUMN_ROWS))


def scratch(inputs: int) -> tuple[NDArray[Any], ...]:
    """The buffers that one thread lends to `quantize_band`, call after call: 256 bytes an input and 100 KiB."""
    block, four = int(BLOCK), int(_FOUR)
    padded = -(-inputs // four) * four
    return (
        np.empty(padded * block, np.int16),  # tile: the band as it was read, [inputs, BLOCK]
        np.empty((block + four) * block, np.int16),  # rows: before transposing
        np.empty(block, np.int16),  # the largest magnitude of each output
        np.empty(_COLUMN_ROWS * block, np.float32),
        np.empty(int(_TOGETHER) // four * block, np.int32),  # words not yet written
    )


@part
def _widened(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@part
def _to_bf16(value):
    """Bits of a finite float32 rounded to bf16, ties to even."""
    wide = np.float32(value).view(np.uint32)
    return np.uint16((wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def scale_bits(largest):
    """The scale that brings a magnitude to 448, both as bf16 bits."""
    bits = _to_bf16(_widened(largest) / _LARGEST)
    return np.uint16(_EPSILON) if bits == 0 else bits


@part
def _note(maxima, j, b0, b1, b2, b3):
    """The largest magnitude as bf16 bits, NaN above all."""
    b0, b1, b2, b3 = b0 & _MAGNITUDE, b1 & _MAGNITUDE, b2 & _MAGNITUDE, b3 & _MAGNITUDE
    maxima[j] = max(maxima[j], max(max(b0, b1), max(b2, b3)))


@part
def _read_in_out(source, stride, k0, n0, size, width, tile, to, maxima):
    for four in range(size // _FOUR):
        start = (k0 + four * _FOUR) * stride + n0
        at = to + four * _FOUR * BLOCK
        for j in range(width):
            b0 = source[start + j]
            b1 = source[start + stride + j]
            b2 = source[start + stride * _TWO + j]
            b3 = source[start + stride * _THREE + j]
            tile[at + j] = b0
            tile[at + BLOCK + j] = b1
            tile[at + _TWO * BLOCK + j] = b2
            tile[at + _THREE * BLOCK + j] = b3
            _note(maxima, j, b0, b1, b2, b3)
    for r in range(size // _FOUR * _FOUR, size):
        start = (k0 + r) * stride + n0
        for j in range(width):
            b0 = source[start + j]
            tile[to + r * BLOCK + j] = b0
            _note(maxima, j, b0, b0, b0, b0)
    for i in range(size * BLOCK, (size + _THREE) // _FOUR * _FOUR * BLOCK):
        tile[to + i] = np.int16(0)


@part
def _read_out_in(source, stride, k0, n0, size, width, rows, tile, to, maxima):
    """Transposes, four by four in uint64 (halves of 32 bits change places, then of 16).

    The rows are first copied together: in the source they may lie a power of two apart and would share few cache sets.
    """
    pitch = BLOCK + _FOUR
    quads = (size + _THREE) // _FOUR
    for j in range(width):
        start = (n0 + j) * stride + k0
        for r in range(size):
            rows[j * pitch + r] = source[start + r]
        for r in range(size, quads * _FOUR):
            rows[j * pitch + r] = np.int16(0)
    for j in range(width * pitch, (width + _THREE) // _FOUR * _FOUR * pitch):
        rows[j] = np.int16(0)  # of outputs that there are not
    pitch //= _FOUR
    fours = rows.view(np.uint64)
    lanes = tile.view(np.uint64)
    for r in range(quads):
        at = (to + r * _FOUR * BLOCK) // _FOUR
        for j in range((width + _THREE) // _FOUR):
            i = j * _FOUR * pitch + r
            a0, a1, a2, a3 = fours[i], fours[i + pitch], fours[i + _TWO * pitch], fours[i + _THREE * pitch]
            b0 = (a0 & _LOW_32) | (a2 << _BY_32)
            b1 = (a1 & _LOW_32) | (a3 << _BY_32)
            b2 = (a0 >> _BY_32) | (a2 & ~_LOW_32)
            b3 = (a1 >> _BY_32) | (a3 & ~_LOW_32)
            lanes[at + j] = (b0 & _EVEN_16) | ((b1 & _EVEN_16) << _BY_16)
            lanes[at + BLOCK // _FOUR + j] = ((b0 >> _BY_16) & _EVEN_16) | (b1 & ~_EVEN_16)
            lanes[at + BLOCK // _TWO + j] = (b2 & _EVEN_16) | ((b3 & _EVEN_16) << _BY_16)
            lanes[at + BLOCK // _FOUR * _THREE + j] = ((b2 >> _BY_16) & _EVEN_16) | (b3 & ~_EVEN_16)
    for four in range(quads):
        at = to + four * _FOUR * BLOCK
        for j in range(BLOCK):
            b0, b1 = tile[at + j], tile[at + BLOCK + j]
            _note(maxima, j, b0, b1, tile[at + _TWO * BLOCK + j], tile[at + _THREE * BLOCK + j])


@part
def _largest(maxima):
    largest = np.int16(0)
    for j in range(BLOCK):
        largest = max(largest, maxima[j])
    return largest


@compiled
def largest_magnitude(source, stride, first, last, columns):
    """Largest magnitude in rows first .. last as bf16 bits, and how many of them are NaN or infinite."""
    stride, columns = _U(stride), _U(columns)
    maxima = np.zeros(BLOCK, np.int16)
    for row in range(_U(first), _U(last)):
        start = row * stride
        for chunk in range(columns // BLOCK):
            at = start + chunk * BLOCK
            for j in range(BLOCK):
                maxima[j] = max(maxima[j], source[at + j] & _MAGNITUDE)
        for j in range(columns % BLOCK):
            maxima[j] = max(maxima[j], source[start + columns // BLOCK * BLOCK + j] & _MAGNITUDE)
    largest = _largest(maxima)
    bad = 0
    if largest >= _INFINITY:
        for row in range(_U(first), _U(last)):
            for j in range(columns):
                bad += (source[row * stride + j] & _MAGNITUDE) >= _INFINITY
    return largest, bad


@part
def _in_bf16(quotient):
    """Rounded to bf16; adding 0 takes the sign off a zero, as compressed-tensors' adding of its zero point does.

    The quotient came from a multiplication with the inverse, right to 2**-22 of it; yet it rounds as the exact one does:
    numbers of 8 significant bits never have a quotient on the midpoint of two bf16 (its 9 bits would have to divide 8),
    and so it lies at least 2**-17 away from one.
    """
    bits = (np.float32(quotient).view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)
    return np.uint32(bits).view(np.float32) + np.float32(0)


@part
def _magnitude(value):
    bits = min(np.float32(value).view(np.uint32) & np.uint32(0x7FFFFFFF), _LARGEST_BITS)
    return np.uint32(bits).view(np.float32)


@part
def _rounder(magnitude):
    """What rounds a magnitude to e4m3, ties to even, when added: its last bit is worth e4m3's at that magnitude."""
    power = np.float32(magnitude).view(np.uint32) & np.uint32(0x7F800000)
    return np.uint32(max(power + _TO_ROUNDER, _ROUND_BITS)).view(np.float32)


@part
def _code(total, rounder):
    """The code of total - rounder, plus _OFFSET: the exponent is the rounder's, what was added counts mantissas."""
    bits = np.float32(rounder).view(np.uint32)
    return np.uint32((bits >> np.uint32(20)) + (np.float32(total).view(np.uint32) - bits))


@part
def _sign(value, mask):
    return np.float32(value).view(np.uint32) & mask


@part
def _encode(tile, to, fours, columns, words, w0):
    """Codes of weight / scale, four inputs to a word, the first lowest; squared error and power of each output."""
    for j in range(BLOCK):
        columns[_ERROR + j] = np.float32(0)
        columns[_POWER + j] = np.float32(0)
    for four in range(fours):
        r0 = to + four * _FOUR * BLOCK
        for j in range(BLOCK):
            factor = columns[_FACTOR + j]
            inverse = columns[_INVERSE + j]
            q0 = _widened(tile[r0 + j]) * factor * inverse
            q1 = _widened(tile[r0 + BLOCK + j]) * factor * inverse
            q2 = _widened(tile[r0 + _TWO * BLOCK + j]) * factor * inverse
            q3 = _widened(tile[r0 + _THREE * BLOCK + j]) * factor * inverse
            h0, h1, h2, h3 = _in_bf16(q0), _in_bf16(q1), _in_bf16(q2), _in_bf16(q3)
            m0, m1, m2, m3 = _magnitude(h0), _magnitude(h1), _magnitude(h2), _magnitude(h3)
            r_0, r_1, r_2, r_3 = _rounder(m0), _rounder(m1), _rounder(m2), _rounder(m3)
            t0, t1, t2, t3 = m0 + r_0, m1 + r_1, m2 + r_2, m3 + r_3
            low = _code(t0, r_0) + (_code(t1, r_1) << np.uint32(8))
            high = (_code(t2, r_2) << np.uint32(16)) + (_code(t3, r_3) << np.uint32(24))
            sign_low = (_sign(h0, _TOP) >> np.uint32(24)) | (_sign(h1, _TOP) >> np.uint32(16))
            sign_high = (_sign(h2, _TOP) >> np.uint32(8)) | _sign(h3, _TOP)
            words[w0 + four * BLOCK + j] = np.int32(np.uint32(low + high - _OFFSETS) | (sign_low | sign_high))
            d0, d1, d2, d3 = abs(q0) - (t0 - r_0), abs(q1) - (t1 - r_1), abs(q2) - (t2 - r_2), abs(q3) - (t3 - r_3)
            columns[_ERROR + j] = (((columns[_ERROR + j] + d0 * d0) + d1 * d1) + d2 * d2) + d3 * d3
            columns[_POWER + j] = (((columns[_POWER + j] + q0 * q0) + q1 * q1) + q2 * q2) + q3 * q3


@part
def _set_scale(columns, j, bits):
    """The scale, and what weights are multiplied with; a tiny scale has an inverse only once weights and scale have grown."""
    scale = _widened(bits)
    factor = _GROW if scale < _TINY else np.float32(1)
    columns[_SCALE + j] = scale
    columns[_FACTOR + j] = factor
    columns[_INVERSE + j] = np.float32(1) / (scale * factor)


@part
def _write(words, n0, width, first, count, packed):
    """Transposes words into the outputs: some together, as each output's row is another page."""
    for j in range(width):
        for w in range(count):
            packed[n0 + j, first + w] = words[w * BLOCK + j]


@compiled
def quantize_band(
    source, stride, in_out, n0, width, inputs, granularity, given, packed, scales, sums, tile, rows, maxima, columns, words
):  # fmt: skip
    """Quantizes outputs n0 .. n0+width into `packed` (four codes a word) and `scales`, the sums into `sums`.

    `given` is the scale's bits for TENSOR. `sums` takes squared error, squared sum and the count of NaN and infinite weights.
    """
    stride, n0, width, inputs = _U(stride), _U(n0), _U(width), _U(inputs)
    by_block = granularity == BY_BLOCK
    chunks = (inputs + BLOCK - _U(1)) // BLOCK
    largest = np.int16(0)
    if width < BLOCK:
        tile[:] = np.int16(0)
    maxima[:] = np.int16(0)
    for c in range(chunks):
        k0 = c * BLOCK
        size = min(BLOCK, inputs - k0)
        if in_out:
            _read_in_out(source, stride, k0, n0, size, width, tile, k0 * BLOCK, maxima)
        else:
            _read_out_in(source, stride, k0, n0, size, width, rows, tile, k0 * BLOCK, maxima)
        if by_block:
            of_block = _largest(maxima)
            largest = max(largest, of_block)
            maxima[:] = np.int16(0)
            if largest < _INFINITY:
                scales[n0 // BLOCK, c] = scale_bits(of_block)
    largest = max(largest, _largest(maxima))
    if largest >= _INFINITY:
        bad = 0
        for i in range((inputs + _THREE) // _FOUR * _FOUR * BLOCK):
            bad += (tile[i] & _MAGNITUDE) >= _INFINITY
        sums[2] = bad
        return
    if granularity == CHANNEL:
        for j in range(BLOCK):
            _set_scale(columns, j, scale_bits(maxima[j]))
        for j in range(width):
            scales[n0 + j, 0] = scale_bits(maxima[j])
    elif granularity == TENSOR:
        for j in range(BLOCK):
            _set_scale(columns, j, given)
    error_sum = 0.0
    power_sum = 0.0
    for c in range(chunks):
        k0 = c * BLOCK
        fours = (min(BLOCK, inputs - k0) + _THREE) // _FOUR
        if by_block:
            for j in range(BLOCK):
                _set_scale(columns, j, scales[n0 // BLOCK, c])
        begun = k0 // _TOGETHER * _TOGETHER
        _encode(tile, k0 * BLOCK, fours, columns, words, (k0 - begun) // _FOUR * BLOCK)
        for j in range(BLOCK):
            square = np.float64(columns[_SCALE + j]) * np.float64(columns[_SCALE + j])
            error_sum += np.float64(columns[_ERROR + j]) * square
            power_sum += np.float64(columns[_POWER + j]) * square
        if c + _U(1) == chunks or (k0 + BLOCK) % _TOGETHER == _U(0):
            _write(words, n0, width, begun // _FOUR, (k0 - begun) // _FOUR + fours, packed)
    sums[0] = error_sum
    sums[1] = power_sum
    sums[2] = 0


@compiled
def dequantize_f32(codes, scales, n0, per_scale, values, result):
    """scale * code, exact, for all rows; the first is row n0 of its blocks of BLOCK outputs if scales are by block."""
    for n in range(codes.shape[0]):
        of_row = scales[min((n0 + n) // per_scale, scales.shape[0] - 1)]
        for g in range(_U(scales.shape[1])):
            scale = _widened(of_row[g])
            first = g * BLOCK
            last = _U(codes.shape[1]) if g + _U(1) == _U(scales.shape[1]) else first + BLOCK
            for k in range(first, last):
                result[n, k] = scale * values[codes[n, k]]


@compiled
def dequantize_bf16(codes, scales, n0, per_scale, values, result):
    """scale * code rounded to bf16."""
    for n in range(codes.shape[0]):
        of_row = scales[min((n0 + n) // per_scale, scales.shape[0] - 1)]
        for g in range(_U(scales.shape[1])):
            scale = _widened(of_row[g])
            first = g * BLOCK
            last = _U(codes.shape[1]) if g + _U(1) == _U(scales.shape[1]) else first + BLOCK
            for k in range(first, last):
                result[n, k] = _to_bf16(scale * values[codes[n, k]])
