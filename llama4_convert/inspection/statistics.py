"""What the numbers of a tensor are like: range, mean, spread, zeros, NaN, infinities, and a histogram by magnitude.

A tensor of 8 or 16 bits a number is counted by bit pattern: 65,536 counts say all there is to say, exactly and in one pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from llama4.weights import Bits
from llama4_convert.inspection.results import TensorStatistics

_CHUNK_NUMBERS = 1 << 18  # numbers at a time: np.bincount widens them to 64 bits


def _widened(values: NDArray[np.float32] | NDArray[np.float16]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # signalling NaN
        return values.astype(np.float64)


def _bf16(bits: Bits) -> NDArray[np.float64]:
    return _widened((bits.astype(np.uint32) << 16).view(np.float32))


def _fp8(bits: Bits) -> NDArray[np.float64]:
    """e4m3: 1 sign, 4 exponent (bias 7) and 3 mantissa bits; no infinities, NaN where all seven are set (OCP FP8)."""
    exponent, mantissa = (bits >> 3 & 15).astype(np.int64), (bits & 7).astype(np.float64)
    value = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), mantissa * 2.0**-9)
    value[bits & 0x7F == 0x7F] = math.nan
    return np.where(bits & 0x80, -value, value)


_VALUES: dict[str, Callable[[Bits], NDArray[np.float64]]] = {
    "BF16": _bf16,
    "F16": lambda bits: _widened(bits.view(np.float16)),
    "F8_E4M3": _fp8,
    "F32": lambda bits: _widened(bits.view(np.float32)),
}
DTYPES = frozenset(_VALUES)


class Statistics:
    """Sums over numbers that come with how often each occurs. Moments and range are those of the finite numbers."""

    def __init__(self) -> None:
        self.n = self.nan = self.inf = self.zeros = 0
        self.least, self.most = math.inf, -math.inf
        self.total = self.squares = 0.0
        self.binades: Counter[int] = Counter()  # e: finite numbers x but 0 with 2^e <= |x| < 2^(e + 1)

    def add(self, values: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        present = counts > 0
        values, counts = values[present], counts[present]
        is_finite = np.isfinite(values)
        self.nan += int(counts[np.isnan(values)].sum())
        self.inf += int(counts[np.isinf(values)].sum())
        values, counts = values[is_finite], counts[is_finite]
        if not values.size:
            return
        self.n += int(counts.sum())
        self.least, self.most = min(self.least, float(values.min())), max(self.most, float(values.max()))
        self.total += float((values * counts).sum())
        self.squares += float((values * values * counts).sum())
        is_zero = values == 0
        self.zeros += int(counts[is_zero].sum())
        exponents = np.frexp(values[~is_zero])[1] - 1
        for exponent in np.unique(exponents):
            self.binades[int(exponent)] += int(counts[~is_zero][exponents == exponent].sum())

    def result(self, tensor: str) -> TensorStatistics:
        """`min` to `std` are None without a finite number."""
        mean = self.total / self.n if self.n else None
        return TensorStatistics(
            tensor=tensor,
            min=self.least if self.n else None,
            max=self.most if self.n else None,
            mean=mean,
            std=math.sqrt(max(0.0, self.squares / self.n - mean * mean)) if mean is not None else None,
            zeros=self.zeros,
            nan=self.nan,
            inf=self.inf,
            histogram=sorted(self.binades.items()),
        )


def statistics(pieces: Iterable[Bits], dtype: str) -> Statistics:
    """Statistics of all numbers in `pieces`: raw bits of `dtype` (one of DTYPES), in arrays of any shape."""
    found, values_of = Statistics(), _VALUES[dtype]
    patterns: NDArray[np.int64] | None = None
    for piece in pieces:
        flat = piece.reshape(-1)
        for start in range(0, flat.size, _CHUNK_NUMBERS):
            bits = flat[start : start + _CHUNK_NUMBERS]
            if bits.itemsize > 2:
                found.add(values_of(bits), np.ones(bits.size, np.int64))
                continue
            if patterns is None:
                patterns = np.zeros(1 << (8 * bits.itemsize), np.int64)
            patterns += np.bincount(bits, minlength=patterns.size)
    if patterns is not None:
        every: Bits = np.arange(patterns.size).astype(np.uint16 if patterns.size > 256 else np.uint8)
        found.add(values_of(every), patterns)
    return found
