"""NaN and infinities, counted on raw bits at the speed of memory: where there are none, two maxima say so."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# dtype -> (unsigned type, its bits of an infinity: from here on, without the sign, a number is infinite or NaN)
_FORMATS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F80_0000)}
_FP8_NAN = 0x7F  # of float8_e4m3fn, which has no infinities
_CHUNK = 1 << 20  # stays in the cache between the two


class NonFinite(NamedTuple):
    nan: int = 0
    inf: int = 0

    def __str__(self) -> str:
        told = [f"{self.nan:,} NaN"] if self.nan else []
        return " and ".join(told + ([f"{self.inf:,} infinite"] if self.inf else []))


def count(data: bytes | bytearray | memoryview, dtype: str) -> NonFinite:
    """Of the numbers in `data` (little-endian, dtype "BF16", "F16", "F32" or "F8_E4M3")."""
    if dtype == "F8_E4M3":
        return NonFinite(int(((np.frombuffer(data, np.uint8) & _FP8_NAN) == _FP8_NAN).sum()))
    unsigned, infinity = _FORMATS[dtype]
    nan = inf = 0
    for start in range(0, len(data), _CHUNK):
        bits = np.frombuffer(memoryview(data)[start : start + _CHUNK], unsigned)
        if _has_any(bits, infinity):
            magnitudes = _magnitudes(bits)
            nan += int((magnitudes > infinity).sum())
            inf += int((magnitudes == infinity).sum())
    return NonFinite(nan, inf)


def make_finite(data: bytearray, dtype: str) -> NonFinite:
    """In place: NaN becomes 0, an infinity the largest finite magnitude of `data`, with its sign. Returns how many there were."""
    unsigned, infinity = _FORMATS[dtype]
    bits = np.frombuffer(data, unsigned)
    magnitudes = _magnitudes(bits)
    is_nan, is_inf = magnitudes > infinity, magnitudes == infinity
    largest = magnitudes[magnitudes < infinity].max(initial=0)
    bits[is_inf] = (bits[is_inf] & ~_magnitude_mask(bits)) | largest
    bits[is_nan] = 0
    return NonFinite(int(is_nan.sum()), int(is_inf.sum()))


def _has_any(bits: NDArray[np.unsignedinteger], infinity: int) -> bool:
    """Positive ones are the largest as signed integers, negative ones as unsigned."""
    sign = 1 << (8 * bits.itemsize - 1)
    signed = bits.view(f"<i{bits.itemsize}")
    return bool(bits.size) and (int(signed.max()) >= infinity or int(bits.max()) >= (infinity | sign))


def _magnitude_mask(bits: NDArray[np.unsignedinteger]) -> np.unsignedinteger:
    mask: np.unsignedinteger = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    return mask


def _magnitudes(bits: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    found: NDArray[np.unsignedinteger] = bits & _magnitude_mask(bits)
    return found
