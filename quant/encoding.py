"""How one matrix is stored: the tensors that it becomes, and the pass that makes them. An encoder is a scheme in a format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]


class Output(NamedTuple):
    """A tensor of a quantized matrix. `constant`: its bytes, if they are known before the matrix is read."""

    suffix: str  # behind the module's name: "weight_packed"
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    constant: bytes | None = None


@dataclass(frozen=True)
class Encoded:
    """The arrays of the outputs that are no constants, in their order; and the error, in sums of squares."""

    parts: tuple[NDArray[Any], ...]
    squared_error: float
    squared_sum: float


class Encoder(Protocol):
    """A scheme in a format, for matrices of `n` outputs and `k` inputs."""

    def outputs(self, n: int, k: int) -> tuple[Output, ...]:
        """The tensors of a matrix of this size. Raises ValueError with the reason if it cannot be stored in this format."""
        ...

    def encode(self, bits: Bits, in_out: bool, threads: int) -> Encoded:
        """Encodes bf16 bits (uint16), [k, n] if `in_out`, else [n, k]. Raises ValueError for numbers that are not finite."""
        ...


class Decoder(Protocol):
    """From the tensors of a quantized matrix back to bf16."""

    def decode(self, parts: Mapping[str, NDArray[Any]], n: int, k: int, threads: int = 1) -> Bits:
        """bf16 bits [n, k], from the raw bits of the outputs by suffix. Raises ValueError if they do not fit together."""
        ...


class Linear:
    """The matrix as it is, [n, k]: how a runtime expects experts that are not quantized, beside experts that are."""

    def __init__(self, dtype: str = "BF16") -> None:
        self.dtype = dtype

    def outputs(self, n: int, k: int) -> tuple[Output, ...]:
        return (Output("weight", self.dtype, (n, k)),)

    def encode(self, bits: NDArray[Any], in_out: bool, threads: int) -> Encoded:
        return Encoded((transposed(bits) if in_out else bits.copy(),), 0.0, 0.0)


_TILE_ROWS, _TILE_COLUMNS = 64, 512  # numbers of the matrix that are transposed together


def transposed(bits: NDArray[Any]) -> NDArray[Any]:
    """[k, n] as contiguous [n, k].

    In tiles that stay in the cache: a plain copy of the transposed view touches a cache line for each number.
    """
    k, n = bits.shape
    out = np.empty((n, k), bits.dtype)
    for i in range(0, k, _TILE_ROWS):
        for j in range(0, n, _TILE_COLUMNS):
            out[j : j + _TILE_COLUMNS, i : i + _TILE_ROWS] = bits[i : i + _TILE_ROWS, j : j + _TILE_COLUMNS].T
    return out
