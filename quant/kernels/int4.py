# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Compiled inner loops of the int4 scheme; `quant/schemes/int4.py` says what they compute and calls them.

One call quantizes a band: LANES neighbouring outputs and some groups of inputs, group after group as a tile [inputs, LANES].

A group is scaled by a power of two, which is exact, until its largest magnitude is near 1 ("the normal domain"): squares
then neither overflow nor underflow. Outputs that a ragged last band lacks are lanes of zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quant.kernels.bf16 import INFINITY, scale_of, stored, to_bf16, widened
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
    read_with_extremes,
    write_words,
)

TOGETHER = U(512)  # inputs whose words are written together
CODES_PER_WORD = U(8)  # codes of 4 bits in a packed word

_F32 = np.float32
_ROUND = np.float32(1.5 * 2**23)  # adding it rounds a small float to an integer, ties to even, in its lowest bits
_ROUND_BITS = np.int32(0x4B400000)
_HALF_8, _KEEP_8 = np.uint32(0x8000), np.uint32(0xFFFF0000)
_HALF_16, _KEEP_16 = np.uint32(0x80), np.uint32(0xFFFFFF00)
_LOWEST_CODE, _HIGHEST_CODE = np.int32(-8), np.int32(7)
# Added to four codes with their bits of _ROUND, shifted by 0, 4, 8 and 12: takes these bits off and adds 8 to each code.
_OFFSETS = np.int32((0x8888 - 0x1111 * 0x4B400000 + 2**31) % 2**32 - 2**31)
_SHIFTS = (np.int32(4), np.int32(8), np.int32(12))
_LOWEST, _HIGHEST = np.float32(-8), np.float32(7)
_HALF_RANGE = np.float32(7.5)
_LARGEST_SCALE = 0x7DFF  # an eighth of the largest bf16: times -8 it is still finite

# Where the rows of `Buffers.columns` begin.
_ROWS = 21
_FACTOR, _UNFACTOR, _BASE, _BEST, _RATIO, _CLIP, _SCALE = (U(row * int(LANES)) for row in range(7))
_PLAIN, _LOW, _HIGH, _ERROR, _POWER, _PLAIN_ERROR = (U(row * int(LANES)) for row in range(7, 13))
_PROPOSED, _INVERSE, _XQ, _QQ = (U(row * int(LANES)) for row in range(13, _ROWS, 2))  # two rows each: a pair of clips


class Buffers(NamedTuple):
    """What one thread lends to `quantize_band`, call after call: about 170 KiB at any group size."""

    tile: Tile  # a group
    y: NDArray[np.float32]  # the group in the normal domain, [group, LANES]
    columns: NDArray[np.float32]  # numbers of each output
    scales: NDArray[np.uint16]  # plain scales, then the scales not yet written, [1 + groups, LANES]
    words: NDArray[np.int32]  # words not yet written, [words, LANES]


