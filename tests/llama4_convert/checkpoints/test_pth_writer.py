"""`pth_writer` against `torch.save` and `torch.load`: same pickle, same records at the same alignment, same numbers."""

from __future__ import annotations

import codecs
import io
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_convert.checkpoints import pth_writer
from llama4_convert.checkpoints.pth_writer import ALIGNMENT, PthWriter
from llama4_convert.checkpoints.state_dict_pickle import PthBytes, PthTensor, state_dict_pickle

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,  # which has no storage class, and another constructor
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Records that some versions of torch write and others don't; no reader asks for them.
OPTIONAL = ("/.format_version", "/.storage_alignment", "/.data/serialization_id")


@dataclass
class Record:
    """What a zip's local header, data descriptor and directory say of one record."""

    name: str
    size: int
    flags: int
    header_fields: tuple[int, ...]
    zip64: bytes
    filler: bytes
    start: int
    descriptor: bytes
    directory_extra: bytes


def records_of(path: Path) -> list[Record]:
    raw = path.read_bytes()
    found = []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            signature, *fields, name_len, extra_len = struct.unpack_from("<4s5H3I2H", raw, info.header_offset)
            assert signature == b"PK\3\4"
            at = info.header_offset + 30 + name_len
            extra = raw[at : at + extra_len]
            start = at + extra_len
            zip64_len = 4 + struct.unpack_from("<H", extra, 2)[0] if extra[:2] == b"\1\0" else 0
            tail = raw[start + info.file_size :][: 24 if zip64_len else 16] if info.file_size else b""
            found.append(
                Record(
                    info.filename,
                    info.file_size,
                    info.flag_bits,
                    tuple(fields),
                    extra[:zip64_len],
                    extra[zip64_len:],
                    start,
                    tail,
                    info.extra,
                )
            )
    return found


def state_dict(**tensors: torch.Tensor | io.BytesIO) -> OrderedDict[str, torch.Tensor | io.BytesIO]:
    return OrderedDict(tensors)


def entries_of(state: OrderedDict[str, torch.Tensor | io.BytesIO]) -> list[PthTensor | PthBytes]:
    return [
        PthTensor(key, NAMES[value.dtype], tuple(value.shape))
        if isinstance(value, torch.Tensor)
        else PthBytes(key, value.getvalue())
        for key, value in state.items()
    ]


def pieces(tensor: torch.Tensor, size: int) -> Iterator[memoryview]:
    data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()).cast("B") if tensor.numel() else b""
    for start in range(0, len(data), size):
        yield memoryview(data)[start : start + size]


def write(path: Path, state: OrderedDict[str, torch.Tensor | io.BytesIO], chunk: int = 1000) -> None:
    with PthWriter(path, entries_of(state)) as writer:
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                writer.write_tensor(key, pieces(value, chunk))


def load(path: Path, *, mmap: bool = False) -> OrderedDict[str, torch.Tensor | io.BytesIO]:
    with torch.serialization.safe_globals([io.BytesIO, codecs.encode, bytes]):
        loaded: OrderedDict[str, torch.Tensor | io.BytesIO] = torch.load(path, weights_only=True, mmap=mmap)
    return loaded


