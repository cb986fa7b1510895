# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The search for FP8 scales: the error of every bf16 scale of an octave, from one pass over the weights.

Weights and scales are bf16, and e4m3 steps by octaves: how far a weight is from the nearest scale * number depends on the
7 bits of either's mantissa alone, times the power of two of the weight. So weights are counted by their bits, the squares of
their powers of two are summed by mantissas (128 integers, exact in any order), and the error of a scale is the sum of these
times its column of a table (`ERRORS`), in float64 in the order of the mantissas.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quant.kernels.bf16 import MAGNITUDE
from quant.kernels.jit import compiled, part
from quant.kernels.tiles import FOUR, LANES, THREE, TWO, U

MANTISSAS = U(128)  # of bf16
# A search tries plain's scale alone outside: below, subnormal weights would count; above, they reach 2**127, and a scale that
# rounds the largest up might make it infinite.
SMALLEST_SEARCHED, LARGEST_SEARCHED = 0x0280, 0x7A91
# Weights that are smaller than 2**-4 times the power of two of plain's scale count as nothing, as their steps do not go by
# octaves. Under no scale of the octave does the error of such a weight exceed SMALL_ERROR, in the units of ERRORS by powers.
LOWEST, SMALL_ERROR = -4, 2.0**14
HIGHEST = 9  # no weight exceeds 464 scales
# A counter for each magnitude; the four sets of counters do not begin at the same lines of the cache.
_COUNTERS = U(1 << 15) + U(16)


def _errors() -> NDArray[np.float64]:
    """Squared error by the mantissas of weight and scale [128, 128], in units of (2**-11 of the weight's power of two)**2.

    All are integers below 2**16. The sums of powers that they are multiplied with are in units of the smallest power that counts,
    squared.
    """
    weight = np.arange(128.0, 256)[:, None]
    scale = np.arange(128.0, 256)
    step = np.where(weight < scale, 1 / 16, 1 / 8)  # e4m3's at weight / scale, which is 1/2 .. 2
    rest = weight - scale * step * np.rint(weight / (scale * step))
    found: NDArray[np.float64] = np.square(rest * 16)
    return found


ERRORS = _errors()


class Buffers(NamedTuple):
    """What one thread lends to a search, call after call: 514 KiB."""

    counts: NDArray[np.int32]  # how often each magnitude was seen, four times
    powers: NDArray[np.int64]  # sums of powers by mantissas
    errors: NDArray[np.float64]  # of the 128 scales of an octave


def counters() -> NDArray[np.int32]:
    """Four sets of counters, one for each magnitude of bf16."""
    return np.empty(int(FOUR * _COUNTERS), np.int32)


def buffers() -> Buffers:
    mantissas = int(MANTISSAS)
    return Buffers(counters(), np.empty(mantissas, np.int64), np.empty(mantissas, np.float64))


@part
def _searched(plain):
    """Is another scale than the plain one looked for?"""
    return SMALLEST_SEARCHED <= plain <= LARGEST_SEARCHED


@part
def _first_counter(plain):
    """The counter of the smallest magnitude that counts, in its set; `plain` is the plain scale's bits."""
    return (U(plain) // MANTISSAS - U(-LOWEST)) * MANTISSAS


@part
def _clear(counts, number, plain):
    """Sets the counters of a set that `_add_powers` will read to 0."""
    if _searched(plain):
        first = number * _COUNTERS + _first_counter(plain)
        counts[first : first + U(HIGHEST - LOWEST + 1) * MANTISSAS] = 0


@part
def _count(bits, start, step, times, counts):
    """Counts magnitudes at `start`, `start` + `step` and so on, and three after each: a set of counters for each of the four."""
    for i in range(times):
        at = start + i * step
        counts[U(bits[at] & MAGNITUDE)] += np.int32(1)
        counts[_COUNTERS + U(bits[at + U(1)] & MAGNITUDE)] += np.int32(1)
        counts[TWO * _COUNTERS + U(bits[at + TWO] & MAGNITUDE)] += np.int32(1)
        counts[THREE * _COUNTERS + U(bits[at + THREE] & MAGNITUDE)] += np.int32(1)


@part
def _add_powers(counts, number, plain, powers):
    """Adds what a set has counted: 4**exponent of each weight to the sum of its mantissa."""
    if _searched(plain):
        first = number * _COUNTERS + _first_counter(plain)
        for exponent in range(U(HIGHEST - LOWEST + 1)):
            power = np.int64(1) << np.int64(TWO * exponent)
            for m in range(MANTISSAS):
                powers[m] += np.int64(counts[first + exponent * MANTISSAS + m]) * power


@part
def _best_scale(powers, plain, count, errors):
    """Bits of the scale of the least error in the octave that begins with the plain one; the lowest of equally good scales.

    `count` weights share the scale. The plain one stays unless the gain exceeds what the weights that do not count could lose.
    """
    plain = np.int64(plain)
    if not _searched(plain):
        return np.uint16(plain)
    errors[:] = 0.0
    for four in range(MANTISSAS // FOUR):
        m0 = four * FOUR
        m1, m2, m3 = m0 + U(1), m0 + TWO, m0 + THREE
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
    """See `_best_scale`: the scale of the whole matrix of `count` weights, from the sums of `powers_of_rows`."""
    return _best_scale(powers, plain, np.float64(count), np.empty(MANTISSAS, np.float64))


@compiled
def powers_of_rows(source, first, last, columns, plain, powers, counts):
    """Adds the sums by mantissas of rows first .. last of a `Source` to `powers` [128].

    `plain` is the plain scale of the whole matrix, as bf16 bits: it says which weights count.
    """
    bits, stride, columns = source.bits, U(source.stride), U(columns)
    fours = columns // FOUR
    for number in range(FOUR):
        _clear(counts, number, plain)
    for row in range(U(first), U(last)):
        _count(bits, row * stride, FOUR, fours, counts)
        for k in range(fours * FOUR, columns):
            counts[U(bits[row * stride + k] & MAGNITUDE)] += np.int32(1)
    for number in range(FOUR):
        _add_powers(counts, number, plain, powers)


@part
def search_outputs(bits, inputs, scales, buffers):
    """Replaces the plain scales [LANES] of a tile's outputs, bf16 bits, by the best."""
    counts, powers = buffers.counts, buffers.powers
    for four in range(LANES // FOUR):
        j = four * FOUR
        for number in range(FOUR):
            _clear(counts, number, scales[j + number])
        _count(bits, j, LANES, inputs, counts)
        for number in range(FOUR):
            powers[:] = 0
            _add_powers(counts, number, scales[j + number], powers)
            scales[j + number] = _best_scale(powers, scales[j + number], np.float64(inputs), buffers.errors)


@part
def search_block(bits, to, inputs, plain, buffers):
    """The best scale of all outputs of a tile for some inputs, which begin at `to`, as bf16 bits; `plain` is plain's."""
    counts, powers = buffers.counts, buffers.powers
    powers[:] = 0
    for number in range(FOUR):
        _clear(counts, number, plain)
    _count(bits, to, FOUR, inputs * LANES // FOUR, counts)
    for number in range(FOUR):
        _add_powers(counts, number, plain, powers)
    return _best_scale(powers, plain, np.float64(LANES * LANES), buffers.errors)
