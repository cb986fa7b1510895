"""`explain`: the bytes that it names are the bytes that a conversion copies, and nothing else goes where it says."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from llama4.weights import parameter_shapes
from llama4_convert import convert, explain, export, synth
from llama4_convert.conversion import explain as explaining
from llama4_convert.reference.checkpoint import Checkpoint
from tests.support import commands, oracle

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "F8_E4M3": 1}
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SOURCES = [
    ("scout", 2, "published", "plain"),
    ("maverick", 2, "mixed", "views"),
    ("maverick", 4, "module", "one_storage"),
    ("guard", 1, "published", "plain"),
    ("odd", 1, "mixed", "plain"),
    ("top2", 4, "published", "views"),
    ("nested", 2, "module", "plain"),
]


@pytest.fixture(autouse=True)
def planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning is what takes the time: one plan serves all names of a test."""
    made: dict[str, Any] = {}
    make = explaining._subject

    def remembered(*arguments: Any) -> Any:
        key = repr(arguments)
        if key not in made:
            made[key] = make(*arguments)
        return made[key]

    monkeypatch.setattr(explaining, "_subject", remembered)


def view(data: bytes | bytearray, dtype: str, shape: list[int], strides: list[int], offset: int = 0) -> NDArray[Any]:
    """Numbers of `dtype`, as unsigned integers, at byte strides: all that a reader of the ranges needs to know."""
    return np.ndarray(tuple(shape), BITS[SIZES[dtype]], data, offset, tuple(strides))


