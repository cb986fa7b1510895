# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Compiled inner loops of the int4 scheme; `quant/schemes/int4.py` says what they compute and calls them.

One call quantizes a band: BLOCK neighbouring outputs and some groups of inputs. Each group is first brought into the form
[inputs, BLOCK] in a small buffer; every loop below then runs over the outputs, one vector lane an output, and each sum
runs over the inputs in their order. So nothing is reassociated (there is no fastmath, and without it LLVM neither
reorders nor contracts into FMA): the bytes depend neither on the machine's vector width nor on the number of threads.

A group is scaled by a power of two, which is exact, until its largest magnitude is near 1 ("the normal domain"): squares
then neither overflow nor underflow. Outputs that a ragged last block lacks are columns of zeros.

Everything compiled stands in this one file: numba's cache looks at the stamp of this file alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.kernels.jit import compiled, part

# Indices are unsigned: a signed one might be negative for all that LLVM knows, and its loop is not vectorized then.
_U = np.uintp
BLOCK = _U(128)  # outputs at a time: the group in float32 is 64 KiB, in the second-level cache of anything current
_TWO, _THREE, _FOUR = _U(2), _U(3), _U(4)  # loops take four inputs a step: fewer trips to the sums in memory
_TOGETHER = _U(512)  # inputs whose words are written together
CODES_PER_WORD = _U(8)  # codes of 4 bits in a packed word

_F32 = np.float32
_ROUND = np.float32(1.5 * 2**23)  # adding it rounds a small float to an integer, ties to even, in its lowest bits
_ROUND_BITS = np.int32(0x4B400000)
_SIGN = np.int16(-0x8000)
_LOW_32, _EVEN_16 = np.uint64(0xFFFFFFFF), np.uint64(0x0000FFFF0000FFFF)
_BY_32, _BY_16 = np.uint64(32), np.uint64(16)
_HALF_8, _KEEP_8 = np.uint32(0x8000), np.uint32(0xFFFF0000)
_HALF_16, _KEEP_16 = np.uint32(0x80), np.uint32(0xFFFFFF00)
_LOWEST_CODE, _HIGHEST_CODE = np.int32(-8), np.int32(7)
# Added to four codes with their bits of _ROUND, shifted by 0, 4, 8 and 12: takes these bits off and adds 8 to each code.
_OFFSETS = np.int32((0x8888 - 0x1111 * 0x4B400000 + 2**31) % 2**32 - 2**31)
_SHIFTS = (np.int32(4), np.int32(8), np.int32(12))
_LOWEST, _HIGHEST = np.float32(-8), np.float32(7)
_HALF_RANGE = np.float32(7.5)
_INFINITY = 0x7F80  # as bf16 bits: magnitudes from here on are infinite or NaN
_EPSILON = 0x3C00  # 2**-7, bf16's epsilon: compressed-tensors puts it where the scale would be 0
_LARGEST_SCALE = 0x7DFF  # an eighth of the largest bf16: times -8 it is still finite

# Where the rows of the per-output float32 buffer begin.
COLUMN_ROWS = 21
_FACTOR, _UNFACTOR, _BASE, _BEST, _RATIO, _CLIP, _SCALE = (_U(row * int(BLOCK)) for row in range(7))
_PLAIN, _LOW, _HIGH, _ERROR, _POWER, _PLAIN_ERROR = (_U(row * int(BLOCK)) for row in range(7, 13))
_PROPOSED, _INVERSE, _XQ, _QQ = (
    _U(row * int(BLOCK)) for row in range(13, COLUMN_ROWS, 2)
)  # two rows each: a pair of clips


