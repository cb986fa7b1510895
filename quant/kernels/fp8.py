# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Compiled inner loops of the FP8 scheme; `quant/schemes/fp8.py` says what they compute and calls them.

One call quantizes a band: BLOCK neighbouring outputs and all their inputs, which are first read into a buffer of the form
[inputs, BLOCK], so that the source is read once although the scale depends on all of it. Every loop then runs over the
outputs, one vector lane an output, and each sum runs over the inputs in their order, whichever way the source lies:
the bytes and the sums depend neither on the machine's vector width nor on the number of threads.

Errors are summed in units of the scale, where nothing overflows, and multiplied by its square in float64.

A search knows the error of every scale of an octave from one pass over the weights. Weights and scales are bf16, and e4m3
steps by octaves: how far a weight is from the nearest scale * number depends on the 7 bits of either's mantissa alone, times
the power of two of the weight. So weights are counted by their bits, the squares of their powers of two are summed by mantissas
(128 integers, exact in any order), and the error of a scale is the sum of these times its column of a table (`ERRORS`), in
float64 in the order of the mantissas.
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
# What to add to a quotient's bits before it is rounded to e4m3, and which of them to keep then: those of bf16, or all.
_IN_BF16 = np.uint32(0x8000), np.uint32(0xFFFF0000)
_AS_IT_IS = np.uint32(0), np.uint32(0xFFFFFFFF)

MANTISSAS = _U(128)  # of bf16
# A search tries plain's scale alone outside: below, subnormal weights would count; above, they reach 2**127, and a scale that
# rounds the largest up might make it infinite.
SMALLEST_SEARCHED, LARGEST_SEARCHED = 0x0280, 0x7A91
# Weights that are smaller than 2**-4 times the power of two of plain's scale count as nothing, as their steps do not go by
# octaves. Under no scale of the octave does the error of one of them exceed SMALL_ERROR, in the units of ERRORS by powers.
LOWEST, SMALL_ERROR = -4, 2.0**14
HIGHEST = 9  # no weight exceeds 464 scales
_COUNTERS = _U(1 << 15) + _U(
    16
)  # a counter for each magnitude; the four sets do not begin at the same lines of the cache


def _errors() -> NDArray[np.float64]:
    """Squared error by the mantissas of weight and scale [128, 128], in units of (2**-11 of the weight's power of two)**2.

    All of them are integers below 2**16. Powers are in that of the smallest exponent that counts, squared.
    """
    weight = np.arange(128.0, 256)[:, None]
    scale = np.arange(128.0, 256)
    step = np.where(weight < scale, 1 / 16, 1 / 8)  # e4m3's at weight / scale, which is 1/2 .. 2
    rest = weight - scale * step * np.rint(weight / (scale * step))
    found: NDArray[np.float64] = np.square(rest * 16)
    return found


ERRORS = _errors()

# Where the rows of the per-output float32 buffer begin.
_COLUMN_ROWS = 5
_SCALE, _FACTOR, _INVERSE, _ERROR, _POWER = (_U(row * int(BLOCK)) for row in range(_COLUMN_ROWS))


def counters() -> NDArray[np.int32]:
    """How often each magnitude was seen, four times: a buffer of 512 KiB."""
    return np.empty(int(_FOUR * _COUNTERS), np.int32)


