"""The index of a directory in Transformers' layout: config.json and the headers of its safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints.small_files import is_file_name, read_small
from llama4_convert.errors import BadInput, UsageError, from_os_error

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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


@dataclass(frozen=True)
class TransformersCheckpoint:
    path: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, SafeTensor]

    @staticmethod
    def open(path: Path) -> TransformersCheckpoint:
        """Read config.json, the index and every header. Raises UsageError, BadInput or EnvironmentFailed."""
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} has neither params.json (Meta's layout) nor config.json (Transformers')")
        config = json_object(path / "config.json")
        if (path / INDEX).exists():
            weight_map = json_object(path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise BadInput(f"{INDEX} has no weight_map: convert again, or download it again")
            names = sorted({str(name) for name in weight_map.values()})
        elif (path / SINGLE).exists():
            weight_map, names = None, [SINGLE]
        else:
            raise BadInput(f"{path} has no {INDEX}: the conversion is unfinished, run it again")
        for name in names:
            if not is_file_name(name):
                raise BadInput(f"{INDEX} names a file that is not in the directory: {name!r:.80}")
        tensors: dict[str, SafeTensor] = {}
        for name in names:
            for key, tensor in read_header(path / name).items():
                if weight_map is not None and weight_map.get(key) != name:
                    raise BadInput(f"{INDEX} does not say that {key} is in {name}, where it is")
                tensors[key] = tensor
        absent = sorted((weight_map or {}).keys() - tensors.keys())
        if absent:
            raise BadInput(f"{INDEX} promises {absent[0]} in {(weight_map or {})[absent[0]]}, which lacks it")
        return TransformersCheckpoint(path, config, tuple(path / name for name in names), tensors)


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


def json_object(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(read_small(path))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(body, dict):
        raise BadInput(f"{path.name} holds no JSON object")
    return body