def scratch(group: int) -> tuple[NDArray[Any], ...]:
    """The buffers that one thread lends to `quantize_band`, call after call: about 170 KiB at any group size."""
    block = int(BLOCK)
    return (
        np.empty(group * block, np.int16),  # tile: the group as it was read, [group, BLOCK]
        np.empty((group + int(_FOUR)) * block, np.int16),  # rows: before transposing
        np.empty(group * block, np.float32),  # y: the group in the normal domain
        np.empty(COLUMN_ROWS * block, np.float32),
        np.empty(2 * block, np.int16),  # extremes
        np.empty((1 + int(_TOGETHER) // group) * block, np.uint16),  # plain scales, then the scales not yet written
        np.empty(int(_TOGETHER) // int(CODES_PER_WORD) * block, np.int32),  # words not yet written
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
def _note_extremes(extremes, j, b0, b1, b2, b3):
    """The largest positive and the largest negative magnitude as bf16 bits; NaN counts as larger than all."""
    extremes[j] = max(extremes[j], max(max(b0, b1), max(b2, b3)))
    b0, b1, b2, b3 = b0 ^ _SIGN, b1 ^ _SIGN, b2 ^ _SIGN, b3 ^ _SIGN
    extremes[BLOCK + j] = max(extremes[BLOCK + j], np.int16(max(max(b0, b1), max(b2, b3))))


@part
def _read_in_out(source, stride, k0, n0, group, width, tile, extremes):
    for four in range(group // _FOUR):
        start = (k0 + four * _FOUR) * stride + n0
        to = four * _FOUR * BLOCK
        for j in range(width):
            b0 = source[start + j]
            b1 = source[start + stride + j]
            b2 = source[start + stride * _TWO + j]
            b3 = source[start + stride * _THREE + j]
            tile[to + j] = b0
            tile[to + BLOCK + j] = b1
            tile[to + _TWO * BLOCK + j] = b2
            tile[to + _THREE * BLOCK + j] = b3
            _note_extremes(extremes, j, b0, b1, b2, b3)


@part
def _read_out_in(source, stride, k0, n0, group, width, rows, tile, extremes):
    """Transposes, four by four in uint64 (halves of 32 bits change places, then of 16).

    The rows are first copied together: in the source they lie a power of two apart and would share few cache sets.
    """
    pitch = group + _FOUR
    for j in range(width):
        start = (n0 + j) * stride + k0
        for r in range(group):
            rows[j * pitch + r] = source[start + r]
    pitch //= _FOUR
    fours = rows.view(np.uint64)
    lanes = tile.view(np.uint64)
    for r in range(group // _FOUR):
        to = r * BLOCK
        for j in range((width + _THREE) // _FOUR):
            at = j * _FOUR * pitch + r
            a0, a1, a2, a3 = fours[at], fours[at + pitch], fours[at + _TWO * pitch], fours[at + _THREE * pitch]
            b0 = (a0 & _LOW_32) | (a2 << _BY_32)
            b1 = (a1 & _LOW_32) | (a3 << _BY_32)
            b2 = (a0 >> _BY_32) | (a2 & ~_LOW_32)
            b3 = (a1 >> _BY_32) | (a3 & ~_LOW_32)
            lanes[to + j] = (b0 & _EVEN_16) | ((b1 & _EVEN_16) << _BY_16)
            lanes[to + BLOCK // _FOUR + j] = ((b0 >> _BY_16) & _EVEN_16) | (b1 & ~_EVEN_16)
            lanes[to + BLOCK // _TWO + j] = (b2 & _EVEN_16) | ((b3 & _EVEN_16) << _BY_16)
            lanes[to + BLOCK // _FOUR * _THREE + j] = ((b2 >> _BY_16) & _EVEN_16) | (b3 & ~_EVEN_16)
    for four in range(group // _FOUR):
        at = four * _FOUR * BLOCK
        for j in range(BLOCK):
            b0, b1 = tile[at + j], tile[at + BLOCK + j]
            b2, b3 = tile[at + _TWO * BLOCK + j], tile[at + _THREE * BLOCK + j]
            _note_extremes(extremes, j, b0, b1, b2, b3)


@part
def _not_finite(tile, group):
    count = 0
    for i in range(group * BLOCK):
        count += (tile[i] & 0x7FFF) >= _INFINITY
    return count


@part
def _prepare(extremes, signed, columns, plain_bits):
    """Per output: the power of two into the normal domain, negative where the group is to be mirrored; the plain scale."""
    for j in range(BLOCK):
        largest = max(extremes[j], extremes[BLOCK + j])
        mirrored = signed and extremes[j] > extremes[BLOCK + j]
        exponent = min(max((largest >> 7) - 127, -126), 126)
        factor = np.uint32(np.uint32(127 - exponent) << np.uint32(23)).view(np.float32)
        unfactor = np.uint32(np.uint32(127 + exponent) << np.uint32(23)).view(np.float32)
        amax = _widened(largest)
        bits = _to_bf16(amax / _HALF_RANGE)
        if bits == 0:
            bits = np.uint16(_EPSILON)
        plain_bits[j] = bits
        columns[_PLAIN + j] = _widened(bits) * factor
        columns[_BASE + j] = _HALF_RANGE / (amax * factor)
        columns[_UNFACTOR + j] = unfactor
        columns[_FACTOR + j] = -factor if mirrored else factor
        columns[_LOW + j] = np.float32(-7) if mirrored else _LOWEST
        columns[_HIGH + j] = np.float32(8) if mirrored else _HIGHEST


@part
def _normalize(tile, group, columns, y):
    for r in range(group):
        for j in range(BLOCK):
            y[r * BLOCK + j] = _widened(tile[r * BLOCK + j]) * columns[_FACTOR + j]


@part
def _quotient(y, inverse, half, keep):
    """y / scale rounded to the bits in `keep`, without a division; y and scale have the 8 significant bits of bf16.

    To bf16 (_HALF_8, _KEEP_8): the quotient never lies on the midpoint of two bf16 (9 bits times 8 are not 8), and else at
    least 2**-17 of it away, while y * inverse is right to 2**-22. To 16 bits (_HALF_16, _KEEP_16): the codes' ties, k + 1/2,
    become exact again, and what is no tie is 2**-13 away from one: rounded to an integer it is the exact quotient's.
    """
    bits = np.float32(y * inverse).view(np.uint32)
    return np.uint32((bits + half) & keep).view(np.float32)


@part
def _rounded(t, low, high):
    q = (t + _ROUND) - _ROUND
    q = low if q < low else q
    return high if q > high else q


@part
def _correlate_plain(y, group, columns):
    """<y,q>, <q,q> and the squared error at the plain scale, with the limits of the codes of the unmirrored group."""
    for j in range(BLOCK):
        columns[_XQ + j] = _F32(0)
        columns[_QQ + j] = _F32(0)
        columns[_PLAIN_ERROR + j] = _F32(0)
        columns[_INVERSE + j] = _F32(1) / columns[_PLAIN + j]
    for two in range(group >> _U(1)):
        r0 = two * _TWO * BLOCK
        for j in range(BLOCK):
            scale = columns[_PLAIN + j]
            low = columns[_LOW + j]
            high = columns[_HIGH + j]
            y0 = y[r0 + j]
            y1 = y[r0 + BLOCK + j]
            q0 = _rounded(_quotient(y0, columns[_INVERSE + j], _HALF_16, _KEEP_16), low, high)
            q1 = _rounded(_quotient(y1, columns[_INVERSE + j], _HALF_16, _KEEP_16), low, high)
            d0 = y0 - scale * q0
            d1 = y1 - scale * q1
            columns[_XQ + j] = (columns[_XQ + j] + y0 * q0) + y1 * q1
            columns[_QQ + j] = (columns[_QQ + j] + q0 * q0) + q1 * q1
            columns[_PLAIN_ERROR + j] = (columns[_PLAIN_ERROR + j] + d0 * d0) + d1 * d1


@part
def _add_products(columns, at, y0, y1, y2, y3):
    """To <y,q> and <q,q> of one proposal, of the codes q that its inverse scale gives."""
    inverse = columns[_INVERSE + at]
    q0 = _rounded(y0 * inverse, _LOWEST, _HIGHEST)
    q1 = _rounded(y1 * inverse, _LOWEST, _HIGHEST)
    q2 = _rounded(y2 * inverse, _LOWEST, _HIGHEST)
    q3 = _rounded(y3 * inverse, _LOWEST, _HIGHEST)
    columns[_XQ + at] = (((columns[_XQ + at] + y0 * q0) + y1 * q1) + y2 * q2) + y3 * q3
    columns[_QQ + at] = (((columns[_QQ + at] + q0 * q0) + q1 * q1) + q2 * q2) + q3 * q3


@part
def _try_pair(y, group, columns):
    """Takes what is better than the best so far of both rows of _PROPOSED."""
    for j in range(BLOCK):
        columns[_INVERSE + j] = columns[_BASE + j] / columns[_PROPOSED + j]
        columns[_INVERSE + BLOCK + j] = columns[_BASE + j] / columns[_PROPOSED + BLOCK + j]
    _correlate_pair(y, group, columns)
    for j in range(BLOCK):
        _keep_better(columns, _U(0), j)
        _keep_better(columns, BLOCK, j)


@part
def _correlate_pair(y, group, columns):
    """<y,q> and <q,q> of both rows of _INVERSE: two at a time share the reading of y."""
    for j in range(_TWO * BLOCK):
        columns[_XQ + j] = _F32(0)
        columns[_QQ + j] = _F32(0)
    for four in range(group // _FOUR):
        r0 = four * _FOUR * BLOCK
        for j in range(BLOCK):
            y0 = y[r0 + j]
            y1 = y[r0 + BLOCK + j]
            y2 = y[r0 + _TWO * BLOCK + j]
            y3 = y[r0 + _THREE * BLOCK + j]
            _add_products(columns, j, y0, y1, y2, y3)
            _add_products(columns, j + BLOCK, y0, y1, y2, y3)


@part
def _keep_better(columns, row, j):
    """Least squares: codes q serve x best at scale <x,q>/<q,q>, and the error is then <x,x> - <x,q>^2/<q,q>."""
    ratio = columns[_XQ + row + j] / columns[_QQ + row + j]
    score = ratio * columns[_XQ + row + j]
    better = score > columns[_BEST + j]
    columns[_BEST + j] = score if better else columns[_BEST + j]
    columns[_RATIO + j] = ratio if better else columns[_RATIO + j]
    columns[_CLIP + j] = columns[_PROPOSED + row + j] if better else columns[_CLIP + j]


@part
def _search(y, group, clips, steps, signed, columns, scale_bits, plain_bits):
    """The scale bits of the best clip, without the sign of mirrored groups, and the same scale in the normal domain."""
    for j in range(BLOCK):
        columns[_BEST + j] = _F32(0)
        columns[_RATIO + j] = _F32(0)
        columns[_CLIP + j] = _F32(1)
        columns[_PROPOSED + j] = _F32(1)
    _correlate_plain(y, group, columns)
    if not signed:
        for j in range(BLOCK):
            _keep_better(columns, _U(0), j)
    for pair in range(_U(len(clips)) // _TWO):
        for j in range(BLOCK):
            columns[_PROPOSED + j] = clips[pair * _TWO]
            columns[_PROPOSED + BLOCK + j] = clips[pair * _TWO + _U(1)]
        _try_pair(y, group, columns)
    for step in steps:
        for j in range(BLOCK):
            columns[_PROPOSED + j] = columns[_CLIP + j] - step
            columns[_PROPOSED + BLOCK + j] = columns[_CLIP + j] + step
        _try_pair(y, group, columns)
    for j in range(BLOCK):
        ratio = columns[_RATIO + j]
        bits = _to_bf16(abs(ratio) * columns[_UNFACTOR + j])
        bits = min(max(bits, np.uint16(1)), np.uint16(_LARGEST_SCALE))
        if ratio == _F32(0):  # a group of zeros
            bits = plain_bits[j]
        scale_bits[j] = bits
        columns[_SCALE + j] = _widened(bits) * abs(columns[_FACTOR + j])
        if ratio < _F32(0):
            columns[_FACTOR + j] = -columns[_FACTOR + j]


@part
def _code(y, inverse, half, keep):
    """The code, still with the bits of _ROUND that made it an integer."""
    rounded = np.float32(_quotient(y, inverse, half, keep) + _ROUND).view(np.int32)
    return np.int32(min(max(rounded, _ROUND_BITS + _LOWEST_CODE), _ROUND_BITS + _HIGHEST_CODE))


@part
def _squared_error(y, scale, code):
    d = y - scale * (np.int32(code).view(np.float32) - _ROUND)  # the product is exact: 8 bits by 4
    return d * d


@part
def _encode(tile, group, columns, half, keep, j0, j1, words, w0):
    """Codes weight / scale packed eight to a word, lowest nibble first, plus 8; squared error and power of each output.

    `half` and `keep` say whether the quotient is rounded to bf16 before it is rounded to a code.
    """
    for j in range(j0, j1):
        columns[_ERROR + j] = _F32(0)
        columns[_POWER + j] = _F32(0)
        columns[_INVERSE + j] = _F32(1) / columns[_SCALE + j]
    for four in range(group // _FOUR):
        r0 = four * _FOUR * BLOCK
        to = w0 + (four >> _U(1)) * BLOCK
        shift = np.uint32((four & _U(1)) << _FOUR)
        kept = np.int32(-(four & _U(1)))  # the low half of a word starts it afresh
        for j in range(j0, j1):
            scale = columns[_SCALE + j]
            inverse = columns[_INVERSE + j]
            factor = columns[_FACTOR + j]
            y0 = _widened(tile[r0 + j]) * factor
            y1 = _widened(tile[r0 + BLOCK + j]) * factor
            y2 = _widened(tile[r0 + _TWO * BLOCK + j]) * factor
            y3 = _widened(tile[r0 + _THREE * BLOCK + j]) * factor
            c0 = _code(y0, inverse, half, keep)
            c1 = _code(y1, inverse, half, keep)
            c2 = _code(y2, inverse, half, keep)
            c3 = _code(y3, inverse, half, keep)
            codes = np.uint32(_OFFSETS + (c0 + (c1 << _SHIFTS[0]) + (c2 << _SHIFTS[1]) + (c3 << _SHIFTS[2])))
            words[to + j] = (words[to + j] & kept) | np.int32(codes << shift)
            error = (columns[_ERROR + j] + _squared_error(y0, scale, c0)) + _squared_error(y1, scale, c1)
            columns[_ERROR + j] = (error + _squared_error(y2, scale, c2)) + _squared_error(y3, scale, c3)
            columns[_POWER + j] = (((columns[_POWER + j] + y0 * y0) + y1 * y1) + y2 * y2) + y3 * y3


@part
def _fall_back(tile, group, columns, scale_bits, plain_bits, words, w0):
    """The plain scale again where the searched one, once rounded to bf16, turned out worse: seldom."""
    for j in range(BLOCK):
        if columns[_ERROR + j] > columns[_PLAIN_ERROR + j]:
            columns[_FACTOR + j] = abs(columns[_FACTOR + j])
            scale_bits[j] = min(plain_bits[j], np.uint16(_LARGEST_SCALE))
            columns[_SCALE + j] = _widened(scale_bits[j]) * columns[_FACTOR + j]
            _encode(tile, group, columns, _HALF_16, _KEEP_16, j, j + _U(1), words, w0)


@part
def _write(words, halves, n0, width, first, last, group, packed, scales):
    """Transposes groups first .. last into the outputs: some groups together, as each output's row is another page."""
    per_group = group // CODES_PER_WORD
    for j in range(width):
        for w in range((last - first) * per_group):
            packed[n0 + j, first * per_group + w] = words[w * BLOCK + j]
        for g in range(last - first):
            scales[n0 + j, first + g] = halves[(g + _U(1)) * BLOCK + j]


@compiled
def quantize_band(
    source,
    stride,
    in_out,
    n0,
    width,
    first,
    last,
    group,
    clips,
    steps,
    signed,
    packed,
    scales,
    sums,
    tile,
    rows,
    y,
    columns,
    extremes,
    halves,
    words,
):
    """Quantizes outputs n0 .. n0+width and groups first .. last into `packed` and `scales`; the sums into `sums`.

    No clips: the plain scheme. `sums` takes squared error, squared sum and the count of NaN and infinite weights.
    """
    error_sum = 0.0
    power_sum = 0.0
    bad = 0
    stride, n0, width, group = _U(stride), _U(n0), _U(width), _U(group)
    first, last = _U(first), _U(last)
    plain_bits = halves[:BLOCK]
    together = _TOGETHER // group
    if width < BLOCK:
        tile[:] = np.int16(0)
        rows[:] = np.int16(0)
    for g in range(first, last):
        extremes[:] = np.int16(0)
        if in_out:
            _read_in_out(source, stride, g * group, n0, group, width, tile, extremes)
        else:
            _read_out_in(source, stride, g * group, n0, group, width, rows, tile, extremes)
        largest = np.int16(0)
        for j in range(_TWO * BLOCK):
            largest = max(largest, extremes[j])
        if largest >= _INFINITY:
            bad += _not_finite(tile, group)
        if bad:
            continue
        _prepare(extremes, signed, columns, plain_bits)
        slot = (g - first) % together
        w0 = slot * (group // CODES_PER_WORD) * BLOCK
        scale_bits = halves[(slot + _U(1)) * BLOCK : (slot + _U(2)) * BLOCK]
        if len(clips):
            _normalize(tile, group, columns, y)
            _search(y, group, clips, steps, signed, columns, scale_bits, plain_bits)
            _encode(tile, group, columns, _HALF_16, _KEEP_16, _U(0), BLOCK, words, w0)
            _fall_back(tile, group, columns, scale_bits, plain_bits, words, w0)
        else:
            for j in range(BLOCK):
                scale_bits[j] = plain_bits[j]
                columns[_SCALE + j] = columns[_PLAIN + j]
            _encode(tile, group, columns, _HALF_8, _KEEP_8, _U(0), BLOCK, words, w0)
        for j in range(BLOCK):
            if columns[_FACTOR + j] < _F32(0):
                scale_bits[j] |= np.uint16(0x8000)
            square = np.float64(columns[_UNFACTOR + j]) * np.float64(columns[_UNFACTOR + j])
            error_sum += np.float64(columns[_ERROR + j]) * square
            power_sum += np.float64(columns[_POWER + j]) * square
        if slot + _U(1) == together or g + _U(1) == last:
            _write(words, halves, n0, width, g - slot, g + _U(1), group, packed, scales)
    sums[0] = error_sum
    sums[1] = power_sum
    sums[2] = bad


@compiled
def dequantize_f32(packed, scales, group, result):
    """scale * code in float32, for all rows; scales float32."""
    per_group = _U(group) // CODES_PER_WORD
    values = np.empty(16, np.float32)
    for n in range(packed.shape[0]):
        for g in range(_U(scales.shape[1])):
            scale = scales[n, g]
            for code in range(16):
                values[code] = scale * np.float32(code - 8)
            for w in range(g * per_group, (g + _U(1)) * per_group):
                word = np.uint32(packed[n, w])
                for c in range(CODES_PER_WORD):
                    result[n, w * CODES_PER_WORD + c] = values[(word >> np.uint32(_U(4) * c)) & np.uint32(0xF)]


@compiled
def dequantize_bf16(packed, scales, group, result):
    """The same rounded to bf16."""
    per_group = _U(group) // CODES_PER_WORD
    values = np.empty(16, np.uint16)
    for n in range(packed.shape[0]):
        for g in range(_U(scales.shape[1])):
            scale = scales[n, g]
            for code in range(16):
                values[code] = _to_bf16(scale * np.float32(code - 8))
            for w in range(g * per_group, (g + _U(1)) * per_group):
                word = np.uint32(packed[n, w])
                for c in range(CODES_PER_WORD):
                    result[n, w * CODES_PER_WORD + c] = values[(word >> np.uint32(_U(4) * c)) & np.uint32(0xF)]