def scratch(inputs: int) -> tuple[NDArray[Any], ...]:
    """The buffers that one thread lends to `quantize_band`, call after call: 256 bytes an input and 650 KiB."""
    block, four = int(BLOCK), int(_FOUR)
    padded = -(-inputs // four) * four
    return (
        np.empty(padded * block, np.int16),  # tile: the band as it was read, [inputs, BLOCK]
        np.empty((block + four) * block, np.int16),  # rows: before transposing
        np.empty(block, np.int16),  # the largest magnitude of each output
        np.empty(_COLUMN_ROWS * block, np.float32),
        counters(),
        np.empty(int(MANTISSAS), np.int64),  # sums of powers by mantissas
        np.empty(int(MANTISSAS), np.float64),  # the errors of scales
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
def _significant(quotient, add, keep):
    """Rounded to bf16 or as it is; adding 0 takes the sign off a zero, as compressed-tensors' adding of its zero point does.

    To bf16: the quotient came from a multiplication with the inverse, right to 2**-22 of it; yet it rounds as the exact one does:
    numbers of 8 significant bits never have a quotient on the midpoint of two bf16 (its 9 bits would have to divide 8),
    and so it lies at least 2**-17 away from one.
    """
    bits = (np.float32(quotient).view(np.uint32) + add) & keep
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
def _encode(tile, to, fours, columns, add, keep, words, w0):
    """Codes of weight / scale, four inputs to a word, the first lowest; squared error and power of each output.

    `add` and `keep`: _IN_BF16 or _AS_IT_IS.
    """
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
            h0, h1 = _significant(q0, add, keep), _significant(q1, add, keep)
            h2, h3 = _significant(q2, add, keep), _significant(q3, add, keep)
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


@part
def _searched(plain):
    return SMALLEST_SEARCHED <= plain <= LARGEST_SEARCHED


@part
def _first_counter(plain):
    """Of the smallest weights that count under a scale that is searched."""
    return (_U(plain) // MANTISSAS - _U(-LOWEST)) * MANTISSAS


@part
def _clear(counts, number, plain):
    """Those counters of a set that `_add_powers` will read."""
    if _searched(plain):
        first = number * _COUNTERS + _first_counter(plain)
        counts[first : first + _U(HIGHEST - LOWEST + 1) * MANTISSAS] = 0


@part
def _count(bits, start, step, times, counts):
    """Counts magnitudes at `start`, `start` + `step` and so on, and three after each: a set of counters for each of the four."""
    for i in range(times):
        at = start + i * step
        counts[_U(bits[at] & _MAGNITUDE)] += np.int32(1)
        counts[_COUNTERS + _U(bits[at + _U(1)] & _MAGNITUDE)] += np.int32(1)
        counts[_TWO * _COUNTERS + _U(bits[at + _TWO] & _MAGNITUDE)] += np.int32(1)
        counts[_THREE * _COUNTERS + _U(bits[at + _THREE] & _MAGNITUDE)] += np.int32(1)


@part
def _add_powers(counts, number, plain, powers):
    """Adds what a set has counted: 4**exponent of each weight to the sum of its mantissa."""
    if _searched(plain):
        first = number * _COUNTERS + _first_counter(plain)
        for exponent in range(_U(HIGHEST - LOWEST + 1)):
            power = np.int64(1) << np.int64(_TWO * exponent)
            for m in range(MANTISSAS):
                powers[m] += np.int64(counts[first + exponent * MANTISSAS + m]) * power


@part
def _best_scale(powers, plain, count, errors):
    """Bits of the scale of the least error in the octave from plain's, of equal ones the lowest; `count` weights share it.

    Plain's unless the gain is larger than all that weights which do not count could take from it.
    """
    plain = np.int64(plain)
    if not _searched(plain):
        return np.uint16(plain)
    errors[:] = 0.0
    for four in range(MANTISSAS // _FOUR):
        m0 = four * _FOUR
        m1, m2, m3 = m0 + _U(1), m0 + _TWO, m0 + _THREE
        p0, p1 = np.float64(powers[m0]), np.float64(powers[m1])
        p2, p3 = np.float64(powers[m2]), np.float64(powers[m3])
        for c in range(MANTISSAS):
            error = (errors[c] + p0 * ERRORS[m0, c]) + p1 * ERRORS[m1, c]
            errors[c] = (error + p2 * ERRORS[m2, c]) + p3 * ERRORS[m3, c]
    best = plain
    for bits in range(plain + 1, plain + 128):
        if errors[bits & 0x7F] < errors[best & 0x7F]:
            best = bits
    gain = errors[plain & 0x7F] - errors[best & 0x7F]
    return np.uint16(best if gain > count * SMALL_ERROR else plain)


@compiled
def best_scale(powers, plain, count):
    """As _best_scale: of the whole matrix, from the sums of `powers_of_rows`."""
    return _best_scale(powers, plain, np.float64(count), np.empty(MANTISSAS, np.float64))


@compiled
def powers_of_rows(source, stride, first, last, columns, plain, powers, counts):
    """Sums by mantissas of rows first .. last added to `powers` [128]; plain's scale of the whole says which weights count."""
    stride, columns = _U(stride), _U(columns)
    fours = columns // _FOUR
    for number in range(_FOUR):
        _clear(counts, number, plain)
    for row in range(_U(first), _U(last)):
        _count(source, row * stride, _FOUR, fours, counts)
        for k in range(fours * _FOUR, columns):
            counts[_U(source[row * stride + k] & _MAGNITUDE)] += np.int32(1)
    for number in range(_FOUR):
        _add_powers(counts, number, plain, powers)


@part
def _search_channels(tile, inputs, maxima, counts, powers, errors, columns):
    """Sets each output's scale."""
    for four in range(BLOCK // _FOUR):
        j = four * _FOUR
        for number in range(_FOUR):
            _clear(counts, number, scale_bits(maxima[j + number]))
        _count(tile, j, BLOCK, inputs, counts)
        for number in range(_FOUR):
            plain = scale_bits(maxima[j + number])
            powers[:] = 0
            _add_powers(counts, number, plain, powers)
            _set_scale(columns, j + number, _best_scale(powers, plain, np.float64(inputs), errors))


@part
def _search_block(tile, to, size, plain, counts, powers, errors):
    powers[:] = 0
    for number in range(_FOUR):
        _clear(counts, number, plain)
    _count(tile, to, _FOUR, size * BLOCK // _FOUR, counts)
    for number in range(_FOUR):
        _add_powers(counts, number, plain, powers)
    return _best_scale(powers, plain, np.float64(BLOCK * BLOCK), errors)


@compiled
def quantize_band(
    source, stride, in_out, n0, width, inputs, granularity, search, given, packed, scales, sums,
    tile, rows, maxima, columns, counts, powers, errors, words,
):  # fmt: skip
    """Quantizes outputs n0 .. n0+width into `packed` (four codes a word) and `scales`, the sums into `sums`.

    `given` is the scale's bits for TENSOR, that of a search where there is one. `sums` takes squared error, squared sum and
    the count of NaN and infinite weights.
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
                bits = scale_bits(of_block)
                if search:
                    bits = _search_block(tile, k0 * BLOCK, size, bits, counts, powers, errors)
                scales[n0 // BLOCK, c] = bits
    largest = max(largest, _largest(maxima))
    if largest >= _INFINITY:
        bad = 0
        for i in range((inputs + _THREE) // _FOUR * _FOUR * BLOCK):
            bad += (tile[i] & _MAGNITUDE) >= _INFINITY
        sums[2] = bad
        return
    if granularity == CHANNEL:
        if search:
            _search_channels(tile, inputs, maxima, counts, powers, errors, columns)
        else:
            for j in range(BLOCK):
                _set_scale(columns, j, scale_bits(maxima[j]))
        for j in range(width):
            scales[n0 + j, 0] = _to_bf16(columns[_SCALE + j])
    elif granularity == TENSOR:
        for j in range(BLOCK):
            _set_scale(columns, j, given)
    add, keep = _AS_IT_IS if search else _IN_BF16
    error_sum = 0.0
    power_sum = 0.0
    for c in range(chunks):
        k0 = c * BLOCK
        fours = (min(BLOCK, inputs - k0) + _THREE) // _FOUR
        if by_block:
            for j in range(BLOCK):
                _set_scale(columns, j, scales[n0 // BLOCK, c])
        begun = k0 // _TOGETHER * _TOGETHER
        _encode(tile, k0 * BLOCK, fours, columns, add, keep, words, (k0 - begun) // _FOUR * BLOCK)
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
