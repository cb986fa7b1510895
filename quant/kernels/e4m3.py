# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Rounding to e4m3 (float8_e4m3fn) by arithmetic on float32, in parts of kernels.

A magnitude plus the float32 whose last bit is worth e4m3's last bit there ("the rounder") is rounded to e4m3, ties to even.
"""

from __future__ import annotations

import numpy as np

from quant.kernels.jit import part

LARGEST = np.float32(448)
_LARGEST_BITS = np.uint32(0x43E00000)
_TO_ROUNDER = np.uint32((23 - 3) << 23)  # from a magnitude's power of two to its rounder
_LEAST_ROUNDER = np.uint32(0x46800000)  # 2**14, the rounder of e4m3's smallest exponent: multiples of 2**-9
OFFSET = 0x468  # what `code` adds to a code: the upper bits of the least rounder
_EXPONENT, _NO_SIGN = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)


@part
def magnitude(value):
    """|value|, limited to 448."""
    bits = min(np.float32(value).view(np.uint32) & _NO_SIGN, _LARGEST_BITS)
    return np.uint32(bits).view(np.float32)


@part
def sign(value):
    """The sign of a float32, as its highest bit."""
    return np.float32(value).view(np.uint32) & _SIGN


@part
def rounder(magnitude):
    """See the module's docstring."""
    power = np.float32(magnitude).view(np.uint32) & _EXPONENT
    return np.uint32(max(power + _TO_ROUNDER, _LEAST_ROUNDER)).view(np.float32)


@part
def code(total, rounder):
    """The code of total - rounder, plus OFFSET: the exponent is the rounder's, what was added counts mantissas."""
    bits = np.float32(rounder).view(np.uint32)
    return np.uint32((bits >> np.uint32(20)) + (np.float32(total).view(np.uint32) - bits))
