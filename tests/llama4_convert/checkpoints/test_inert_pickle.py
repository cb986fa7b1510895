"""The pickle interpreter: reads what torch.save writes, refuses everything else by name, executes nothing, stays small."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_convert.checkpoints.inert_pickle import Opaque, RefusedPickle, Storage, TensorView, read_state_dict

REPOSITORY = Path(__file__).resolve().parents[3]
PROTOCOLS = [2, 3, 4, 5]


def data_pkl(state: Any, protocol: int = 2) -> bytes:
    """The data.pkl that torch.save writes for `state`."""
    buffer = io.BytesIO()
    torch.save(state, buffer, pickle_protocol=protocol)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


# -- what a state dict is made of


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_tensor_is_a_view_of_a_storage(protocol: int) -> None:
    state = {"w": torch.zeros(2, 3, dtype=torch.bfloat16)}
    assert read_state_dict(data_pkl(state, protocol)) == {
        "w": TensorView(Storage("0", "BF16", 6), "BF16", 0, (2, 3), (3, 1))
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_views_keep_their_offset_and_strides_and_share_their_storage(protocol: int) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    read = read_state_dict(data_pkl({"row": base[2], "turned": base.T, "step": base[1::2, ::3]}, protocol))
    storage = Storage("0", "F32", 24)
    assert read == {
        "row": TensorView(storage, "F32", 12, (6,), (1,)),
        "turned": TensorView(storage, "F32", 0, (6, 4), (1, 6)),
        "step": TensorView(storage, "F32", 6, (2, 2), (12, 3)),
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "BF16"),
        (torch.float16, "F16"),
        (torch.float32, "F32"),
        (torch.float64, "F64"),
        (torch.uint8, "U8"),
        (torch.int8, "I8"),
        (torch.int16, "I16"),
        (torch.int32, "I32"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_every_dtype_has_its_safetensors_name(dtype: torch.dtype, name: str, protocol: int) -> None:
    view = read_state_dict(data_pkl({"w": torch.zeros(3, dtype=dtype)[1:]}, protocol))["w"]
    assert (view.dtype, view.offset, view.shape) == (name, 1, (2,))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_parameters_ordered_dicts_metadata_buffers_and_none_are_legitimate(protocol: int) -> None:
    module = torch.nn.Linear(2, 2)
    state = module.state_dict()  # an OrderedDict with _metadata
    assert hasattr(state, "_metadata")
    assert list(read_state_dict(data_pkl(state, protocol))) == ["weight", "bias"]
    mixed = OrderedDict(weight=module.weight, scalar=torch.tensor(1.0), state=io.BytesIO(b"opaque"), nothing=None)
    mixed["empty"] = io.BytesIO()  # whose content protocol 2 spells as a call
    read = read_state_dict(data_pkl(mixed, protocol))
    assert read["weight"].shape == (2, 2)
    assert read["scalar"].shape == ()
    assert read["state"] == read["empty"] == Opaque("io.BytesIO")
    assert read["nothing"] is None


@pytest.mark.parametrize("state", [[], 1, None, "text", {1: 2}, {None: 1}, ()])
def test_only_a_mapping_from_names_is_a_state_dict(state: Any) -> None:
    with pytest.raises(RefusedPickle):
        read_state_dict(pickle.dumps(state))


# -- what would execute


class Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


def marked(path: Path) -> None:
    path.touch()


def gadgets(marker: Path) -> dict[str, tuple[Any, str]]:
    """Objects that leave `marker` behind when Python's own unpickler reads them, and the name that must be quoted."""
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": (Calls(os.system, f": > '{marker}'"), f"{os.system.__module__}.system"),
        "eval": (Calls(eval, touch), "builtins.eval"),
        "exec": (Calls(exec, touch), "builtins.exec"),
        "open": (Calls(builtins.open, str(marker), "w"), "io.open"),
        "getattr chain": (
            Calls(Calls(getattr, Calls(__import__, "os"), "system"), f": > '{marker}'"),
            "builtins.getattr",
        ),
        "nested in an argument": (Calls(OrderedDict, [("a", Calls(eval, touch))]), "builtins.eval"),
    }


GADGETS = sorted(gadgets(Path("marker")))


