"""Which source records a run reads once, whole and front to back, so that their CRC is checked on the way.

All others (replicas on other ranks, dropped entries, transposed routers, views of a shared storage) are read once before.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.checkpoints.tensors import Record
from llama4_convert.checkpoints.transformers import SafetensorsIndex
from llama4_convert.planning.plan import Piece, RecordKey


class SourceFiles(Protocol):
    """What a source is read from: its ranks (and files of scales), or its shards."""

    @property
    def archives(self) -> Sequence[PthIndex | SafetensorsIndex]: ...


def streamed_records(order: Iterable[tuple[Piece, ...]], source: SourceFiles) -> frozenset[RecordKey]:
    """The records that are read once, whole and front to back, in this order, so that their CRC can be checked on the way."""
    users: Counter[RecordKey] = Counter()
    for rank, index in enumerate(source.archives):
        users.update((rank, tensor.record.name) for tensor in index.tensors.values())
    reads: dict[RecordKey, list[Piece]] = defaultdict(list)
    for pieces in order:
        for piece in pieces:
            reads[piece.record_key].append(piece)

    def in_order(pieces: list[Piece]) -> bool:
        position = 0
        for piece in pieces:
            if not piece.is_sequential or piece.copy.source_offset != position:
                return False
            position += piece.numel
        return position * pieces[0].source.itemsize == pieces[0].source.record.size

    return frozenset(
        record
        for record, pieces in reads.items()
        if users[record] == 1
        and pieces[0].source.is_whole_record
        and all(piece.source is pieces[0].source for piece in pieces)  # else it is read as codes and as numbers
        and in_order(pieces)
    )


def unread_records(
    source: MetaCheckpoint, streamed: frozenset[RecordKey], skipped: set[str]
) -> tuple[tuple[int, Record], ...]:
    left_out = {
        (rank, index.tensors[key].record.name)
        for rank, index in enumerate(source.ranks)
        for key in skipped
        if key in index.tensors
    }
    return tuple(
        (rank, record)
        for rank, record in source.records()
        if (rank, record.name) not in streamed and (rank, record.name) not in left_out
    )
