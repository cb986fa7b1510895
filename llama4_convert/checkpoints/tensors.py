"""A tensor in a file of either layout: its dtype, shape, strides, and the record of bytes that it views."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

ITEM_SIZES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}


@dataclass(frozen=True)
class Record:
    """A zip record: where its bytes lie in the file, and the CRC-32 that the directory promises for them (None: no promise)."""

    name: str
    offset: int
    size: int
    crc: int | None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint file. `offset` and `strides` count elements, `offset` from the start of the record."""

    dtype: str
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
    def is_whole_record(self) -> bool:
        """Whether the tensor is contiguous and fills its record, as torch.save writes what was not a view."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return self.offset == 0 and self.numel * self.itemsize == self.record.size


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor of this shape whose elements lie one behind the other."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

SAFETENSORS_NAMES = {name: dtype for dtype, name in TORCH_NAMES.items()}
