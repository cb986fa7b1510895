"""The index of one `.pth` file: an uncompressed zip whose `data.pkl` describes tensors as views of `data/N` records.

`PthIndex.read` touches the zip directory, the pickle and 30 bytes a record, never tensor data. It is strict: whatever it does
not understand, and whatever two parts of the file state differently, is an error that names the file and the record.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

from llama4_convert.checkpoints.inert_pickle import Opaque, RefusedPickle, Storage, TensorView, read_state_dict
from llama4_convert.checkpoints.tensors import ITEM_SIZES, Record, StoredTensor, TensorFile
from llama4_convert.errors import BadInput, from_os_error
from llama4_convert.files import START_BYTES, TORCH_ZIP, foreign_content
from llama4_convert.progress import Progress

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
# Scout's pickle has some 200 KB; anything near this limit is no state dict of a Llama 4.
_PICKLE_LIMIT = 16 << 20
_DIRECTORY_LIMIT = 8 << 20  # Scout's has 110 KB
_NOTE_LIMIT = 64 << 10  # torch's notes to itself have some bytes each
_MAX_NOTES = 100
_READ_BYTES = 1 << 20  # stays in the processor's cache between reading and checking


@dataclass(frozen=True)
class PthIndex:
    """What one `.pth` file holds. `others` are the keys of entries that are no tensors; nothing needs their values."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    others: tuple[str, ...]
    records: tuple[Record, ...]  # every storage record
    fingerprint: str  # SHA-256 over names, sizes and CRCs of all records: identifies the content without reading it
    notes: tuple[str, ...] = ()  # what a user should know of how it is read

    @staticmethod
    def read(path: Path) -> PthIndex:
        """Raises BadInput (damaged, not a torch zip, refused pickle) or EnvironmentFailed (cannot be read)."""
        if not path.is_file():  # a link of a download cache whose target is gone, say
            raise BadInput(f"{path.name} is no file, or a link to nothing: fetch it again")
        try:
            with open(path, "rb") as file:
                return _read(path, file.fileno(), os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise from_os_error(error, f"reading {path.name}") from error


class DamagedRecord(BadInput):
    """The bytes of a record do not match the CRC of its archive. `path` is the archive's, `record` the record's name."""

    def __init__(self, index: TensorFile, record: Record) -> None:
        keys = [key for key, tensor in index.tensors.items() if tensor.record.name == record.name]
        super().__init__(
            f"{index.path.name}: {keys[0] if keys else record.name} is damaged (its bytes do not match the archive's CRC):"
            " fetch the file again"
        )
        self.path, self.record = index.path, record.name


def check_records(index: TensorFile, records: Iterable[Record], progress: Progress) -> None:
    """Read records only to compare their CRCs; `progress` counts bytes.

    Raises DamagedRecord, BadInput (the file ends early) or EnvironmentFailed (it cannot be read).
    """
    buffer = memoryview(bytearray(_READ_BYTES))
    try:
        with open(index.path, "rb", buffering=0) as file:
            for record in records:
                file.seek(record.offset)
                left, crc = record.size, 0
                while left:
                    n = file.readinto(buffer[: min(left, _READ_BYTES)])
                    if not n:
                        raise BadInput(truncated(index.path))
                    left, crc = left - n, crc32(buffer[:n], crc)
                    progress(n)
                if record.crc is not None and crc != record.crc:
                    raise DamagedRecord(index, record)
    except OSError as error:
        raise from_os_error(error, f"reading {index.path.name}") from error


def truncated(path: Path) -> str:
    """The message for a file that ends before a record that its directory lists."""
    return f"{path.name} ends in the middle of a tensor: it changed or is truncated"


def _read(path: Path, fd: int, file_size: int) -> PthIndex:
    if file_size == 0:
        raise BadInput(f"{path.name} is empty: fetch it again")
    if found := foreign_content(os.pread(fd, START_BYTES, 0), TORCH_ZIP):
        raise BadInput(f"{path.name} is {found}")
    records = _records(path, fd, file_size)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise BadInput(f"{path.name} is not a torch checkpoint: the archive has no data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    byteorder = records.get(prefix + "byteorder")
    if byteorder and _content(path, fd, byteorder, 64) != b"little":
        raise BadInput(f"{path.name}: the tensors are not little-endian, which this tool cannot read")
    try:
        state = read_state_dict(_content(path, fd, records[pickles[0]], _PICKLE_LIMIT))
    except RefusedPickle as error:
        raise BadInput(f"{path.name}: data.pkl refused: {error}") from error
    state, notes = _inner_state_dict(path, state)

    tensors: dict[str, StoredTensor] = {}
    others = []
    for key, value in state.items():
        if isinstance(value, TensorView):
            tensors[key] = _stored(path, key, value, records.get(f"{prefix}data/{value.storage.key}"))
        elif isinstance(value, Opaque) or value is None:
            others.append(key)
        else:
            raise BadInput(f"{path.name}: {key} is a {type(value).__name__}, not a tensor")
    data = tuple(record for name, record in records.items() if name.startswith(prefix + "data/"))
    beside = set(records.values()) - {*data, records[pickles[0]]}  # torch's to itself: versions, an id
    if len(beside) > _MAX_NOTES:
        raise BadInput(f"{path.name} has {len(beside):,} records beside its tensors, more than torch.save writes")
    for record in beside:
        _content(path, fd, record, _NOTE_LIMIT)
    listing = "".join(f"{r.name.removeprefix(prefix)} {r.size} {r.crc:08x}\n" for r in records.values())
    return PthIndex(path, tensors, tuple(others), data, hashlib.sha256(listing.encode()).hexdigest(), notes)


def _inner_state_dict(path: Path, state: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The state dict, if trainers have put it into a dictionary of more: {"model": {...}, "step": 1000}; and what is left out."""
    inside = [
        name
        for name, value in state.items()
        if isinstance(value, dict) and any(isinstance(tensor, TensorView) for tensor in value.values())
    ]
    if not inside or any(isinstance(value, TensorView) for value in state.values()):
        return state, ()
    if len(inside) > 1:
        raise BadInput(
            f"{path.name} holds several state dicts ({', '.join(inside[:3])}): save the one that is meant alone"
        )
    found = state[inside[0]]
    if not all(isinstance(key, str) for key in found):
        raise BadInput(f"{path.name}: {inside[0]} is no state dict, it has keys that are no names")
    others = [name for name in state if name != inside[0]]
    left = f", without {', '.join(others[:5])} beside it" if others else ""
    return found, (f"{path.name} holds its state dict in a dictionary, under {inside[0]!r}: that is read{left}",)


class _BoundedReader(io.FileIO):
    """A file for zipfile, which reads the directory at once, however large the archive says that it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _DIRECTORY_LIMIT:
            raise zipfile.BadZipFile(f"its directory has {size:,} bytes, more than any checkpoint's")
        return super().read(size) or b""


def _records(path: Path, fd: int, file_size: int) -> dict[str, Record]:
    """The zip directory, checked against the local headers: readers of torch trust either one, so they must agree."""
    try:
        with _BoundedReader(os.dup(fd)) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, OverflowError) as error:
        raise BadInput(
            f"{path.name} is not a complete torch zip archive ({error}): it is truncated or no checkpoint; fetch it again"
        ) from error
    twice = [name for name, n in Counter(e.filename for e in entries).items() if n > 1]
    if twice:
        raise BadInput(f"{path.name}: the archive names {twice[0]!r} twice")
    records: dict[str, Record] = {}
    for entry in entries:
        where = f"{path.name}: record {entry.filename!r:.100}"
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise BadInput(f"{where} is compressed or encrypted, which torch.save never does")
        if not 0 <= entry.header_offset <= file_size - _LOCAL_HEADER.size:
            raise BadInput(f"{where} lies outside the file: it is truncated; fetch it again")
        raw = os.pread(fd, _LOCAL_HEADER.size, entry.header_offset)
        magic, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL_HEADER.unpack(raw)
        name = os.pread(fd, name_length, entry.header_offset + _LOCAL_HEADER.size)
        if (
            magic != b"PK\3\4"
            or method
            or name != entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        ):
            raise BadInput(f"{where}: its local header contradicts the directory; fetch the file again")
        streamed = flags & 8  # sizes and CRC follow the data; zip64 puts the sizes elsewhere
        sizes = (entry.file_size, 0xFFFFFFFF)
        if not streamed and (crc != entry.CRC or packed not in sizes or size not in sizes):
            raise BadInput(f"{where}: its local header contradicts the directory; fetch the file again")
        start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if start + entry.file_size > file_size:
            raise BadInput(f"{where} ends beyond the file: it is truncated; fetch it again")
        records[entry.filename] = Record(entry.filename, start, entry.file_size, entry.CRC)
    in_order = sorted(entries, key=lambda e: e.header_offset)
    for before, after in itertools.pairwise(in_order):
        record = records[before.filename]
        if record.offset + record.size > after.header_offset:
            raise BadInput(f"{path.name}: records {before.filename!r:.80} and {after.filename!r:.80} overlap")
    return records


def _content(path: Path, fd: int, record: Record, limit: int) -> bytes:
    """The bytes of a small record, checked against its CRC."""
    if record.size > limit:
        raise BadInput(f"{path.name}: record {record.name!r} has {record.size:,} bytes, more than any checkpoint needs")
    data = os.pread(fd, record.size, record.offset)
    if len(data) != record.size or zlib.crc32(data) != record.crc:
        raise BadInput(f"{path.name}: record {record.name!r} is damaged (CRC differs): fetch the file again")
    return data


def _stored(path: Path, key: str, view: TensorView, record: Record | None) -> StoredTensor:
    """The view as bytes of its record, bounds checked: no tensor reaches outside its storage."""
    storage: Storage = view.storage
    if record is None:
        raise BadInput(f"{path.name}: {key} refers to storage {storage.key!r:.40}, which the archive lacks")
    if storage.numel * ITEM_SIZES[storage.dtype] != record.size:
        raise BadInput(f"{path.name}: {key}: the pickle and the archive disagree on the size of its storage")
    last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))
    if 0 not in view.shape and (last + 1) * ITEM_SIZES[view.dtype] > record.size:
        raise BadInput(f"{path.name}: {key} reaches beyond its storage")
    return StoredTensor(view.dtype, view.shape, view.stride, view.offset, record)
