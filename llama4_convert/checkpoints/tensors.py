"""A tensor in a file of either layout: its dtype, shape, strides, and the record of bytes that it views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path
from typing import Protocol

_DTYPES_BY_SIZE = {8: "F64 I64 U64", 4: "F32 I32 U32", 2: "BF16 F16 I16 U16", 1: "F8_E4M3 F8_E5M2 I8 U8 BOOL"}
# dtype, as safetensors spells it -> bytes a number
ITEM_SIZES = {dtype: size for size, dtypes in _DTYPES_BY_SIZE.items() for dtype in dtypes.split()}


@dataclass(frozen=True)
class Record:
    """A range of bytes of a file that holds a tensor or several: a record of a zip, or the bytes of a safetensors tensor."""

    name: str
    offset: int  # of its first byte in the file
    size: int  # bytes
    crc: int | None  # the CRC-32 that the archive states for them; None: it states none


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint file, as a view of a record. `offset` (in the record) and `strides` count elements."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    record: Record

    @property
    def itemsize(self) -> int:
        return ITEM_SIZES[self.dtype]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def is_whole_record(self) -> bool:
        """Whether the tensor is contiguous and fills its record, as torch.save writes what was not a view."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return self.offset == 0 and self.nbytes == self.record.size


class TensorFile(Protocol):
    """An opened file of tensors, in either layout: its index, without its data."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor of this shape whose elements lie one behind the other."""
    return tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else ()


def span(shape: Iterable[int], strides: Iterable[int]) -> int:
    """Elements from the first to the end of the last one, of a tensor in which no dimension is 0."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


# The dtypes that weights are converted in, and their names in torch.
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

SAFETENSORS_NAMES = {name: dtype for dtype, name in TORCH_NAMES.items()}
