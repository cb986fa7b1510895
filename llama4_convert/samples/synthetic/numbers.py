"""Random numbers with a normal distribution, the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = ("bfloat16", "float16", "float32")
_LEVELS = 1 << 16
# Numbers drawn at once: the table, the draws and the result stay in a core's cache, which doubles the speed.
_DRAW = 1 << 16


def gaussian(dtype: str, count: int, mean: float, std: float, stream: str) -> Iterator[memoryview]:
    """`count` numbers as little-endian bytes; a chunk is overwritten by the next.

    A number is one of 65,536 quantiles of the normal distribution, picked by 16 random bits: one table look-up each.
    """
    bits = np.random.SFC64(int.from_bytes(hashlib.sha256(stream.encode()).digest(), "little"))
    table = _quantiles(dtype, mean, std)
    out = np.empty(min(count, _DRAW), table.dtype)
    for start in range(0, count, _DRAW):
        n = min(_DRAW, count - start)
        levels = bits.random_raw(-(-n // 4)).view(np.uint16)[:n]
        # mode="clip" leaves out a copy that "raise" makes; no level is out of range.
        np.take(table, levels, out=out[:n], mode="clip")
        yield out[:n].data.cast("B")


@lru_cache(maxsize=8)
def _quantiles(dtype: str, mean: float, std: float) -> NDArray[np.unsignedinteger[Any]]:
    """The bit patterns of `mean + std * z` for the 65,536 quantiles z, rounded from float32 to the nearest even."""
    values = (mean + std * _standard_quantiles()).astype("<f4")
    if dtype == "float32":
        return values.view("<u4")
    if dtype == "float16":
        return values.astype("<f2").view("<u2")
    bits = values.view("<u4")
    rounded: NDArray[np.unsignedinteger[Any]] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2")


@lru_cache(maxsize=1)
def _standard_quantiles() -> NDArray[np.float64]:
    normal = NormalDist()
    return np.array([normal.inv_cdf((level + 0.5) / _LEVELS) for level in range(_LEVELS)])
