"""The operations whose results are equal on every device; the package's docstring gives the reasons."""

from __future__ import annotations

import torch
from torch import Tensor

MAGNITUDE, SIGN = 0x7FFF, -0x8000  # of bf16 as int16
INFINITY = 0x7F80  # magnitudes from here on are infinite or NaN
_EPSILON = 0x3C00  # 2**-7, where a scale would be 0


def number(value: float, device: torch.device) -> Tensor:
    """`value` as a float32 tensor on the device: CUDA multiplies with the inverse of any other divisor."""
    return torch.tensor(value, dtype=torch.float32, device=device)


def inverse_of(values: Tensor) -> Tensor:
    """1 / values, by a true division on every device."""
    return torch.div(torch.ones_like(values), values)


def floats(bits: Tensor) -> Tensor:
    """bf16 bits to float32."""
    return (bits.to(torch.int32) << 16).view(torch.float32)


def to_bf16(values: Tensor) -> Tensor:
    """Bits of float32 that are not negative rounded to bf16, ties to even, as int32."""
    wide = values.contiguous().view(torch.int32)
    return (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16


def scale_bits(largest: Tensor, range_: float) -> Tensor:
    """The scale that brings a magnitude to `range_`, both as bf16 bits; epsilon instead of 0."""
    bits = to_bf16(torch.div(floats(largest), number(range_, largest.device)))
    return torch.where(bits == 0, _EPSILON, bits)


def in_order(terms: Tensor) -> Tensor:
    """Sums over the middle axis, in its order."""
    total = torch.zeros_like(terms[:, 0])
    for term in terms.unbind(1):
        total += term
    return total


def total_of(sums: Tensor, unit: Tensor) -> float:
    """The total of sums of squares, each in units of its own scale `unit`, in float64."""
    return float((sums.double() * unit.double().square()).sum())
