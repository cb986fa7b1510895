"""The header of a safetensors file: names, dtypes, shapes and byte offsets, checked before one of them is used."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_convert.errors import BadInput, from_os_error

_HEADER_LIMIT = 100_000_000  # the bound that the safetensors library sets itself

_WIDTHS = {8: "F64 I64 U64", 4: "F32 I32 U32", 2: "BF16 F16 I16 U16", 1: "F8_E4M3 F8_E5M2 I8 U8 BOOL"}

ITEM_SIZES = {dtype: size for size, dtypes in _WIDTHS.items() for dtype in dtypes.split()}


@dataclass(frozen=True)
class SafeTensor:
    """A tensor of a safetensors file: `offset` is its first byte, counted from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, SafeTensor]:
    """The tensors of one safetensors file. Strict: no duplicate names, no holes, no overlaps, nothing behind the end."""
    if not path.is_file():
        raise BadInput(f"{path.name} is missing: convert again, or download it again")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                raise BadInput(f"{path.name} is no safetensors file, or it is cut off: {size:,} bytes")
            raw = file.read(length)
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}") from error
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        tensors = {key: _tensor(path, entry, 8 + length) for key, entry in header.items() if key != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path.name} has a damaged header: {error}") from error
    end = 8 + length
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise BadInput(f"{path.name} has a damaged header: {key} does not begin where the tensor before it ends")
        end += tensor.nbytes
    if end != size:
        raise BadInput(f"{path.name} has {size:,} bytes and its header promises {end:,}: it is cut off or damaged")
    return tensors


def _tensor(path: Path, entry: Mapping[str, Any], base: int) -> SafeTensor:
    (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError("a size that is no natural number")
    numel = 1
    for n in shape:
        numel *= n
        if numel > 2**62:
            raise ValueError("a size beyond any disk")
    if numel * ITEM_SIZES[entry["dtype"]] != end - begin:
        raise ValueError("a shape that does not fill its bytes")
    return SafeTensor(path, entry["dtype"], shape, base + begin, end - begin)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