def saved_pickle(state: OrderedDict[str, torch.Tensor | io.BytesIO]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


SAMPLE = state_dict(
    matrix=torch.randn(300, 7).bfloat16(),
    extra=io.BytesIO(b"\x80\x02N.\xff\x00"),
    scalar=torch.tensor(1.5),
    nothing=torch.zeros(0, 3, dtype=torch.float16),
    empty_extra=io.BytesIO(),
    cube=torch.randn(3, 1, 5).half(),
    four=torch.randn(2, 3, 4, 5),
    codes=torch.randn(4, 6).to(torch.float8_e4m3fn),
    more_codes=torch.randn(5).to(torch.float8_e4m3fn),
)


def assert_same(loaded: OrderedDict[str, torch.Tensor | io.BytesIO]) -> None:
    assert type(loaded) is OrderedDict
    assert list(loaded) == list(SAMPLE)
    for key, value in SAMPLE.items():
        got = loaded[key]
        if isinstance(value, torch.Tensor):
            assert isinstance(got, torch.Tensor)
            assert got.dtype == value.dtype
            assert got.stride() == value.stride()
            assert torch.equal(got.float(), value.float())
        else:
            assert isinstance(got, io.BytesIO)
            assert got.getvalue() == value.getvalue()


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_was_written(tmp_path: Path, mmap: bool) -> None:
    write(tmp_path / "a.00.pth", SAMPLE)
    assert_same(load(tmp_path / "a.00.pth", mmap=mmap))


def test_the_layout_is_that_of_torch_save(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    ours, theirs = tmp_path / "a.00.pth", tmp_path / "theirs" / "a.00.pth"
    write(ours, SAMPLE)
    torch.save(SAMPLE, theirs)
    expected = [record for record in records_of(theirs) if not record.name.endswith(OPTIONAL)]
    written = records_of(ours)
    assert [r.name for r in written] == [r.name for r in expected]
    for mine, reference in zip(written, expected, strict=True):
        assert (mine.size, mine.flags, mine.header_fields) == (reference.size, reference.flags, reference.header_fields)
        assert mine.descriptor == reference.descriptor, mine.name
        assert (mine.zip64, mine.directory_extra) == (reference.zip64, reference.directory_extra)
        assert mine.start % ALIGNMENT == reference.start % ALIGNMENT == 0
        assert mine.filler[:2] == reference.filler[:2] == b"FB"
        assert set(mine.filler[4:]) <= set(b"Z")
        assert struct.unpack("<H", mine.filler[2:4])[0] == len(mine.filler) - 4
    # The end records stand behind the directory in both: zip64 end, locator, end.
    tails = [path.read_bytes()[-98:] for path in (ours, theirs)]
    for at, signature in ((0, b"PK\6\6"), (56, b"PK\6\7"), (76, b"PK\5\6")):
        assert [tail[at : at + 4] for tail in tails] == [signature] * 2
    assert tails[0][4:24] == tails[1][4:24]


def test_every_crc_holds(tmp_path: Path) -> None:
    write(tmp_path / "a.pth", SAMPLE)
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None


def test_a_flipped_bit_breaks_the_crc(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    write(path, SAMPLE)
    start = next(record.start for record in records_of(path) if record.name == "a/data/0")
    raw = bytearray(path.read_bytes())
    raw[start] ^= 1
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "a/data/0"


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 1001, 2500])
def test_the_pickle_is_torch_s_byte_for_byte(count: int) -> None:
    # 1,000 pairs fill a SETITEMS, one left over gets a SETITEM; slots above 255 take the long opcodes.
    tensors = {f"layers.{n}.weight": torch.zeros(1, dtype=torch.float32) for n in range(count)}
    state = state_dict(**tensors)
    assert state_dict_pickle(entries_of(state)) == saved_pickle(state)


def test_the_pickle_of_every_kind_of_entry_is_torch_s() -> None:
    assert state_dict_pickle(entries_of(SAMPLE)) == saved_pickle(SAMPLE)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 300), max_size=3)),
            # One latin-1 character is an object that CPython shares, so its pickler would share the memo slot too.
            st.binary(max_size=40).filter(lambda value: len(value) != 1),
        ),
        max_size=6,
    )
)
def test_any_pickle_is_torch_s(kinds: list[tuple[str, list[int]] | bytes]) -> None:
    # Bytes that are one object share a slot as well, and hypothesis may draw one twice: hence the copy.
    values = {
        f"key {n}": io.BytesIO(bytes(bytearray(kind)))
        if isinstance(kind, bytes)
        else torch.empty(kind[1], dtype=DTYPES[kind[0]])
        for n, kind in enumerate(kinds)
    }
    state = state_dict(**values)
    assert state_dict_pickle(entries_of(state)) == saved_pickle(state)


def test_sizes_past_31_bits_are_long_integers_in_the_pickle() -> None:
    pickled = state_dict_pickle([PthTensor("w", "bfloat16", (1 << 20, 1 << 12))])
    assert b"\x8a\x05\x00\x00\x00\x00\x01" in pickled  # 2**32 numbers: LONG1 of five bytes


@pytest.mark.parametrize("limit", [0, 200, 2000, 5000])
def test_zip64_fields_take_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    # A low limit makes sizes (4,200 bytes), offsets, or both go where those past 4 GiB go.
    monkeypatch.setattr(pth_writer, "ZIP64_LIMIT", limit)
    path = tmp_path / "a.pth"
    write(path, SAMPLE)
    assert_same(load(path))
    assert_same(load(path, mmap=True))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        offsets = {info.filename: info.header_offset for info in archive.infolist()}
    for record in records_of(path):
        assert record.start % ALIGNMENT == 0
        offset = offsets[record.name]
        expected = [record.size] * 2 * (record.size >= limit) + [offset] * (offset >= limit)
        packed = struct.pack(f"<HH{len(expected)}Q", 1, 8 * len(expected), *expected) if expected else b""
        assert record.zip64 == record.directory_extra == packed
        if record.size:
            descriptor = struct.unpack("<4sIQQ" if expected else "<4sIII", record.descriptor)
            assert descriptor[0] == b"PK\7\b"
            assert descriptor[2:] == (record.size, record.size)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda w: w.write_tensor("b", [bytes(4)]), "b is out of turn: expected a"),
        (lambda w: w.write_tensor("a", [bytes(3)]), "a: 3 bytes came, 4 were announced"),
        (lambda w: w.write_tensor("a", [bytes(4), bytes(1)]), "a: 5 bytes came, 4 were announced"),
        (lambda w: None, "a was never written"),
        (lambda w: [w.write_tensor(key, [bytes(4)]) for key in "aa"], "a is out of turn: expected no more tensors"),
    ],
)
def test_a_tensor_that_breaks_its_announcement_leaves_no_file(tmp_path: Path, fault, message: str) -> None:
    with (
        pytest.raises(ValueError, match=message),
        PthWriter(tmp_path / "x.pth", [PthTensor("a", "float32", (1,))]) as w,
    ):
        fault(w)
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(b"earlier")
    with pytest.raises(KeyboardInterrupt), PthWriter(path, [PthTensor("a", "float32", (1,))]):
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]
    assert path.read_bytes() == b"earlier"


def test_entries_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="duplicate key 'a'"):
        PthWriter(tmp_path / "x.pth", [PthTensor("a", "float32", (1,)), PthBytes("a", b"")])
    with pytest.raises(ValueError, match="a: dtype 'int8' is none of bfloat16, float16, float32"):
        PthWriter(tmp_path / "x.pth", [PthTensor("a", "int8", (1,))])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "x.pth.part").symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match="No space left"),
        PthWriter(tmp_path / "x.pth", [PthTensor("a", "float32", (1,))]) as writer,
    ):
        writer.write_tensor("a", [bytes(4)])
    assert not list(tmp_path.iterdir())
