# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""bf16 as bits, in parts of kernels: widened, rounded to, and as the scale of a magnitude."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from quant.kernels.jit import part

MAGNITUDE = np.int16(0x7FFF)  # all bits but the sign
INFINITY = 0x7F80  # magnitudes from here on are infinite or NaN
_EPSILON = 0x3C00  # 2**-7, bf16's epsilon: compressed-tensors puts it where a scale would be 0


@part
def widened(bits):
    """bf16 bits as float32, exact."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@part
def to_bf16(value):
    """Bits of a float32 rounded to bf16, ties to even. A NaN stays one if its lower 16 bits are 0, as in a widened bf16."""
    wide = np.float32(value).view(np.uint32)
    return np.uint16((wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def stored(value, result):
    """A float32 as an element of `result`: as it is, or as bf16 bits if these are uint16. For kernels only."""
    raise NotImplementedError


@overload(stored)
def _stored(value, result):
    """Chooses by the type of `result`, when a kernel is compiled."""
    return (lambda value, result: to_bf16(value)) if result.dtype == types.uint16 else (lambda value, result: value)


@part
def scale_of(largest, code_range):
    """The scale that brings the magnitude `largest` to `code_range` (float32), both as bf16 bits; epsilon instead of 0."""
    bits = to_bf16(widened(largest) / code_range)
    return np.uint16(_EPSILON) if bits == 0 else bits
