"""Numbers as raw bytes, without torch: casts between bf16, fp16 and fp32, and counting what is not finite."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def cast(data: memoryview | bytes, source: str, target: str) -> tuple[bytes, int]:
    """The numbers in `data` (little-endian, dtype `source`) as bytes of dtype `target`, rounded to nearest, ties to even.

    "BF16", "F16" and "F32" are known. Also returns how many finite numbers became infinite: fp16 ends at 65,504. NaN stays NaN.
    """
    wide = widened(np.frombuffer(data, dtype=_NUMPY[source]), source)
    if target == "F32":
        return wide.tobytes(), 0
    if target == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            half = wide.astype(np.float16)
        return half.tobytes(), int(np.isfinite(wide).sum()) - int(np.isfinite(half).sum())
    brain = _to_bf16(wide)
    not_finite = int(((brain & 0x7F80) == 0x7F80).sum())
    return brain.tobytes(), not_finite and not_finite - int((~np.isfinite(wide)).sum())


def widened(bits: NDArray[np.generic], source: str) -> NDArray[np.float32]:
    """The numbers behind `bits`, an array of `source`'s item size, as fp32: exact."""
    if source == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(_NUMPY[source]).astype(np.float32)


def _to_bf16(wide: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = wide.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    # Rounding could carry a NaN's mantissa over into infinity or wrap its sign: keep its upper bits, made quiet.
    if (is_nan := np.isnan(wide)).any():
        rounded[is_nan] = (bits[is_nan] >> 16) | 0x40
    return rounded.astype(np.uint16)


# dtype -> (unsigned type, its bits of an infinity: from here on, without the sign, a number is infinite or NaN)
_FORMATS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F80_0000)}

_FP8_NAN_BITS = 0x7F  # of float8_e4m3fn, which has no infinities

_CHUNK_BYTES = 1 << 20  # stays in the processor's cache between looking and counting


class NonFinite(NamedTuple):
    """How many NaN and how many infinities."""

    nan: int = 0
    inf: int = 0

    def __str__(self) -> str:
        counts = ((self.nan, "NaN"), (self.inf, "infinite"))
        return " and ".join(f"{n:,} {what}" for n, what in counts if n)


def count_nonfinite(data: bytes | bytearray | memoryview, dtype: str) -> NonFinite:
    """Counts what is not finite in `data` (little-endian numbers of dtype "BF16", "F16", "F32" or "F8_E4M3")."""
    if dtype == "F8_E4M3":
        return NonFinite(int(((np.frombuffer(data, np.uint8) & _FP8_NAN_BITS) == _FP8_NAN_BITS).sum()))
    unsigned, infinity = _FORMATS[dtype]
    nan = inf = 0
    for start in range(0, len(data), _CHUNK_BYTES):
        bits = np.frombuffer(memoryview(data)[start : start + _CHUNK_BYTES], unsigned)
        if _has_any(bits, infinity):
            magnitudes = _magnitudes(bits)
            nan += int((magnitudes > infinity).sum())
            inf += int((magnitudes == infinity).sum())
    return NonFinite(nan, inf)


def make_finite(data: bytearray, dtype: str) -> NonFinite:
    """Replaces in `data`, in place, NaN by 0 and an infinity by the largest finite magnitude of `data`, with its sign.

    `data`: little-endian numbers of dtype "BF16", "F16" or "F32". Returns how many were replaced.
    """
    unsigned, infinity = _FORMATS[dtype]
    bits = np.frombuffer(data, unsigned)
    magnitudes = _magnitudes(bits)
    is_nan, is_inf = magnitudes > infinity, magnitudes == infinity
    largest = magnitudes[magnitudes < infinity].max(initial=0)
    bits[is_inf] = (bits[is_inf] & ~_magnitude_mask(bits)) | largest
    bits[is_nan] = 0
    return NonFinite(int(is_nan.sum()), int(is_inf.sum()))


def _has_any(bits: NDArray[np.unsignedinteger], infinity: int) -> bool:
    """Whether a number is infinite or NaN: positive ones are the largest as signed integers, negative ones as unsigned."""
    sign = 1 << (8 * bits.itemsize - 1)
    signed = bits.view(f"<i{bits.itemsize}")
    return bool(bits.size) and (int(signed.max()) >= infinity or int(bits.max()) >= (infinity | sign))


def _magnitude_mask(bits: NDArray[np.unsignedinteger]) -> np.unsignedinteger:
    mask: np.unsignedinteger = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    return mask


def _magnitudes(bits: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    found: NDArray[np.unsignedinteger] = bits & _magnitude_mask(bits)
    return found