def pickled(gadget: str, marker: Path, protocol: int) -> bytes:
    if gadget == "getattr chain":  # calls a result, which pickle spells only by hand
        called = b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR"
        return b"\x80\x02}Vw\n" + called + f"(V: > '{marker}'\ntRs.".encode()
    return pickle.dumps({"w": gadgets(marker)[gadget][0]}, protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("gadget", GADGETS)
def test_what_executes_in_pythons_unpickler_is_refused_by_name_here(gadget: str, protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    name = gadgets(marker)[gadget][1]
    data = pickled(gadget, marker, protocol)
    # builtins live in __builtin__ as far as protocol 2 knows
    name = name if protocol > 2 or gadget == "getattr chain" else name.replace("builtins", "__builtin__")
    with pytest.raises(RefusedPickle, match="nothing was executed") as refused:
        read_state_dict(data)
    assert name in str(refused.value)
    assert not marker.exists()
    opened = pickle.loads(data)  # the gadget is a real one
    assert marker.exists()
    if gadget == "open":
        opened["w"].close()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"cos\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),  # STACK_GLOBAL
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93.", "os.system"),  # its names out of the memo
        (b"ctorch\nload\n.", "torch.load"),
        (b"ctorch.serialization\nload\n.", "torch.serialization.load"),
        (b"ctorch.hub\nload\n.", "torch.hub.load"),
        (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"c_codecs\ndecode\n.", "_codecs.decode"),
        (b"ccollections\ndefaultdict\n.", "collections.defaultdict"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "_rebuild_tensor_v2.__globals__"),
        (b"ctorch\nUntypedStorage.from_file\n.", "UntypedStorage.from_file"),
        (b"cos.path\n\n.", "os.path."),
    ],
)
def test_a_name_outside_the_list_is_refused_when_it_is_named(data: bytes, name: str) -> None:
    with pytest.raises(RefusedPickle) as refused:
        read_state_dict(data)
    assert name in str(refused.value)


@pytest.mark.parametrize(
    "data",
    [
        b"(ios\nsystem\n.",  # INST
        b"(cos\nsystem\no.",  # OBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"Pid\n.",  # PERSID
        b"\x80\x04\x8c\x01a}}\x92.",  # NEWOBJ_EX
        b"\x80\x05\x97.",  # NEXT_BUFFER
        b"}0}.",  # POP
        b"}2.",  # DUP
        b"\x80\x04\x8f.",  # EMPTY_SET
    ],
)
def test_opcodes_that_no_state_dict_needs_are_refused(data: bytes) -> None:
    with pytest.raises(RefusedPickle):
        read_state_dict(data)


def test_a_name_on_the_list_cannot_be_called_for_anything_but_its_purpose() -> None:
    for data in (
        b"ctorch\nFloatStorage\n)R.",  # calling a storage class
        b"ctorch\nfloat32\n)R.",
        b"ccollections\nOrderedDict\n]Va\naK\x01a\x85R.",  # constructor arguments
        b"c_codecs\nencode\n(Va\nVrot13\ntR.",
        b"c__builtin__\nbytes\n(K\x7ftR.",  # which would be that many
        b"}}R.",  # calling a dict
        b"Vname\n)R.",
        b"c_io\nBytesIO\n]R.",  # arguments that are no tuple
    ):
        with pytest.raises(RefusedPickle):
            read_state_dict(b"\x80\x02}Vw\n" + data[:-1] + b"s.")


