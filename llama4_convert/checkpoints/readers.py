"""Random access to the tensors of either layout, as the reference's bindings ask for it (`llama4.weights.TensorReader`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from llama4.weights import BindingError, Bits
from llama4_convert.checkpoints.meta_quantized import DequantizedView, Dequantizer
from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.errors import BadInput

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_BAND_BYTES = 1 << 20


class QuantizedTensor(Protocol):
    """What computes a tensor's numbers from codes and scales."""

    @property
    def kind(self) -> str:
        """The scheme, as recipes call it: "int4"."""
        ...


class RankReader:
    """The tensors of one rank file of Meta's layout; quantized ones as the numbers that they stand for."""

    damaged: Mapping[str, BindingError] = {}
    unknown_method: str | None = None

    def __init__(self, index: PthIndex) -> None:
        self.index = index
        self._dequantizer = Dequantizer()

    @property
    def quantized(self) -> dict[str, DequantizedView]:
        """Key -> its view of codes and scales, for the tensors that are dequantized as they are read."""
        records = ((key, tensor.record) for key, tensor in self.index.tensors.items())
        return {key: record for key, record in records if isinstance(record, DequantizedView)}

    def keys(self) -> Collection[str]:
        return self.index.tensors.keys()

    def dtype(self, key: str) -> str:
        return self.index.tensors[key].dtype

    def shape(self, key: str) -> tuple[int, ...]:
        return self.index.tensors[key].shape

    def read(self, key: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Bits:
        """The raw bits of a tensor, contiguous or not; see `TensorReader.read`."""
        whole = self._read_rows(key, rows)
        return whole if columns is None else whole[..., slice(*columns)]

    def _read_rows(self, key: str, rows: tuple[int, int] | None) -> Bits:
        tensor = self.index.tensors[key]
        start, stop = _clamped(rows, tensor.shape[0] if tensor.shape else 1)
        shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
        if 0 in shape:
            return np.empty(shape, _BITS[tensor.itemsize])
        if isinstance(tensor.record, DequantizedView):
            return self._dequantized(tensor.record, start, shape)
        span = sum((n - 1) * s for n, s in zip(shape, tensor.strides, strict=True)) + 1
        first = tensor.offset + (start * tensor.strides[0] if shape else 0)
        offset = tensor.record.offset + first * tensor.itemsize
        flat = _read(self.index.path, offset, span, tensor.itemsize)
        strides = tuple(s * tensor.itemsize for s in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, shape, strides)

    def _dequantized(self, record: DequantizedView, first: int, shape: tuple[int, ...]) -> Bits:
        """Entries of the first dimension, from `first` on, in `shape`."""
        entry = prod(shape[1:]) * 2
        start, stop = first * entry, (first + shape[0]) * entry
        begin, end = record.codes_for(start, stop)
        codes = _read(self.index.path, record.offset + begin, end - begin, 1)
        made = self._dequantizer.numbers(record, begin, codes).reshape(-1)
        skipped = start // 2 - begin * record.format.inputs_a_row
        return made[skipped : skipped + prod(shape)].reshape(shape)


class DirectoryReader:
    """The tensors of a Transformers directory.

    Of a quantized directory (`QuantizedReader`): which keys are dequantized as they are read, which of them cannot be and what
    reading them raises, and the `quant_method` of config.json, if it is none that is read here.
    """

    quantized: Mapping[str, QuantizedTensor] = {}
    damaged: Mapping[str, BindingError] = {}
    unknown_method: str | None = None

    def __init__(self, checkpoint: TransformersCheckpoint) -> None:
        self.checkpoint = checkpoint

    def keys(self) -> Collection[str]:
        return self.checkpoint.tensors.keys()

    def dtype(self, key: str) -> str:
        return self.checkpoint.tensors[key].dtype

    def shape(self, key: str) -> tuple[int, ...]:
        return self.checkpoint.tensors[key].shape

    def read(self, key: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Bits:
        """The raw bits of a tensor; see `TensorReader.read`."""
        tensor = self.checkpoint.tensors[key]
        item = ITEM_SIZES[tensor.dtype]
        file, offset = self.checkpoint.paths[key], tensor.record.offset
        if not tensor.shape:
            return _read(file, offset, 1, item).reshape(())
        start, stop = _clamped(rows, tensor.shape[0])
        row = prod(tensor.shape[1:])
        first, count = offset + start * row * item, (stop - start) * row
        if columns is None:
            return _read(file, first, count, item).reshape(stop - start, *tensor.shape[1:])
        # In bands that stay in the processor's cache: what is not wanted takes no memory.
        width, (left, right) = tensor.shape[-1], _clamped(columns, tensor.shape[-1])
        made = np.empty((stop - start, *tensor.shape[1:-1], right - left), _BITS[item])
        lines = made.reshape(count // width if width else 0, right - left)
        band = max(1, _BAND_BYTES // max(1, width * item))
        for line in range(0, len(lines), band):
            n = min(band, len(lines) - line)
            read = _read(file, first + line * width * item, n * width, item)
            lines[line : line + n] = read.reshape(n, width)[:, left:right]
        return made


CheckpointReader = RankReader | DirectoryReader


def _clamped(rows: tuple[int, int] | None, height: int) -> tuple[int, int]:
    """`rows` as a slice takes them: nothing beyond the end, where the next tensor lies."""
    start, stop = rows or (0, height)
    return min(start, height), min(stop, height)


def _read(path: Path, offset: int, count: int, itemsize: int) -> Bits:
    found: Bits = np.fromfile(path, _BITS[itemsize], count, offset=offset)
    if found.size != count:
        raise BadInput(f"{path.name} ends in the middle of a tensor: it changed or is truncated")
    return found