def buffers(group: int) -> Buffers:
    lanes, together = int(LANES), int(TOGETHER)
    return Buffers(
        empty_tile(group, group, notes=2),
        np.empty(group * lanes, np.float32),
        np.empty(_ROWS * lanes, np.float32),
        np.empty((1 + together // group) * lanes, np.uint16),
        np.empty(together // int(CODES_PER_WORD) * lanes, np.int32),
    )


class Search(NamedTuple):
    """How scales are searched for; without clips they are the plain ones."""

    clips: NDArray[np.float32]  # proposals as parts of amax / 7.5, an even number
    steps: NDArray[np.float32]  # then, one after the other, how far below and above the best clip
    signed: bool  # groups may be mirrored


@part
def _prepare(extremes, signed, columns, plain_bits):
    """For each output: the power of two into the normal domain, negative where the group is to be mirrored; the plain scale."""
    for j in range(LANES):
        largest = max(extremes[j], extremes[LANES + j])
        mirrored = signed and extremes[j] > extremes[LANES + j]
        exponent = min(max((largest >> 7) - 127, -126), 126)
        factor = np.uint32(np.uint32(127 - exponent) << np.uint32(23)).view(np.float32)
        unfactor = np.uint32(np.uint32(127 + exponent) << np.uint32(23)).view(np.float32)
        plain_bits[j] = scale_of(largest, _HALF_RANGE)
        columns[_PLAIN + j] = widened(plain_bits[j]) * factor
        columns[_BASE + j] = _HALF_RANGE / (widened(largest) * factor)
        columns[_UNFACTOR + j] = unfactor
        columns[_FACTOR + j] = -factor if mirrored else factor
        columns[_LOW + j] = np.float32(-7) if mirrored else _LOWEST
        columns[_HIGH + j] = np.float32(8) if mirrored else _HIGHEST


@part
def _normalize(tile, group, columns, y):
    """The group in the normal domain."""
    for r in range(group):
        for j in range(LANES):
            y[r * LANES + j] = widened(tile[r * LANES + j]) * columns[_FACTOR + j]


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
    """The integer nearest to t, ties to even, limited to low .. high."""
    q = (t + _ROUND) - _ROUND
    q = low if q < low else q
    return high if q > high else q


@part
def _correlate_plain(y, group, columns):
    """<y,q>, <q,q> and the squared error at the plain scale, with the limits of the codes of the unmirrored group."""
    for j in range(LANES):
        columns[_XQ + j] = _F32(0)
        columns[_QQ + j] = _F32(0)
        columns[_PLAIN_ERROR + j] = _F32(0)
        columns[_INVERSE + j] = _F32(1) / columns[_PLAIN + j]
    for two in range(group >> U(1)):
        r0 = two * TWO * LANES
        for j in range(LANES):
            scale = columns[_PLAIN + j]
            low = columns[_LOW + j]
            high = columns[_HIGH + j]
            y0 = y[r0 + j]
            y1 = y[r0 + LANES + j]
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
    """Tries the clips of both rows of _PROPOSED, and keeps each that is better than the best so far."""
    for j in range(LANES):
        columns[_INVERSE + j] = columns[_BASE + j] / columns[_PROPOSED + j]
        columns[_INVERSE + LANES + j] = columns[_BASE + j] / columns[_PROPOSED + LANES + j]
    _correlate_pair(y, group, columns)
    for j in range(LANES):
        _keep_better(columns, U(0), j)
        _keep_better(columns, LANES, j)


@part
def _correlate_pair(y, group, columns):
    """<y,q> and <q,q> of both rows of _INVERSE: two at a time share the reading of y."""
    for j in range(TWO * LANES):
        columns[_XQ + j] = _F32(0)
        columns[_QQ + j] = _F32(0)
    for four in range(group // FOUR):
        r0 = four * FOUR * LANES
        for j in range(LANES):
            y0 = y[r0 + j]
            y1 = y[r0 + LANES + j]
            y2 = y[r0 + TWO * LANES + j]
            y3 = y[r0 + THREE * LANES + j]
            _add_products(columns, j, y0, y1, y2, y3)
            _add_products(columns, j + LANES, y0, y1, y2, y3)


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
def _search(y, group, search, columns, scale_bits, plain_bits):
    """The scale bits of the best clip, without the sign of mirrored groups, and the same scale in the normal domain."""
    for j in range(LANES):
        columns[_BEST + j] = _F32(0)
        columns[_RATIO + j] = _F32(0)
        columns[_CLIP + j] = _F32(1)
        columns[_PROPOSED + j] = _F32(1)
    _correlate_plain(y, group, columns)
    if not search.signed:
        for j in range(LANES):
            _keep_better(columns, U(0), j)
    for pair in range(U(len(search.clips)) // TWO):
        for j in range(LANES):
            columns[_PROPOSED + j] = search.clips[pair * TWO]
            columns[_PROPOSED + LANES + j] = search.clips[pair * TWO + U(1)]
        _try_pair(y, group, columns)
    for step in search.steps:
        for j in range(LANES):
            columns[_PROPOSED + j] = columns[_CLIP + j] - step
            columns[_PROPOSED + LANES + j] = columns[_CLIP + j] + step
        _try_pair(y, group, columns)
    for j in range(LANES):
        ratio = columns[_RATIO + j]
        bits = to_bf16(abs(ratio) * columns[_UNFACTOR + j])
        bits = min(max(bits, np.uint16(1)), np.uint16(_LARGEST_SCALE))
        if ratio == _F32(0):  # a group of zeros
            bits = plain_bits[j]
        scale_bits[j] = bits
        columns[_SCALE + j] = widened(bits) * abs(columns[_FACTOR + j])
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
    for four in range(group // FOUR):
        r0 = four * FOUR * LANES
        to = w0 + (four >> U(1)) * LANES
        shift = np.uint32((four & U(1)) << FOUR)
        kept = np.int32(-(four & U(1)))  # the low half of a word starts it afresh
        for j in range(j0, j1):
            scale = columns[_SCALE + j]
            inverse = columns[_INVERSE + j]
            factor = columns[_FACTOR + j]
            y0 = widened(tile[r0 + j]) * factor
            y1 = widened(tile[r0 + LANES + j]) * factor
            y2 = widened(tile[r0 + TWO * LANES + j]) * factor
            y3 = widened(tile[r0 + THREE * LANES + j]) * factor
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
    """Takes the plain scale where the searched one has a larger error, once it is rounded to bf16: seldom."""
    for j in range(LANES):
        if columns[_ERROR + j] > columns[_PLAIN_ERROR + j]:
            columns[_FACTOR + j] = abs(columns[_FACTOR + j])
            scale_bits[j] = min(plain_bits[j], np.uint16(_LARGEST_SCALE))
            columns[_SCALE + j] = widened(scale_bits[j]) * columns[_FACTOR + j]
            _encode(tile, group, columns, _HALF_16, _KEEP_16, j, j + U(1), words, w0)


@compiled
def quantize_band(source, n0, width, first, last, group, search, packed, scales, sums, buffers):
    """Quantizes outputs n0 .. n0+width and groups first .. last of a `Source` into `packed` and `scales`.

    `search`: a `Search`. `sums` takes squared error, squared sum and the count of NaN and infinite weights.
    """
    error_sum = 0.0
    power_sum = 0.0
    bad = 0
    n0, width, group = U(n0), U(width), U(group)
    first, last = U(first), U(last)
    tile, columns, words = buffers.tile, buffers.columns, buffers.words
    plain_bits = buffers.scales[:LANES]
    words_per_group = group // CODES_PER_WORD
    together = TOGETHER // group
    if width < LANES:
        tile.bits[:] = np.int16(0)
    for g in range(first, last):
        tile.noted[:] = np.int16(0)
        read_with_extremes(source, g * group, group, n0, width, tile, U(0))
        if largest_of(tile.noted) >= INFINITY:
            bad += not_finite(tile.bits, group)
        if bad:
            continue
        _prepare(tile.noted, search.signed, columns, plain_bits)
        slot = (g - first) % together
        w0 = slot * words_per_group * LANES
        scale_bits = buffers.scales[(slot + U(1)) * LANES : (slot + TWO) * LANES]
        if len(search.clips):
            _normalize(tile.bits, group, columns, buffers.y)
            _search(buffers.y, group, search, columns, scale_bits, plain_bits)
            _encode(tile.bits, group, columns, _HALF_16, _KEEP_16, U(0), LANES, words, w0)
            _fall_back(tile.bits, group, columns, scale_bits, plain_bits, words, w0)
        else:
            for j in range(LANES):
                scale_bits[j] = plain_bits[j]
                columns[_SCALE + j] = columns[_PLAIN + j]
            _encode(tile.bits, group, columns, _HALF_8, _KEEP_8, U(0), LANES, words, w0)
        for j in range(LANES):
            if columns[_FACTOR + j] < _F32(0):
                scale_bits[j] |= np.uint16(0x8000)
            square = np.float64(columns[_UNFACTOR + j]) * np.float64(columns[_UNFACTOR + j])
            error_sum += np.float64(columns[_ERROR + j]) * square
            power_sum += np.float64(columns[_POWER + j]) * square
        if slot + U(1) == together or g + U(1) == last:
            write_words(words, n0, width, (g - slot) * words_per_group, (slot + U(1)) * words_per_group, packed)
            for j in range(width):
                for i in range(slot + U(1)):
                    scales[n0 + j, g - slot + i] = buffers.scales[(i + U(1)) * LANES + j]
    sums[0] = error_sum
    sums[1] = power_sum
    sums[2] = bad


@compiled
def dequantize(packed, scales, group, result):
    """scale * code of all rows; scales float32, `result` float32 or, rounded, bf16 bits."""
    words_per_group = U(group) // CODES_PER_WORD
    values = np.empty(16, result.dtype)
    for n in range(packed.shape[0]):
        for g in range(U(scales.shape[1])):
            scale = scales[n, g]
            for code in range(16):
                values[code] = stored(scale * np.float32(code - 8), result)
            for w in range(g * words_per_group, (g + U(1)) * words_per_group):
                word = np.uint32(packed[n, w])
                for c in range(CODES_PER_WORD):
                    result[n, w * CODES_PER_WORD + c] = values[(word >> np.uint32(FOUR * c)) & np.uint32(0xF)]