def test_no_audited_action_happens_while_gadgets_are_read(tmp_path: Path) -> None:
    """In a process of its own, as an audit hook cannot be removed: no code runs and nothing is opened, imported or started."""
    marker = tmp_path / "marker"
    # the chain calls a result, which pickle.dumps cannot spell: it has a test above
    names = [name for name in GADGETS if name != "getattr chain"]
    for i, name in enumerate(names):
        (tmp_path / f"{i}.pkl").write_bytes(pickled(name, marker, 4))
    (tmp_path / f"{len(names)}.pkl").write_bytes(data_pkl({"w": torch.zeros(2), "s": io.BytesIO(b"x")}))
    script = """if True:
        import pathlib, sys
        from llama4_convert.checkpoints.inert_pickle import RefusedPickle, read_state_dict
        blobs = [path.read_bytes() for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pkl"))]
        def read(data):
            try:
                return list(read_state_dict(data))
            except RefusedPickle:
                return "refused"
        read(blobs[-1])  # whatever the decoder imports on first use
        seen = []
        watched = ("import", "open", "exec", "compile", "os.", "subprocess.", "pickle.", "socket.", "marshal.", "ctypes.")
        sys.addaudithook(lambda event, args: seen.append(event) if event.startswith(watched) else None)
        results = [read(data) for data in blobs]
        print(results.count("refused"), results[-1], seen)
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.stdout.strip() == f"{len(names)} ['w', 's'] []", done.stderr
    assert not marker.exists()


# -- malformed, doubled, enormous


def test_a_name_given_twice_is_refused() -> None:
    """Readers disagree on which of the two counts."""
    for data in (b"}Vlayers.0\nK\x01sVlayers.0\nK\x02s.", b"}(Vlayers.0\nK\x01Vlayers.0\nK\x02u."):
        with pytest.raises(RefusedPickle, match=r"'layers\.0' twice"):
            read_state_dict(data)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_refused(protocol: int) -> None:
    data = data_pkl(
        OrderedDict(a=torch.zeros(2, 3), b=torch.nn.Parameter(torch.zeros(3)), c=io.BytesIO(b"x")), protocol
    )
    read_state_dict(data)
    for length in range(len(data)):
        with pytest.raises(RefusedPickle):
            read_state_dict(data[:length])


SAMPLE = data_pkl(OrderedDict(a=torch.zeros(2, 3), b=torch.nn.Parameter(torch.zeros(3)), c=io.BytesIO(b"x")), 2)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damage_is_refused_or_read_but_never_crashes(data: st.DataObject) -> None:
    damaged = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = read_state_dict(bytes(damaged))
    except RefusedPickle:
        return
    assert all(isinstance(key, str) for key in read)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    try:
        read_state_dict(data)
    except RefusedPickle:
        return


def tensor(
    *, offset: bytes = b"K\x00", shape: bytes = b"K\x02\x85", stride: bytes = b"K\x01\x85", numel: bytes = b"K\x02"
) -> bytes:
    """{"w": tensor} spelled by hand, protocol 2."""
    storage = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\n" + numel + b"tQ"
    call = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + offset
        + shape
        + stride
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}Vw\n" + call + b"s."


def test_the_pickle_by_hand_is_a_good_one() -> None:
    assert read_state_dict(tensor()) == {"w": TensorView(Storage("0", "F32", 2), "F32", 0, (2,), (1,))}


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": b"J\xff\xff\xff\xff"},  # -1
        {"offset": b"\x8a\x09" + (2**62).to_bytes(9, "little")},
        {"offset": b"\x88"},  # True
        {"offset": b"G" + struct.pack(">d", 1.0)},
        {"offset": b"N"},
        {"shape": b"J\xff\xff\xff\xff\x85"},
        {"shape": b"]"},
        {"shape": b")"},  # no shape for one stride
        {"stride": b"J\xff\xff\xff\xff\x85"},
        {"shape": b"(" + b"K\x01" * 9 + b"t", "stride": b"(" + b"K\x01" * 9 + b"t"},
        {"numel": b"J\xff\xff\xff\xff"},
        {"numel": b"Vmany\n"},
    ],
)
def test_shapes_strides_and_offsets_are_natural_numbers(changes: dict[str, bytes]) -> None:
    with pytest.raises(RefusedPickle):
        read_state_dict(tensor(**changes))


def doubling(grow: bytes) -> bytes:
    """2**30000 references to one empty tuple, as the value of w."""
    return b"\x80\x02}Vw\n)q\x00" + grow * 30_000 + b"s."


BOMBS = {
    "a tuple of itself twice, doubled": doubling(b"h\x00\x86q\x00"),
    "a deep list": b"\x80\x02}Vw\n" + b"]" * 100_000 + b"a" * 99_999 + b"s.",
    "a deep tuple": b"\x80\x02}Vw\n)" + b"\x85" * 100_000 + b"s.",
    "marks": b"\x80\x02" + b"(" * 100_000 + b".",
    "a doubled tuple as a key": b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 30_000 + b"Ns.",
    "a doubled tuple as a name": b"\x80\x04)q\x00" + b"h\x00\x86q\x00" * 30_000 + b"h\x00\x93.",
    "a doubled tuple as an OrderedDict": b"\x80\x02ccollections\nOrderedDict\n)q\x00"
    + b"h\x00\x86q\x00" * 30_000
    + b"\x85R.",
    "a doubled tuple as a storage": b"\x80\x02)q\x00" + b"h\x00\x86q\x00" * 30_000 + b"Q.",
    "a frame that claims 2**60 bytes": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"}.",
    "bytes that claim 2**60": b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"}.",
    "text that claims 4 GiB": b"\x80\x04X\xff\xff\xff\xffx.",
    "a number that claims 2 GiB": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "a decimal number of 100,000 digits": b"I" + b"9" * 100_000 + b"\n.",
    "a memo index of 2**32": b"\x80\x02}r\xff\xff\xff\xff.",
    "a dict in itself": b"\x80\x02}q\x00Vw\nh\x00s.",
}


def answered(data: bytes) -> tuple[float, int]:
    """Seconds of the processor and peak bytes beyond the pickle itself."""
    tracemalloc.start()
    start = time.process_time()
    try:
        read_state_dict(data)
    except RefusedPickle:
        pass
    finally:
        seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return seconds, peak


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_answered_at_once_and_in_little_memory(bomb: str) -> None:
    seconds, peak = answered(BOMBS[bomb])
    assert seconds < 30  # a hang guard: it takes well under one
    assert peak < 200 * len(BOMBS[bomb]) + (8 << 20)


def test_a_text_encoded_over_and_over_takes_no_memory_of_its_own() -> None:
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"x" * (1 << 20)
    once = b"c_codecs\nencode\nq\x02h\x00h\x01\x86R"
    again = b"h\x02h\x00h\x01\x86R" * 100
    _, peak = answered(b"\x80\x02" + text + b"q\x00Vlatin1\nq\x01" + once + again + b".")
    assert peak < 16 << 20