def read(path: Path, start: int, end: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    assert len(data) == end - start
    return data


def add_one(count: NDArray[np.uint8], piece: dict[str, Any], first: int, strides: list[int]) -> None:
    """Counts the bytes that a piece touches from `first` on, at these strides."""
    touched = np.ndarray((*piece.shape, SIZES[piece.into.dtype]), np.uint8, count, first, (*strides, 1))
    touched += 1


def rebuilt(source: Path, pieces: list[dict[str, Any]], start: int, end: int) -> tuple[bytes, NDArray[np.uint8]]:
    """Bytes `start` to `end` of an output, from nothing but the ranges of the source; and how often each was written."""
    made, count = bytearray(end - start), np.zeros(end - start, np.uint8)
    for piece in pieces:
        into = piece.into
        numbers = view(read(source / piece.file, *piece.bytes), piece.dtype, piece.shape, piece.strides)
        first = into.bytes[0] - start
        view(made, into.dtype, piece.shape, into.strides, first)[...] = numbers
        add_one(count, piece, first, into.strides)
    return bytes(made), count


def places(told: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield told
    yield from told.other_ranks


def kinds(names: list[str]) -> list[str]:
    """The last of each kind of tensor: one layer, one expert."""
    return list({re.sub(r"\d+", "N", name): name for name in names}.values())


def tensors_of(folder: Path) -> dict[tuple[str, str], bytes]:
    """(file, key) -> bytes, as safetensors and torch read them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                found[path.name, key] = file.get_tensor(key).contiguous().view(torch.uint8).numpy().tobytes()
    for path in sorted(folder.glob("consolidated.*.pth")):
        for key, tensor in torch.load(path, weights_only=False).items():
            if isinstance(tensor, torch.Tensor):
                found[path.name, key] = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return found


def assert_true(source: Path, target: Path, **options: Any) -> None:
    """Of every kind of output tensor: ranges of the source, at the strides that are told, are its bytes, each once."""
    truth = tensors_of(target)
    for name in kinds([key for _, key in truth]):
        told = explain(source, name, **options)
        assert told.role == "output"
        assert sorted(place.file for place in places(told)) == sorted(f for f, key in truth if key == name)
        for place in places(told):
            start, end = place.bytes
            assert read(target / place.file, start, end) == truth[place.file, name]
            pieces = [piece for piece in told.made_of if piece.into.file == place.file]
            data, count = rebuilt(source, pieces, start, end)
            assert (count == 1).all(), name
            assert data == truth[place.file, name], name


# -------------------- bytes


@pytest.mark.parametrize(("geometry", "ranks", "spelling", "layout"), SOURCES)
def test_the_ranges_are_what_convert_and_export_copy(
    meta_checkpoint: Callable[..., Any], tmp_path: Path, geometry: str, ranks: int, spelling: str, layout: str
) -> None:
    """From Meta's files, and from what became of them back again, to as many ranks and to another number."""
    source = meta_checkpoint(geometry, ranks, spelling=spelling, layout=layout).src
    convert(source, tmp_path / "hf")
    assert_true(source, tmp_path / "hf")
    other = 2 if ranks == 1 and geometry != "odd" else 1
    export(tmp_path / "hf", tmp_path / "back")
    assert_true(tmp_path / "hf", tmp_path / "back")
    export(source, tmp_path / "other", ranks=other)
    assert_true(source, tmp_path / "other", ranks=other)


def test_shards_and_a_text_only_directory(meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    source = meta_checkpoint("maverick", 2).src
    options = {"shard_size": 200_000, "text_only": True}
    convert(source, tmp_path / "hf", **options)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert_true(source, tmp_path / "hf", **options)
    told = explain(source, "vision_projection.weight", **options)
    assert (told.role, told.dropped) == ("input", "vision tower, left out by --text-only")


def test_experts_that_are_linear_layers_already(converted: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "linear"
    source.mkdir()
    shutil.copy(converted("scout") / "config.json", source)
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in oracle.read_safetensors_dir(converted("scout")).items():
        stem, _, name = key.rpartition(".")
        if name not in ("gate_up_proj", "down_proj") or not stem.endswith("experts"):
            tensors[key] = tensor
            continue
        for e, expert in enumerate(tensor):
            halves = (
                zip(("gate", "up"), expert.chunk(2, -1), strict=True) if name != "down_proj" else [("down", expert)]
            )
            tensors |= {f"{stem}.{e}.{which}_proj.weight": half.T.contiguous() for which, half in halves}
    save_file(tensors, source / "model.safetensors")
    export(source, tmp_path / "meta", ranks=2)
    assert_true(source, tmp_path / "meta", ranks=2)
    told = explain(source, "layers.1.feed_forward.experts.moe_w_out_eF_D", ranks=2)
    assert told.op == [
        "join 4 tensors along E",
        "cut out F 0:52",
        "transpose D F to F D",
        "merge E and F into dimension 0",
    ]
    # The key that is not there names those that take its place.
    matches = explain(source, "language_model.model.layers.1.feed_forward.experts.down_proj", ranks=2).matches
    assert [m.tensor.split(".")[-3] for m in matches] == ["0", "1", "2", "3"]


def test_a_cast_is_told_and_the_ranges_are_of_either_dtype(meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    source = meta_checkpoint("scout", 2).src
    convert(source, tmp_path / "hf", dtype="float32")
    truth = tensors_of(tmp_path / "hf")
    for name in ("layers.1.feed_forward.router", "language_model.model.layers.1.feed_forward.experts.gate_up_proj"):
        told = explain(source, name, dtype="float32")
        assert told.op[-1] == "cast BF16 to F32"
        start, end = told.bytes
        made = bytearray(end - start)
        for piece in told.made_of:
            bits = view(read(source / piece.file, *piece.bytes), "BF16", piece.shape, piece.strides)
            into = piece.into
            view(made, "F32", piece.shape, into.strides, into.bytes[0] - start)[...] = bits.astype(np.uint32) << 16
        assert bytes(made) == truth[told.file, told.tensor]


@pytest.mark.parametrize(("start", "recipe"), [("meta", "int4"), ("hf", "int4"), ("meta", "fp8"), ("hf", "nf4")])
def test_the_parts_of_a_matrix_are_made_of_all_of_it(
    tmp_path: Path,
    recipe: str,
    start: str,
) -> None:
    synth(tmp_path / "meta", geometry="scout", tiny=True, ranks=2, layers=2)
    convert(tmp_path / "meta", tmp_path / "hf")
    convert(tmp_path / start, tmp_path / "out", recipe=recipe)
    truth = oracle.slow_convert(tmp_path / "meta")
    fused = truth["language_model.model.layers.1.feed_forward.experts.gate_up_proj"]
    up = fused[3, :, fused.shape[-1] // 2 :].contiguous().view(torch.int16).numpy().tobytes()  # [in, out]
    written = tensors_of(tmp_path / "out")

    parts = explain(tmp_path / start, "layers.1.feed_forward.experts.3.up", recipe=recipe).matches
    module = "language_model.model.layers.1.feed_forward.experts.3.up_proj"
    assert sorted(p.tensor for p in parts) == sorted(key for _, key in written if key.startswith(f"{module}."))
    made = 0
    for part in parts:
        told = explain(tmp_path / start, part.tensor, recipe=recipe)
        assert read(tmp_path / "out" / part.file, *part.bytes) == written[part.file, part.tensor]
        if not told.made_of:
            continue
        made += 1
        assert {piece.into.matrix for piece in told.made_of} == {module}
        assert rebuilt(tmp_path / start, told.made_of, 0, len(up))[0] == up
        assert re.match(r"quantize \[\d+, \d+\] as (int4|fp8|nf4) \(", told.op[-1])
        assert told.op[-1].endswith(f"this is {part.tensor.removeprefix(f'{module}.')}")
    assert made >= 2  # codes and scales


@pytest.mark.parametrize("spelling", ["published", "module"])
def test_names_of_the_reference_are_what_the_reference_reads(
    meta_checkpoint: Callable[..., Any], spelling: str
) -> None:
    """The bindings of the reference are written by hand: a table that lies would show here."""
    source = meta_checkpoint("maverick", 2, spelling=spelling).src
    truth = {tensor.name: tensor for tensor in Checkpoint.open(source).logical_tensors()}
    for name in kinds(list(truth)):
        told = explain(source, name)
        assert told.role == "output", name
        data, count = rebuilt(source, told.made_of, *told.bytes)
        found = np.frombuffer(data, np.uint8)[count == 1].tobytes()
        expected = truth[name].load(None)
        if ".experts." in name:  # which lie as [in, out]
            expected = expected.T
        assert found == np.ascontiguousarray(expected).tobytes(), name


def test_a_part_of_a_fused_tensor_of_metas(
    meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path]
) -> None:
    told = explain(converted("scout"), "layers.2.attention.k")
    assert told.tensor == "layers.2.attention.wqkv.weight"
    assert {place.file for place in places(told)} == {"consolidated.00.pth", "consolidated.01.pth"}
    q = 16 * 8 * 128 // 2  # numbers of a rank's queries
    k = 8 * 8 * 128 // 2
    start = told.bytes[0]
    assert told.made_of[0].into.bytes == [start + 2 * q, start + 2 * (q + k)]
    assert {piece.tensor.rpartition(".self_attn.")[2] for piece in told.made_of} == {"k_proj.weight"}


# -------------------- where an input goes


def test_every_byte_of_the_source_goes_somewhere_once_or_is_dropped(meta_checkpoint: Callable[..., Any]) -> None:
    source = meta_checkpoint("maverick", 2, spelling="mixed").src
    held = torch.load(source / "consolidated.00.pth", weights_only=False)
    kept = 0
    for name in kinds(list(held)):
        told = explain(source, name)
        assert told.role == "input"
        if told.dropped:
            assert told.goes_to == []
            continue
        kept += 1
        seen = defaultdict(list)
        for to in told.goes_to:
            for piece in to.pieces:
                assert piece.tensor == name
                seen[piece.file].append(piece)
        assert len(seen) == (1 if told.replicated else 2)
        for place in list(places(told))[: len(seen)]:
            start, end = place.bytes
            count = np.zeros(end - start, np.uint8)
            for piece in seen[place.file]:
                add_one(count, piece, piece.bytes[0] - start, piece.strides)
            assert (count == 1).all(), name
    assert kept > 20


def test_what_is_dropped_and_why(meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path]) -> None:
    source = meta_checkpoint("scout", 2).src
    angles = explain(source, "rope.freqs")
    assert angles.dropped == "RoPE angles: computed from rope_theta"
    assert angles.goes_to == []
    assert read(source / angles.file, *angles.bytes)
    state = next(k for k, v in torch.load(source / angles.file, weights_only=False).items() if "_extra_state" in k)
    assert explain(source, state).dropped == "state of the training framework, no weights"
    assert explain(source, state).bytes is None
    # The directory that was made of it remembers.
    assert explain(converted("scout"), "rope.freqs").dropped.startswith("RoPE angles: computed from rope_theta; it was")
    assert explain(converted("scout"), "rope.freqs").bytes is None


def test_a_changed_byte_changes_the_byte_that_was_told(converted: Callable[[str], Path], tmp_path: Path) -> None:
    source = commands.copy(converted("scout"), tmp_path / "hf")
    (source / "llama4-convert.json").unlink()  # which would tell that it was changed
    told = explain(source, "layers.1.feed_forward.experts.2.down", ranks=2)
    export(source, tmp_path / "before", ranks=2)
    piece = told.made_of[-1]
    commands.flip(source / piece.file, piece.bytes[0])
    export(source, tmp_path / "after", ranks=2)
    name = piece.into.file
    before, after = (np.fromfile(tmp_path / run / name, np.uint8) for run in ("before", "after"))
    differ = np.flatnonzero(before != after).tolist()
    start, end = told.bytes
    assert [at for at in differ if start <= at < end] == [piece.into.bytes[0]]
    assert all(at >= end for at in differ[1:])  # the CRC behind it, and in the directory of the archive


# -------------------- words


def test_the_steps_in_words(meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path]) -> None:
    source = meta_checkpoint("maverick", 2).src

    def op(name: str, path: Path = source, **options: Any) -> list[str]:
        found: list[str] = explain(path, name, **options).op
        return found

    assert op("layers.1.attention.q") == ["take q out of [q|k|v] (dimension 0)", "join 2 ranks along Q"]
    assert op("layers.1.attention.o") == ["join 2 ranks along Q"]
    assert op("norm") == ["take the first rank's: all ranks have the same"]
    assert op("layers.1.feed_forward.router") == [
        "take the first rank's: all ranks have the same",
        "transpose D E to E D",
    ]
    assert op("language_model.model.layers.1.feed_forward.experts.gate_up_proj") == [
        "read dimension 0 as E x D",
        "join 2 ranks along F",
        "concatenate gate, up along dimension 2",
    ]
    assert op("layers.1.feed_forward.experts.3.gate") == [
        "read dimension 0 as E x D",
        "join 2 ranks along F",
        "cut out E 3:4",
        "put gate into [gate|up] (dimension 2)",
    ]
    assert op("norm.weight", ranks=2) == ["take the first rank's: all ranks have the same"]
    assert op("layers.1.attention.wo.weight", ranks=2) == ["copy as it is"]
    assert op("layers.1.attention.wo.weight", ranks=1) == ["join 2 ranks along Q"]
    back = converted("maverick")
    assert op("layers.1.attention.wo.weight", back, ranks=4) == ["cut out Q 0:32"]
    assert op("layers.1.feed_forward.router_DE", back) == ["transpose E D to D E"]
    assert op("layers.1.feed_forward.experts.moe_w_out_eF_D", back, ranks=1) == ["merge E and F into dimension 0"]


def test_the_row_of_the_table(meta_checkpoint: Callable[..., Any]) -> None:
    row = explain(meta_checkpoint("scout", 2).src, "layers.0.attention.wqkv.weight").row
    assert msgspec.to_builtins(row) == {
        "table": "mappings/llama4_text.toml",
        "tensors": {"layers.0.q": "Q D", "layers.0.k": "K D", "layers.0.v": "K D"},
        "sharded": ["K", "Q"],
        "meta": {"layers.0.attention.wqkv.weight": "[q|k|v] D"},
        "transformers": {f"language_model.model.layers.0.self_attn.{n}_proj.weight": n for n in "qkv"},
    }


# -------------------- what a directory came from


@pytest.mark.parametrize("spelling", ["published", "module"])
def test_a_directory_remembers_what_it_was_made_of(
    meta_checkpoint: Callable[..., Any], tmp_path: Path, spelling: str
) -> None:
    source = meta_checkpoint("maverick", 4, spelling=spelling).src
    convert(source, tmp_path / "hf")
    for name in kinds([key for _, key in tensors_of(tmp_path / "hf")]):
        made, remembered = explain(source, name), explain(tmp_path / "hf", name).came_from
        assert sorted(remembered.tensors) == sorted({piece.tensor for piece in made.made_of})
        assert (remembered.op, remembered.row) == (made.op, made.row)
        assert remembered.files == [f"consolidated.{rank:02d}.pth" for rank in range(4)]


def test_a_quantized_directory_does_too_and_nothing_is_made_of_it(tmp_path: Path) -> None:
    synth(tmp_path / "meta", geometry="scout", tiny=True, ranks=2, layers=2)
    convert(tmp_path / "meta", tmp_path / "int4", recipe="int4")
    told = explain(tmp_path / "int4", "language_model.model.layers.1.feed_forward.experts.3.up_proj.weight_packed")
    assert (told.command, told.goes_to) == (None, [])
    assert told.came_from.tensors == ["layers.1.feed_forward.experts.moe_w_swiglu_eD_F"]
    assert told.came_from.op[-1] == "store as recipe int4 says"
    parts = explain(tmp_path / "int4", "layers.1.feed_forward.experts.3.up").matches
    assert {part.tensor.rpartition(".")[2] for part in parts} == {"weight_packed", "weight_scale", "weight_shape"}


def test_a_quantized_matrix_under_the_name_of_its_weight(tmp_path: Path) -> None:
    synth(tmp_path / "meta", geometry="guard", tiny=True, ranks=1, layers=1)
    convert(tmp_path / "meta", tmp_path / "fp8", recipe="fp8")
    name = "language_model.model.layers.0.feed_forward.up_proj.weight"
    assert explain(tmp_path / "fp8", name).came_from.op == [
        "take up out of [gate|up] (dimension 0)",
        "store as recipe fp8 says",
    ]
    assert explain(tmp_path / "fp8", "norm").came_from.op == ["copy as it is"]


def test_a_directory_of_others_remembers_nothing(converted: Callable[[str], Path], tmp_path: Path) -> None:
    source = commands.copy(converted("scout"), tmp_path / "hf")
    (source / "llama4-convert.json").unlink()
    assert explain(source, "language_model.model.norm.weight").came_from is None


# -------------------- names


def test_a_pattern_lists_what_it_matches(meta_checkpoint: Callable[..., Any]) -> None:
    source = meta_checkpoint("scout", 2).src
    told = explain(source, "*layers.3.*router*")
    assert [(m.role, m.tensor) for m in told.matches] == [
        ("output", "language_model.model.layers.3.feed_forward.router.weight"),
        ("input", "layers.3.feed_forward.router_DE"),
    ]
    one = explain(source, "*layers.3.*router.weight")
    assert one.made_of
    # Names of the reference match where no stored key does.
    matches = explain(source, "layers.3.attention.[qk]").matches
    assert [m.tensor.rpartition(".self_attn.")[2] for m in matches] == ["q_proj.weight", "k_proj.weight"]


@pytest.mark.parametrize("module", ["layers.3", "layers.3.attention", "language_model.model.layers.3.self_attn"])
def test_a_module_is_all_that_is_in_it(meta_checkpoint: Callable[..., Any], module: str) -> None:
    source = meta_checkpoint("scout", 2).src
    assert explain(source, module) == msgspec.structs.replace(explain(source, f"{module}.*"), tensor=module)


def test_every_name_of_the_reference_is_known(meta_checkpoint: Callable[..., Any]) -> None:
    source = meta_checkpoint("scout", 2).src
    config = Checkpoint.open(source).config
    names = kinds(list(parameter_shapes(config)))
    assert len(names) > 30
    assert all(explain(source, name).made_of for name in names)


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("layers.3.attention.Q", "layers.3.attention.q"),
        ("model.norm", "language_model.model.norm.weight"),
        ("layers.9.feed_forward.router_DE", "layers.4.feed_forward.router_DE"),
        ("*nothing*", "`inspect --tensors` lists them"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(
    meta_checkpoint: Callable[..., Any], capsys: pytest.CaptureFixture[str], wanted: str, near: str
) -> None:
    outcome = commands.run(capsys, "explain", meta_checkpoint("scout", 2).src, wanted)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.error.startswith(f"no tensor {wanted!r}: ")
    assert near in outcome.error


@pytest.mark.parametrize(
    ("start", "options", "message"),
    [
        ("meta", ["--ranks", "2", "--recipe", "int4"], "--recipe is for `convert`"),
        ("hf", ["--dtype", "float32"], "--dtype is for `convert`"),
        ("hf", ["--recipe", "int4", "--text-only"], "--text-only is for Meta's layout"),
        ("hf", ["--ranks", "3"], "cannot be shared by 3 ranks"),
    ],
)
def test_options_that_do_not_go_together(
    meta_checkpoint: Callable[..., Any],
    converted: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    start: str,
    options: list[str],
    message: str,
) -> None:
    path = meta_checkpoint("scout", 2).src if start == "meta" else converted("scout")
    outcome = commands.run(capsys, "explain", path, "norm", *options)
    assert outcome.code in (2, 3)
    assert message in outcome.error


# -------------------- the command


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "src"
    synth(path, geometry="scout", tiny=True, ranks=2, layers=1, experts=24)
    return path


def test_long_lists_are_cut_short_but_not_in_json(wide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain", wide, "layers.0.feed_forward.experts.moe_w_in_eD_F", "--recipe", "int4"]
    short, long = (commands.run(capsys, *command, *more).out for more in ([], ["--all"]))
    assert "... and 32 more (--all lists them)" in short
    assert "(--all lists them)" not in long
    assert long.count("gate_proj.weight_scale") == 24
    told = commands.run(capsys, *command, "--json").json
    assert len(told["goes_to"]) == 2 * 24
    matches = commands.run(capsys, "explain", wide, "*experts.*weight_packed", "--recipe", "int4").out
    assert matches.startswith("*experts.*weight_packed: 72 tensors")
    assert "... and 56 more (--all lists them)" in matches


def test_what_is_printed(wide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = commands.run(capsys, "explain", wide, "layers.0.feed_forward.router_DE", "--json").json
    shown = commands.run(capsys, "explain", wide, "layers.0.feed_forward.router_DE").out
    (to,) = told["goes_to"]
    assert f"bytes {told['bytes'][0]}:{told['bytes'][1]}" in shown
    assert f"{to['tensor']}  {to['file']}  bytes {to['bytes'][0]}:{to['bytes'][1]}" in shown
    assert "the first rank: all have the same" in shown
    assert "transpose D E to E D" in shown


def test_no_tensor_data_is_read(wide: Path, tmp_path: Path) -> None:
    """Where every number is overwritten, nothing changes but what the CRCs would tell a conversion."""
    damaged = commands.copy(wide, tmp_path / "damaged")
    told = explain(wide, "layers.0.feed_forward.router")
    path = damaged / told.made_of[0].file
    start, end = told.made_of[0].bytes
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\xff" * (end - start))
    assert str(explain(damaged, "layers.0.feed_forward.router")).replace("damaged", "src") == str(told).replace(
        str(wide), str(tmp_path / "src")
    )


def test_a_manifest_that_does_not_fit_is_bad_input(
    converted: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = commands.copy(converted("scout"), tmp_path / "hf")
    manifest = json.loads((source / "llama4-convert.json").read_text())
    manifest["source"]["ranks"] = 7
    (source / "llama4-convert.json").write_text(json.dumps(manifest))
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    outcome = commands.run(capsys, "explain", source, name, "--ranks", 2)
    assert outcome.code == 3
    assert "llama4-convert.json does not fit config.json" in outcome.error
