"""Weights for the model: read from a checkpoint when they are asked for, or held in a dictionary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llama4.config import Llama4Config
from llama4.read_ahead import ReadAhead
from llama4.weights import BindingError, Bits, LogicalTensor, ShapeError, parameter_shapes

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# As torch can hold the raw bits; it has no unsigned types of these widths that it can compute with.
_SIGNED = {2: np.int16, 4: np.int32, 8: np.int64}


class Weights(Protocol):
    """Logical tensors by name (`llama4.weights.parameter_shapes`)."""

    def __getitem__(self, name: str) -> Tensor: ...

    def rows(self, name: str, index: slice | Tensor) -> Tensor:
        """Some rows of a matrix: a slice with start and stop, or those of an index [n]."""
        ...

    def expect(self, names: Iterable[str]) -> None:
        """Told what will be asked for next, in that order, and may read it ahead."""
        ...


class DictWeights(dict[str, Tensor]):
    """Everything in memory; what a trainer optimizes."""

    def rows(self, name: str, index: slice | Tensor) -> Tensor:
        return self[name][index]

    def expect(self, names: Iterable[str]) -> None:
        """All is here already."""


def to_tensor(bits: Bits, dtype: str) -> Tensor:
    """Raw bits as the numbers that they are, strides kept. `dtype` is safetensors' name. Raises BindingError."""
    if dtype not in DTYPES:
        raise BindingError(f"a tensor of dtype {dtype}, which the reference cannot compute with")
    if not bits.flags.writeable:  # torch warns about what it cannot write to
        bits = bits.copy()
    return torch.from_numpy(bits.view(_SIGNED[bits.itemsize])).view(DTYPES[dtype])


def to_bits(tensor: Tensor) -> Bits:
    """The inverse of `to_tensor`, contiguous."""
    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    bits: Bits = tensor.contiguous().view(signed).numpy().view(f"u{tensor.dtype.itemsize}")
    return bits


class LazyWeights:
    """Reads each tensor when it is asked for, checks its shape, casts it, and keeps it while there is room.

    `rounded_to` (name -> safetensors dtype) rounds some of them first, as a conversion to that dtype does. `keep_bytes` bounds
    what is kept, in bytes of the cast tensors. What came first stays: layers are walked in a circle, and of a circle that is
    too long a cache that drops the oldest would keep nothing. `ahead_bytes` bounds what is read before it is asked for, in raw
    bytes (`expect`); 0 reads nothing ahead.
    """

    def __init__(
        self,
        tensors: Iterable[LogicalTensor],
        config: Llama4Config,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        keep_bytes: int = 0,
        ahead_bytes: int = 0,
        rounded_to: Mapping[str, str] | None = None,
    ) -> None:
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.rounded_to = rounded_to or {}
        self.shapes: Mapping[str, tuple[int, ...]] = parameter_shapes(config)
        self.dtype, self.device, self.keep_bytes = dtype, torch.device(device), keep_bytes
        self._kept: dict[tuple[str, int, int], Tensor] = {}
        self._ahead = ReadAhead(self._load, self._raw_bytes, ahead_bytes)

    def __getitem__(self, name: str) -> Tensor:
        return self._slice(name, 0, self.shapes[name][0])

    def rows(self, name: str, index: slice | Tensor) -> Tensor:
        height = self.shapes[name][0]
        if isinstance(index, slice):
            return self._slice(name, *index.indices(height)[:2])
        unique, inverse = torch.unique(index, return_inverse=True)
        if unique.numel() and not 0 <= int(unique[0]) <= int(unique[-1]) < height:
            raise IndexError(f"{name} has {height} rows: no row {int(unique[0] if unique[0] < 0 else unique[-1])}")
        rows = [self._read(name, row, row + 1) for row in unique.tolist()]
        return torch.cat(rows)[inverse] if rows else self._read(name, 0, 0)

    def expect(self, names: Iterable[str]) -> None:
        self._ahead.expect(name for name in names if (name, 0, self.shapes[name][0]) not in self._kept)

    def _load(self, name: str) -> Bits:
        return self.tensors[name].load(None)

    def _raw_bytes(self, name: str) -> int:
        dtype = DTYPES.get(self.tensors[name].dtype, torch.uint8)  # others are refused once they are read
        return prod(self.shapes[name]) * dtype.itemsize

    def _slice(self, name: str, start: int, stop: int) -> Tensor:
        key = (name, start, stop)
        if key not in self._kept:
            tensor = self._read(name, start, stop)
            if tensor.nbytes > self.keep_bytes:
                return tensor
            self.keep_bytes -= tensor.nbytes
            self._kept[key] = tensor
        return self._kept[key]

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        source, shape = self.tensors[name], self.shapes[name]
        whole = (start, stop) == (0, shape[0])
        bits = self._ahead.take(name) if whole else source.load((start, stop))
        if bits.shape != (stop - start, *shape[1:]):
            raise ShapeError(
                f"{source.keys[0]} makes a {name} of {list(bits.shape)}, and the configuration calls for"
                f" {[stop - start, *shape[1:]]}"
            )
        tensor = to_tensor(bits, source.dtype)
        if name in self.rounded_to:
            tensor = tensor.to(DTYPES[self.rounded_to[name]])
        return tensor.to(self.device, self.dtype)


def initialized(config: Llama4Config, make: Callable[[str, tuple[int, ...]], Tensor]) -> DictWeights:
    """Weights in memory for a model that is not trained yet: `make(name, shape)` gives each tensor."""
    return DictWeights({name: make(name, shape) for name, shape in parameter_shapes(config).items()})
