"""The header of a safetensors file: names, dtypes, shapes and byte offsets, checked before one of them is used."""

from __future__ import annotations

import os
from pathlib import Path

from llama4_convert.checkpoints.manifest import make_again
from llama4_convert.checkpoints.tensors import ITEM_SIZES, Record, StoredTensor, contiguous
from llama4_convert.errors import BadInput, from_os_error, one_line
from llama4_convert.files import SAFETENSORS, check_json_bounds, foreign_content, parse_json, read_start

_HEADER_LIMIT_BYTES = 100_000_000  # the bound that the safetensors library sets itself
_LENGTH_BYTES = 8  # in front of the header
_MAX_DIMENSIONS = 64  # as torch and numpy have


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Key -> tensor, in the order of the header. Each tensor is a record of its own, without a checksum.

    The safetensors library judges the header: it refuses holes, overlaps, sizes that overflow, and ranges that shapes do not
    fill. A name that occurs twice, which it would let pass, and a dtype that no Llama 4 has are refused here.
    Raises BadInput or EnvironmentFailed, naming the file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BadInput(f"{path.name} is missing: {make_again(path.parent)}")
    if found := foreign_content(read_start(path), SAFETENSORS):
        raise BadInput(f"{path.name} is {found}")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(_HEADER_LIMIT_BYTES, size - _LENGTH_BYTES):
                raise BadInput(f"{path.name} is no safetensors file, or it is cut off: {size:,} bytes")
            data = file.read(length)
            check_json_bounds(data)
            with safe_open(path, framework="numpy"):  # imports no numpy, and maps the file instead of reading it
                header = parse_json(data)
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}") from error
    except (SafetensorError, ValueError) as error:
        why = one_line(error).removeprefix("Error while deserializing header: ")
        raise BadInput(
            f"{path.name} of {size:,} bytes is damaged or cut off ({why}): {make_again(path.parent)}"
        ) from error
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    for key, entry in header.items():
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in ITEM_SIZES or len(shape) > _MAX_DIMENSIONS:
            what = dtype if dtype not in ITEM_SIZES else f"of {len(shape)} dimensions"
            raise BadInput(f"{path.name}: {key} is {what}, which no Llama 4 has: is it the right file?")
        record = Record(key, _LENGTH_BYTES + length + begin, end - begin, None)
        tensors[key] = StoredTensor(dtype, shape, contiguous(shape), 0, record)
    return tensors
