"""Casts between bf16, fp16 and fp32 on raw bytes, without torch: bf16 is the upper half of fp32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def cast(data: memoryview | bytes, source: str, target: str) -> tuple[bytes, int]:
    """The numbers in `data` (little-endian, dtype `source`) as dtype `target`, rounded to nearest, ties to even.

    Also returns how many finite numbers became infinite: fp16 ends at 65,504. NaN stays NaN.
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
