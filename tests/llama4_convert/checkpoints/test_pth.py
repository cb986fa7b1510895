"""The index of a `.pth` file: it finds every byte that torch.save wrote, and refuses a file whose parts contradict each other."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided

from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.checkpoints.tensors import StoredTensor
from llama4_convert.errors import BadInput

PROTOCOLS = [2, 4, 5]
BASE = torch.arange(60, dtype=torch.float32).reshape(5, 12)
STATES: dict[str, dict[str, torch.Tensor]] = {
    "contiguous": {"a": BASE.clone(), "b": torch.arange(7).to(torch.bfloat16)},
    "views of one storage": {"row": BASE[2], "turned": BASE.T, "step": BASE[1::2, ::3], "whole": BASE},
    "one tensor twice": {"a": BASE, "b": BASE},
    "expanded": {"a": torch.arange(3.0)[:, None].expand(3, 4)},
    "parameters": dict(torch.nn.Linear(3, 5).state_dict()) | {"p": torch.nn.Parameter(BASE.clone())},
    "scalar": {"a": torch.tensor(3.0), "b": BASE[4, 11]},
    "empty": {"a": torch.zeros(0, 4), "b": BASE[:, 3:3]},
} | {
    str(dtype).removeprefix("torch."): {"a": (torch.arange(24) - 3).to(dtype).reshape(4, 6)[1:, 2:]}
    for dtype in (
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
        *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn),
    )
}


def save(path: Path, state: Any, protocol: int = 2) -> Path:
    torch.save(state, path, pickle_protocol=protocol)
    return path


def values(path: Path, stored: StoredTensor) -> bytes:
    """The elements of a tensor in order, read by the index alone."""
    record = path.read_bytes()[stored.record.offset : stored.record.offset + stored.record.size]
    assert zlib.crc32(record) == stored.record.crc
    flat = np.frombuffer(record, f"V{stored.itemsize}")[stored.offset :]
    return as_strided(flat, stored.shape, [s * stored.itemsize for s in stored.strides]).tobytes()


# -- what is there


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", STATES)
def test_the_index_finds_every_element_that_torch_saved(case: str, protocol: int, tmp_path: Path) -> None:
    state = STATES[case]
    path = save(tmp_path / "x.pth", OrderedDict(state), protocol)
    index = PthIndex.read(path)
    assert list(index.tensors) == list(state)
    assert index.others == ()
    for key, tensor in state.items():
        stored = index.tensors[key]
        assert stored.shape == tuple(tensor.shape)
        assert stored.strides == tensor.stride()
        assert stored.offset == tensor.storage_offset()
        expected = tensor.detach().contiguous().flatten().view(torch.uint8) if tensor.numel() else torch.empty(0)
        assert values(path, stored) == expected.numpy().tobytes()


def test_shared_storages_are_one_record(tmp_path: Path) -> None:
    index = PthIndex.read(save(tmp_path / "x.pth", STATES["views of one storage"]))
    assert len(index.records) == 1
    assert {t.record for t in index.tensors.values()} == set(index.records)


def test_entries_that_are_no_tensors_are_listed(tmp_path: Path) -> None:
    state = {"w": BASE, "w._extra_state": io.BytesIO(b"opaque"), "none": None}
    index = PthIndex.read(save(tmp_path / "x.pth", state))
    assert (list(index.tensors), index.others) == (["w"], ("w._extra_state", "none"))


def test_an_entry_that_a_checkpoint_has_no_use_for_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="step is a int, not a tensor"):
        PthIndex.read(save(tmp_path / "x.pth", {"w": BASE, "step": 3}))
    with pytest.raises(BadInput, match="optimizer is a dict"):
        PthIndex.read(save(tmp_path / "x.pth", {"w": BASE, "optimizer": {"w": BASE}}))


def test_whole_records_are_told_from_views(tmp_path: Path) -> None:
    state = {"all": BASE, "row": BASE[2], "turned": BASE.T, "head": BASE[:2], "other": torch.zeros(1, 3)}
    tensors = PthIndex.read(save(tmp_path / "x.pth", state)).tensors
    assert {key for key, tensor in tensors.items() if tensor.is_whole_record} == {"all", "other"}


def test_the_fingerprint_is_the_contents_not_the_names(tmp_path: Path) -> None:
    one, same = save(tmp_path / "a.pth", {"w": BASE}), save(tmp_path / "b.pth", {"w": BASE})
    assert PthIndex.read(one).fingerprint == PthIndex.read(same).fingerprint
    changed = BASE.clone()
    changed[0, 0] = 7
    assert PthIndex.read(save(tmp_path / "c.pth", {"w": changed})).fingerprint != PthIndex.read(one).fingerprint


# -- what is damaged. Archives by hand: `{"w": 2 floats}`.


def pkl(*, offset: int = 0, shape: int = 2, stride: int = 1, numel: int = 2, kind: str = "FloatStorage") -> bytes:
    storage = f"(Vstorage\nctorch\n{kind}\nV0\nVcpu\nI{numel}\ntQ"
    view = f"{storage}I{offset}\n(I{shape}\nt(I{stride}\nt"
    call = f"ctorch._utils\n_rebuild_tensor_v2\n({view}I00\nccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}Vw\n" + call.encode() + b"s."


FLOATS = np.array([1.0, 2.0], np.float32).tobytes()
Entry = tuple[str, bytes]


def entries(data_pkl: bytes | None = None, byteorder: bytes = b"little") -> list[Entry]:
    return [("x/data.pkl", data_pkl or pkl()), ("x/byteorder", byteorder), ("x/data/0", FLOATS), ("x/version", b"3\n")]


def archive(contents: list[Entry], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in contents:
            file.writestr(name, data)
    return buffer.getvalue()


def read(tmp_path: Path, raw: bytes) -> PthIndex:
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(raw)
    return PthIndex.read(path)


def headers(raw: bytes, name: str) -> tuple[int, int]:
    """(local header, directory entry) of a record."""
    local, central = raw.index(b"PK\3\4"), raw.index(b"PK\1\2")
    while raw[local + 30 : local + 30 + len(name)] != name.encode():
        local = raw.index(b"PK\3\4", local + 1)
    while raw[central + 46 : central + 46 + len(name)] != name.encode():
        central = raw.index(b"PK\1\2", central + 1)
    return local, central


def patched(raw: bytes, at: int, fmt: str, value: int | bytes) -> bytes:
    changed = bytearray(raw)
    struct.pack_into(fmt, changed, at, value)
    return bytes(changed)


def test_the_archive_by_hand_is_a_good_one(tmp_path: Path) -> None:
    index = read(tmp_path, archive(entries()))
    assert values(index.path, index.tensors["w"]) == FLOATS


def test_every_truncation_is_refused_with_the_files_name(tmp_path: Path) -> None:
    raw = archive(entries())
    for length in range(len(raw)):
        with pytest.raises(BadInput, match=r"consolidated\.00\.pth"):
            read(tmp_path, raw[:length])


def test_what_is_no_torch_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="empty"):
        read(tmp_path, b"")
    with pytest.raises(BadInput, match="a bare pickle"):
        read(tmp_path, pickle.dumps({"w": 1}) * 100)
    with pytest.raises(BadInput, match="not a complete torch zip"):
        read(tmp_path, b"weights" * 100)
    with pytest.raises(BadInput, match=r"no data\.pkl"):
        read(tmp_path, archive([("readme", b"x")]))
    with pytest.raises(BadInput, match=r"no data\.pkl"):
        read(tmp_path, archive([]))
    with pytest.raises(BadInput, match=r"data\.pkl"):
        read(tmp_path, archive([*entries(), ("y/data.pkl", pkl())]))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"consolidated\.00\.pth is no file"):
        PthIndex.read(tmp_path / "consolidated.00.pth")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["x/data/0", "x/data.pkl"])
def test_a_record_named_twice_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="twice"):
        read(tmp_path, archive([*entries(), (name, FLOATS)]))


def test_names_that_differ_behind_a_zero_byte_are_one_name(tmp_path: Path) -> None:
    raw = archive([*entries(), ("x/data/0#2", FLOATS)]).replace(b"x/data/0#2", b"x/data/0\x002")
    with pytest.raises(BadInput):
        read(tmp_path, raw)


@pytest.mark.parametrize(
    ("offset", "fmt", "value"),
    [
        (0, "<4s", b"PK\3\5"),  # magic
        (8, "<H", 8),  # method: deflated
        (14, "<I", 1),  # CRC
        (18, "<I", 4),  # compressed size
        (22, "<I", 4),  # size
        (26, "<H", 7),  # length of the name
        (30, "<c", b"y"),  # name
        (28, "<H", 60_000),  # extra field beyond the file
    ],
)
def test_a_local_header_that_contradicts_the_directory_is_refused(
    offset: int, fmt: str, value: int | bytes, tmp_path: Path
) -> None:
    """Readers of torch go by the local header, zipfile by the directory: two tensors in one record, for either to find."""
    raw = archive(entries())
    local, _ = headers(raw, "x/data/0")
    with pytest.raises(BadInput, match="'x/data/0'"):
        read(tmp_path, patched(raw, local + offset, fmt, value))


@pytest.mark.parametrize(
    ("offset", "fmt", "value"),
    [
        (8, "<H", 1),  # encrypted
        (10, "<H", 8),  # method
        (16, "<I", 1),  # CRC
        (20, "<I", 4),  # compressed size
        (24, "<I", 4),  # size
        (42, "<I", 0),  # the local header of another record
        (42, "<I", 0x7FFFFFFF),  # a local header outside the file
    ],
)
def test_a_directory_that_contradicts_the_local_header_is_refused(
    offset: int, fmt: str, value: int, tmp_path: Path
) -> None:
    raw = archive(entries())
    _, central = headers(raw, "x/data/0")
    with pytest.raises(BadInput, match="'x/data/0'"):
        read(tmp_path, patched(raw, central + offset, fmt, value))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_records_are_refused(compression: int, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="compressed"):
        read(tmp_path, archive(entries(), compression))


def grown(name: str, by: int) -> bytes:
    """The archive with `name` claiming, in both headers alike, `by` bytes of what follows it."""
    raw = archive([entries()[0], ("x/version", b"3\n"), ("x/spare", b"s"), *entries()[1:3]])
    local, central = headers(raw, name)
    size = struct.unpack_from("<I", raw, local + 22)[0] + by
    start = local + 30 + len(name)
    crc = zlib.crc32(raw[start : start + size])
    for at, fields in ((local, (14, 18, 22)), (central, (16, 20, 24))):
        for field, value in zip(fields, (crc, size, size), strict=True):
            raw = patched(raw, at + field, "<I", value)
    return raw


def test_records_that_overlap_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="overlap"):
        read(tmp_path, grown("x/version", 30 + len("x/spare") + 1))


def test_two_names_for_one_range_are_refused(tmp_path: Path) -> None:
    raw = archive([*entries(), ("x/data/1", FLOATS)])
    (first, _), (_, second) = headers(raw, "x/data/0"), headers(raw, "x/data/1")
    with pytest.raises(BadInput):
        read(tmp_path, patched(raw, second + 42, "<I", first))


def test_a_record_that_covers_the_header_of_the_next_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        read(tmp_path, grown("x/version", 30))


@pytest.mark.parametrize("order", [b"big", b"", b"little\n", b"middle"])
def test_only_little_endian_tensors_are_read(order: bytes, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="little-endian"):
        read(tmp_path, archive(entries(byteorder=order)))


def test_old_archives_without_byteorder_are_little_endian(tmp_path: Path) -> None:
    assert list(read(tmp_path, archive([e for e in entries() if e[0] != "x/byteorder"])).tensors) == ["w"]


@pytest.mark.parametrize("name", ["x/data.pkl", "x/byteorder"])
def test_a_flipped_bit_in_a_record_that_is_read_is_found(name: str, tmp_path: Path) -> None:
    raw = archive(entries())
    start = headers(raw, name)[0] + 30 + len(name)
    with pytest.raises(BadInput, match=rf"'{name}' is damaged"):
        read(tmp_path, patched(raw, start + 2, "<B", raw[start + 2] ^ 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 1},
        {"offset": 2, "shape": 1},
        {"shape": 3},
        {"stride": 2},
        {"offset": 2**61, "shape": 1},
        {"shape": 2**61},
        {"stride": 2**61},
        {"numel": 3, "shape": 3},  # a storage larger than its record
        {"numel": 1, "shape": 1},
        {"kind": "DoubleStorage"},
        {"kind": "HalfStorage"},
    ],
)
def test_no_tensor_reaches_beyond_its_record(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"pth: w.*storage"):
        read(tmp_path, archive(entries(pkl(**changes))))


def test_a_storage_that_is_not_there_is_named(tmp_path: Path) -> None:
    contents = [entry for entry in entries() if entry[0] != "x/data/0"]
    with pytest.raises(BadInput, match="w refers to storage '0', which the archive lacks"):
        read(tmp_path, archive(contents))


class Touches:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f": > '{self.marker}'",)


def test_a_checkpoint_that_would_run_a_command_is_refused_by_name(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = save(tmp_path / "evil.pth", {"w": BASE, "x": Touches(marker)})
    with pytest.raises(BadInput, match=rf"evil\.pth: data\.pkl refused: it names {os.system.__module__}\.system"):
        PthIndex.read(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the command is a real one"


def test_a_pickle_of_absurd_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama4_convert.checkpoints.pth._PICKLE_LIMIT", 10)
    with pytest.raises(BadInput, match="more than any checkpoint needs"):
        read(tmp_path, archive(entries()))
