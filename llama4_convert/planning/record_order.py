"""Which records a run reads once, whole and front to back, so that it checks their CRC while it reads.

All other records with a CRC (replicas of other ranks, dropped tensors, transposed routers, views of a shared storage) are read
once beforehand, only to be checked.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from llama4_convert.checkpoints.meta_quantized import DequantizedView
from llama4_convert.planning.binding import BoundSource
from llama4_convert.planning.plan import Piece, RecordKey


def checked_while_reading(source: BoundSource, pieces: Iterable[Piece]) -> frozenset[RecordKey]:
    """The records with a CRC that `pieces`, in the order of a run, go through front to back."""
    users: Counter[RecordKey] = Counter()
    for number, index in enumerate(source.files):
        for tensor in index.tensors.values():
            users[number, tensor.record.name] += 1
            if isinstance(tensor.record, DequantizedView):  # a read of the view reads the scales, too
                users[tensor.record.scales_archive, tensor.record.scales.record.name] += 1
    pieces_of: dict[RecordKey, list[Piece]] = defaultdict(list)
    for piece in pieces:
        if piece.source.record.crc is not None:
            pieces_of[piece.record_key].append(piece)

    def is_in_order(pieces: list[Piece]) -> bool:
        position = 0
        for piece in pieces:
            if not piece.is_sequential or piece.copy.source_offset != position:
                return False
            position += piece.numel
        return position * pieces[0].source.itemsize == pieces[0].source.record.size

    return frozenset(
        key
        for key, pieces in pieces_of.items()
        if users[key] == 1
        and pieces[0].source.is_whole_record
        and all(piece.source is pieces[0].source for piece in pieces)  # else it is read as codes and as numbers
        and is_in_order(pieces)
    )
