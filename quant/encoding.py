"""What becomes of one matrix on disk: the tensors that hold it, and the pass that makes them. A format and a scheme together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]


class Output(NamedTuple):
    """A tensor that a quantized matrix is stored in. `constant` if its bytes are known before the matrix is read."""

    suffix: str  # behind the module's name: "weight_packed"
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    constant: bytes | None = None


@dataclass(frozen=True)
class Encoded:
    """The arrays behind the outputs that are no constants, in their order; and the error that was made, in sums of squares."""

    parts: tuple[NDArray[Any], ...]
    squared_error: float
    squared_sum: float


class Encoder(Protocol):
    """A scheme in a format, for matrices of `n` outputs and `k` inputs."""

    def outputs(self, n: int, k: int) -> tuple[Output, ...]:
        """Raises ValueError if a matrix of this size cannot be stored so, with the reason."""
        ...

    def encode(self, bits: Bits, in_out: bool, threads: int) -> Encoded:
        """`bits`: bf16 as uint16, [k, n] if `in_out`, else [n, k]. Raises ValueError for numbers that are not finite."""
        ...


class Decoder(Protocol):
    """The way back."""

    def decode(self, parts: Mapping[str, NDArray[Any]], n: int, k: int, threads: int = 1) -> Bits:
        """bf16 bits [n, k], from the raw bits of the outputs by suffix. Raises ValueError if they do not fit together."""
        ...


class Linear:
    """The matrix as it is, [n, k]: what a runtime wants of experts that stay, where others are quantized."""

    def __init__(self, dtype: str = "BF16") -> None:
        self.dtype = dtype

    def outputs(self, n: int, k: int) -> tuple[Output, ...]:
        return (Output("weight", self.dtype, (n, k)),)

    def encode(self, bits: NDArray[Any], in_out: bool, threads: int) -> Encoded:
        return Encoded((transposed(bits) if in_out else bits.copy(),), 0.0, 0.0)


_TILE = 64


def transposed(bits: NDArray[Any]) -> NDArray[Any]:
    """In tiles that stay in the cache: copying a transposed view touches a cache line a number."""
    k, n = bits.shape
    out = np.empty((n, k), bits.dtype)
    for i in range(0, k, _TILE):
        for j in range(0, n, _TILE * 8):
            out[j : j + _TILE * 8, i : i + _TILE] = bits[i : i + _TILE, j : j + _TILE * 8].T
    return out
