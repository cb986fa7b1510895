"""How the tensors of a Transformers directory share safetensors files: which stay together, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.planning.file_formats import Safetensors
from llama4_convert.planning.plan import PlannedFile, PlannedTensor, RecordKey


def neighbours(tensors: Sequence[PlannedTensor], streamed: frozenset[RecordKey]) -> list[list[PlannedTensor]]:
    """Groups that stay in one file: the parts of a matrix, and consecutive tensors that read the same `streamed` record."""
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


def shards(groups: Sequence[list[PlannedTensor]], shard_size: float) -> tuple[PlannedFile, ...]:
    """Files of at most `shard_size` bytes of tensor data, but for a group that is larger; names as save_pretrained's."""
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
        PlannedFile.of(f"model-{i:05d}-of-{len(contents):05d}.safetensors", Safetensors, _in_file_order(tensors))
        for i, tensors in enumerate(contents, 1)
    )


def _in_file_order(tensors: list[PlannedTensor]) -> list[PlannedTensor]:
    """Readers map a tensor's bytes in place, so its offset must be a multiple of its item size: the widest come first.

    The parts of a matrix stay together where their sizes allow it: a part that is written later waits in memory until then.
    """

    def place(tensor: PlannedTensor) -> int:
        width = ITEM_SIZES[tensor.dtype]
        streams = tensor.part is not None and tensor.part.constant is None and not tensor.nbytes % 4 and width <= 4
        return 2 if streams else {8: 0, 4: 1, 2: 3, 1: 4}[width]

    return sorted(tensors, key=place)
