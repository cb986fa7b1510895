"""Records that several files are made of: how far their CRC has come when a run is interrupted, and how the next goes on.

A record's CRC is known once all of it has been read, and with a recipe that may be files later: the experts of a layer are
neighbours in a record, and become many files. So the manifest keeps, with each finished file, the position and the CRC up to
there of every record that it has read in part. The next run continues them, and nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from llama4_convert.planning.plan import Plan, PlannedFile, RecordKey

Running = dict[RecordKey, tuple[int, int]]  # bytes read so far, their CRC-32


def first_reads(file: PlannedFile) -> dict[RecordKey, int]:
    """The records that a file is made of, each with the first byte that it takes."""
    found: dict[RecordKey, int] = {}
    for piece in file.pieces():
        start = piece.copy.source_offset * piece.source.itemsize
        found[piece.record_key] = min(start, found.get(piece.record_key, start))
    return found


def left_to_do(plan: Plan, done: Collection[str], running: Running) -> tuple[Plan, list[PlannedFile], Running]:
    """How to go on when the files `done` are finished and `running` says how far records have been read for them.

    Returns the plan as it is carried out now, its files that are left to make, and the records whose CRC is continued.

    A record goes on being checked as it is read if `running` ends where the first file that is left begins, and all files
    behind it are left too. If it does not (a finished file was lost), all files of that record are made again: what they were
    made of was never checked to the end. A record that is not in `running` was checked to its end; if a file made of it was
    lost, the record is checked beforehand, since the run does not read all of it.
    """
    reads = {file.name: first_reads(file) for file in plan.files}
    users: dict[RecordKey, list[str]] = {}
    for file in plan.files:
        for key in reads[file.name].keys() & plan.checked_while_reading:
            users.setdefault(key, []).append(file.name)
    left = reads.keys() - set(done)
    left |= {file.made_with for file in plan.files if file.made_with and file.name in left}

    def is_broken(key: RecordKey) -> bool:
        to_come = [name for name in users[key] if name in left]
        goes_on = bool(to_come) and to_come == users[key][-len(to_come) :]
        return not (goes_on and reads[to_come[0]][key] == running[key][0]) and not left.issuperset(users[key])

    while broken := [key for key in users.keys() & running.keys() if is_broken(key)]:
        left |= {name for key in broken for name in users[key]}  # which may break others
    halfway = {key for key, files in users.items() if left.intersection(files) and not left.issuperset(files)}
    continued = {key: running[key] for key in halfway & running.keys()}
    beforehand = halfway - running.keys()
    files = [file for file in plan.files if file.name in left]
    if not beforehand:
        return plan, files, continued
    records = {piece.record_key: piece.source.record for file in files for piece in file.pieces()}
    late = tuple((key[0], records[key]) for key in sorted(beforehand))
    plan = replace(
        plan,
        checked_while_reading=plan.checked_while_reading - beforehand,
        checked_beforehand=plan.checked_beforehand + late,
    )
    return plan, files, continued
