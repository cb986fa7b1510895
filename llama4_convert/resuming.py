"""Records that several files are made of: how far their CRC has come when a run is interrupted, and how the next goes on.

A record's CRC is known once all of it has been read, and with a recipe that may be files later: the experts of a layer are
neighbours in a record, and become many files. So the manifest keeps, with each finished file, the position and the CRC up to
there of every record that it has read in part. The next run continues them, and nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llama4_convert.planning import Plan, PlannedFile

Key = tuple[int, str]  # rank, record name
Running = dict[Key, tuple[int, int]]  # bytes read so far, their CRC-32


def first_reads(file: PlannedFile) -> dict[Key, int]:
    """The records that a file is made of, each with the first byte that it takes."""
    found: dict[Key, int] = {}
    for tensor in file.tensors:
        for piece in tensor.pieces:
            key = piece.rank, piece.source.record.name
            start = piece.copy.source_offset * piece.source.itemsize
            found[key] = min(start, found.get(key, start))
    return found


def resumed(plan: Plan, left: Sequence[PlannedFile], running: Mapping[Key, tuple[int, int]]) -> tuple[Plan, Running]:
    """The plan for the files that are `left`, and the CRCs to continue.

    A record can go on being checked as it is read if `running` ends where the first file that is left begins, and all files
    behind it are left too. Otherwise (a finished file was lost) it is checked beforehand, as what is not read in order is.
    """
    reads = {file.name: first_reads(file) for file in plan.files}
    names = {file.name for file in left}
    users: dict[Key, list[str]] = {}
    for file in plan.files:
        for key in reads[file.name].keys() & plan.streamed:
            users.setdefault(key, []).append(file.name)
    continued: Running = {}
    beforehand: set[Key] = set()
    for key, files in users.items():
        open_ = [name for name in files if name in names]
        if not open_:
            continue
        start = reads[open_[0]][key]
        if open_ != files[-len(open_) :] or (start and running.get(key, (0, 0))[0] != start):
            beforehand.add(key)
        elif start:
            continued[key] = running[key]
    if not beforehand:
        return plan, continued
    records = {
        (piece.rank, piece.source.record.name): piece.source.record
        for file in left
        for tensor in file.tensors
        for piece in tensor.pieces
    }
    unread = tuple((key[0], records[key]) for key in sorted(beforehand))
    return replace(plan, streamed=plan.streamed - beforehand, unread=plan.unread + unread), continued
