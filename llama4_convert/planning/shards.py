"""How tensors share safetensors files: what must stay in one, in which order they lie there, and the header in front of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.planning.plan import PlannedFile, PlannedTensor, RecordKey

# A header that fills whole pages keeps the tensors behind it aligned for direct I/O and for mmap.
_PAGE = 4096


def groups_of(tensors: Sequence[PlannedTensor], streamed: frozenset[RecordKey]) -> list[list[PlannedTensor]]:
    """What stays in one file: the parts of a matrix, and neighbours that read the same record."""
    groups: list[list[PlannedTensor]] = []
    seen: set[RecordKey] = set()
    for tensor in tensors:
        records = {piece.record_key for piece in tensor.pieces} & streamed
        last = groups[-1][-1].part if groups else None
        if groups and (records & seen or (tensor.part and last and tensor.part.matrix is last.matrix)):
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
            seen = set()
        seen |= records
    return groups


def files_of(groups: Sequence[list[PlannedTensor]], shard_size: float) -> tuple[PlannedFile, ...]:
    contents: list[list[PlannedTensor]] = []
    room = 0.0
    for group in groups:
        size = sum(t.nbytes for t in group)
        if not contents or size > room:
            contents.append([])
            room = shard_size
        contents[-1].extend(group)
        room -= size
    return tuple(
        _file(f"model-{i:05d}-of-{len(contents):05d}.safetensors", tensors) for i, tensors in enumerate(contents, 1)
    )


def _in_file_order(tensors: list[PlannedTensor]) -> list[PlannedTensor]:
    """Readers view a tensor's bytes in place, so its offset must be a multiple of its item size: widest first.

    But the parts of a matrix stay together where their sizes allow it: what comes later waits in memory until then.
    """

    def place(tensor: PlannedTensor) -> int:
        width = ITEM_SIZES[tensor.dtype]
        streams = tensor.part is not None and tensor.part.constant is None and not tensor.nbytes % 4 and width <= 4
        return 2 if streams else {8: 0, 4: 1, 2: 3, 1: 4}[width]

    return sorted(tensors, key=place)


def _file(name: str, tensors: list[PlannedTensor]) -> PlannedFile:
    tensors = _in_file_order(tensors)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-(8 + len(body)) % _PAGE)
    header = len(body).to_bytes(8, "little") + body
    placed, position = [], len(header)
    for tensor in tensors:
        placed.append(replace(tensor, offset=position))
        position += tensor.nbytes
    return PlannedFile(name, header, tuple(placed))
