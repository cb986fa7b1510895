"""Meta's quantized checkpoints, as its own script writes them on every rank: read, converted, checked, and written.

The script and the loader are Meta's (`meta_quantizer`); the numbers are codes times scales, one rank at a time, by hand.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama4_convert import convert, explain, export, inspect, load_reference, plan, validate, verify
from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.validation.parity.transformers_runner import load_transformers
from tests.support import commands, meta_model, meta_quantizer, oracle

FP8, INT4 = "fp8_mixed", "int4_mixed"
# Widths that int4's groups of 128 divide, also those of four ranks.
WIDE: dict[str, Any] = {
    **meta_model.GEOMETRIES["scout"],
    "n_layers": 4,
    "ffn_exp": 6.0,
    "ffn_dim_multiplier": 1.0,
    "moe_args": {**meta_model.GEOMETRIES["scout"]["moe_args"], "auto_scale_F": False},
    "vision_args": None,
}
GEOMETRIES = meta_model.GEOMETRIES | {"wide": WIDE}
CASES = [
    *[("scout", FP8, ranks) for ranks in (1, 2, 8)],
    *[("maverick", FP8, 4), ("odd", FP8, 2), ("top2", FP8, 2), ("wide", FP8, 2)],
    *[("wide", INT4, ranks) for ranks in (1, 2, 4)],
]
SHARD = 200_000


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`plain(geometry, ranks, spelling)`: the checkpoint in bf16."""

    @functools.cache
    def get(geometry: str, ranks: int, spelling: str = "published") -> Path:
        model = meta_model.build(GEOMETRIES[geometry], seed=0)
        path = tmp_path_factory.mktemp(f"{geometry}-{ranks}-")
        return meta_model.write_checkpoint(model, GEOMETRIES[geometry], path, ranks=ranks, spelling=spelling)  # type: ignore[arg-type]

    return get


@pytest.fixture(scope="module")
def quantized(plain: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`quantized(geometry, mode, ranks)`: what Meta's script makes of it. Read only."""

    @functools.cache
    def get(geometry: str, mode: str, ranks: int) -> Path:
        target = tmp_path_factory.mktemp(f"{geometry}-{mode}-{ranks}-")
        return meta_quantizer.quantize(plain(geometry, ranks), target, ranks=ranks, mode=mode)

    return get


def by_hand(source: Path, folder: Path) -> Path:
    """The same checkpoint in bf16, each rank dequantized by itself."""
    folder.mkdir()
    for rank, file in enumerate(sorted(source.glob("consolidated.*.pth"))):
        torch.save(meta_quantizer.dequantized(source, rank), folder / file.name)
    for name in ("params.json", "tokenizer.model"):
        os.link(source / name, folder / name)
    return folder


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key].float(), tensor.float()), key


# -- as a source


@pytest.mark.parametrize(("geometry", "mode", "ranks"), CASES)
def test_each_rank_is_dequantized_with_its_own_scales(
    quantized: Callable[..., Path], tmp_path: Path, geometry: str, mode: str, ranks: int
) -> None:
    source = quantized(geometry, mode, ranks)
    result = convert(source, tmp_path / "out")
    assert_equal(oracle.read_safetensors_dir(tmp_path / "out"), oracle.slow_convert(by_hand(source, tmp_path / "hand")))
    assert all(file.ok for file in verify(tmp_path / "out").files)
    assert not any("scales" in dropped.name for dropped in result.dropped)


@pytest.mark.parametrize(("mode", "ranks", "to"), [(FP8, 2, 8), (FP8, 8, 1), (INT4, 4, 8), (INT4, 1, 2)])
def test_other_rank_counts_in_bf16(
    quantized: Callable[..., Path], tmp_path: Path, mode: str, ranks: int, to: int
) -> None:
    """Also where a new rank's part is columns of an old one's, which are read in short runs."""
    source = quantized("wide", mode, ranks)
    export(source, tmp_path / "out", ranks=to)
    export(by_hand(source, tmp_path / "hand"), tmp_path / "expected", ranks=to)
    for rank in range(to):
        name = f"consolidated.{rank:02d}.pth"
        found, expected = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("out", "expected"))
        assert_equal(found, expected)
    assert not list((tmp_path / "out").glob("*scales*"))


def test_a_cast_begins_at_bf16(quantized: Callable[..., Path], tmp_path: Path) -> None:
    source = quantized("wide", FP8, 2)
    convert(source, tmp_path / "wide", dtype="float32")
    convert(source, tmp_path / "bf16")
    expected = {key: tensor.float() for key, tensor in oracle.read_safetensors_dir(tmp_path / "bf16").items()}
    assert_equal(oracle.read_safetensors_dir(tmp_path / "wide"), expected)


@pytest.mark.parametrize(("mode", "recipe"), [(FP8, "int4"), (INT4, "nf4")])
def test_a_recipe_quantizes_the_numbers(quantized: Callable[..., Path], tmp_path: Path, mode: str, recipe: str) -> None:
    """The bytes that the same recipe makes of the bf16 conversion."""
    source = quantized("wide", mode, 2)
    assert convert(source, tmp_path / "out", recipe=recipe).quantization.kept_bits == 0
    convert(by_hand(source, tmp_path / "hand"), tmp_path / "expected", recipe=recipe)
    names = sorted(path.name for path in (tmp_path / "expected").glob("*.safetensors"))
    assert names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


@pytest.mark.parametrize("mode", [FP8, INT4])
def test_the_reference_computes_what_metas_model_does(
    quantized: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    """Logits of Meta's model with the ranks' dequantized experts joined in it."""
    source, ranks = quantized("wide", mode, 2), 2
    model = meta_model.build(WIDE, seed=0)
    states = [meta_quantizer.dequantized(source, rank) for rank in range(ranks)]
    dim = WIDE["dim"]
    with torch.no_grad():
        for layer, block in enumerate(model.layers):
            experts, stem = block.feed_forward.experts, f"layers.{layer}.feed_forward.experts"
            e = experts.w1.shape[0]
            for name, key in (("w1", "moe_w_in_eD_F"), ("w3", "moe_w_swiglu_eD_F")):
                parts = [state[f"{stem}.{key}"].reshape(e, dim, -1) for state in states]
                getattr(experts, name).copy_(torch.cat(parts, 2))
            parts = [state[f"{stem}.moe_w_out_eF_D"].reshape(e, -1, dim) for state in states]
            experts.w2.copy_(torch.cat(parts, 1))
    tokens = meta_model.text_tokens(model, 40)
    expected = meta_model.logits(model, tokens)
    found = load_reference(source, dtype=torch.float32)(tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    unquantized = meta_model.logits(meta_model.build(WIDE, seed=0), tokens)
    assert (unquantized - expected).abs().max() > 1e-3 * expected.abs().max()


def test_validate_takes_it_on_either_side(
    quantized: Callable[..., Path], plain: Callable[..., Path], tmp_path: Path
) -> None:
    source = quantized("scout", FP8, 2)
    convert(source, tmp_path / "bf16")
    told = validate(tmp_path / "bf16", reference=source, tokens=16)
    assert told.passed
    assert not told.tensors_quantized
    told = validate(source, reference=plain("scout", 2), tokens=16)
    assert told.passed
    assert told.tensors_quantized["fp8"].matrices == 3 * 3 * 4
    commands.copy(source, tmp_path / "flipped")
    file = tmp_path / "flipped" / "consolidated.01.pth"
    torch.save(_changed(file, "layers.2.feed_forward.experts.moe_w_out_eF_D"), file)
    told = validate(tmp_path / "flipped", reference=source, tokens=16)
    assert [fault.tensor for fault in told.tensors_different] == [
        "language_model.model.layers.2.feed_forward.experts.down_proj"
    ]


def _changed(file: Path, key: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(file, weights_only=False)
    codes = state[key].detach().view(torch.uint8)
    codes[0, 0] ^= 8
    return state


def test_what_is_told_of_it(quantized: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    source = quantized("wide", INT4, 2)
    told = inspect(source)
    [group] = told.quantization.groups
    assert (group.scheme, group.matrices) == ("int4", 2 * 3 * 4)
    assert 4 < group.bits_per_weight < 9
    assert sum(share.bytes for share in told.by_kind) == told.bytes
    assert told.parameters == inspect(quantized("wide", FP8, 2)).parameters
    listed = {t.name: (t.dtype, t.shape) for t in told.tensors}
    assert listed["layers.1.feed_forward.experts.moe_w_in_eD_F"] == ("F8_E4M3", [4 * 64, 256])
    assert listed["layers.1.feed_forward.experts.w1"] == ("F32", [4, 1, 256])
    sizes = [torch.load(path, weights_only=False) for path in source.glob("*.p*t*") if path.name != "params.json"]
    assert told.bytes == sum(t.nbytes for state in sizes for t in state.values() if isinstance(t, Tensor))
    assert "int4, a scale a row of each rank: 24 routed experts" in commands.run(capsys, "inspect", source).out
    expert = next(
        t for t in inspect(source, stats=True).stats if t.tensor.endswith("1.feed_forward.experts.moe_w_in_eD_F")
    )
    numbers = torch.cat([meta_quantizer.dequantized(source, rank)[expert.tensor].flatten() for rank in (0, 1)])
    assert expert.max == numbers.max()
    assert expert.std == pytest.approx(numbers.double().std(correction=0).item())
    planned = plan(source)
    assert planned.dtype == "BF16"
    assert planned.parameters == told.parameters
    assert plan(source).peak_memory_bytes > 96 << 20


def test_verify_reads_the_scales(quantized: Callable[..., Path], tmp_path: Path) -> None:
    source = commands.copy(quantized("scout", FP8, 2), tmp_path / "src")
    told = verify(source)
    assert told.ok
    assert {file.file for file in told.files} >= {"fp8_scales_0.pt", "fp8_scales_1.pt"}
    commands.flip(source / "fp8_scales_1.pt", commands.data_offset(source / "fp8_scales_1.pt", "/data/0"))
    (source / "fp8_scales_0.pt").unlink()
    bad = {file.file: file.note for file in verify(source).files if not file.ok}
    assert bad.keys() == {"fp8_scales_0.pt", "fp8_scales_1.pt"}
    assert bad["fp8_scales_0.pt"] == "missing"
    assert "CRC" in bad["fp8_scales_1.pt"]
    (source / "fp8_scales_1.pt").unlink()
    bad = {file.file: file.note for file in verify(source).files if not file.ok}
    assert bad == dict.fromkeys(("fp8_scales_0.pt", "fp8_scales_1.pt"), "missing")


@pytest.mark.parametrize("mode", [FP8, INT4])
@pytest.mark.parametrize("recipe", [None, "int4"])
def test_an_interrupted_conversion_goes_on(
    quantized: Callable[..., Path], tmp_path: Path, mode: str, recipe: str | None
) -> None:
    source = quantized("wide", mode, 2)
    convert(source, tmp_path / "straight", shard_size=SHARD, recipe=recipe)
    total = sum(path.stat().st_size for path in (tmp_path / "straight").iterdir())
    for part in (0.4, 0.3):  # of what is left, counted anew
        with pytest.raises(commands.Stop):
            convert(
                source,
                tmp_path / "out",
                shard_size=SHARD,
                recipe=recipe,
                progress=commands.stopping_after(part * total),
            )
    assert convert(source, tmp_path / "out", shard_size=SHARD, recipe=recipe).files_kept_from_earlier_run
    assert commands.digests(tmp_path / "out") == commands.digests(tmp_path / "straight")


@pytest.mark.parametrize("mode", [FP8, INT4])
@pytest.mark.parametrize("recipe", [None, "fp8", "int4"])
def test_a_flipped_bit_is_found_wherever_it_is(
    quantized: Callable[..., Path], tmp_path: Path, mode: str, recipe: str | None
) -> None:
    """In codes, at their beginning and end, and in scales: the first bytes, and what is read in between, count too."""
    source = quantized("wide", mode, 2)
    scales = f"{mode.partition('_')[0]}_scales_1.pt"
    for number, (file, at) in enumerate(
        (("consolidated.01.pth", 0), ("consolidated.01.pth", 4 * 128 * 128 - 1), (scales, 8))
    ):
        damaged = commands.copy(source, tmp_path / f"{number}")
        path = damaged / file
        index = _record_of(path, "layers.1.feed_forward.experts.moe_w_out_eF_D" if file[0] == "c" else None)
        commands.flip(path, commands.data_offset(path, f"/{index}") + at)
        with pytest.raises(BadInput, match=rf"{file}: layers\.\d\.feed_forward\.experts\..* is damaged"):
            convert(damaged, tmp_path / f"out-{number}", recipe=recipe)


def _record_of(path: Path, key: str | None) -> str:
    tensors = PthIndex.read(path).tensors
    return tensors[key or next(iter(tensors))].record.name.partition("/")[2]


# -- what is wrong with one


def _edit(change: Callable[[dict[str, Tensor]], None], name: str = "fp8_scales_1.pt") -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        loaded = torch.load(source / name, weights_only=False)
        state = {key: value.detach() if isinstance(value, Tensor) else value for key, value in loaded.items()}
        change(state)
        torch.save(state, source / name)

    return edit


def _a_view(codes: Tensor) -> Tensor:
    """Columns of a wider tensor."""
    both = torch.cat([codes.view(torch.uint8)] * 2, 1)
    return both.view(torch.float8_e4m3fn)[:, : codes.shape[1]]


W2 = "layers.2.feed_forward.experts.w2"
CODES = "layers.2.feed_forward.experts.moe_w_out_eF_D"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no scales": (
        lambda p: [file.unlink() for file in p.glob("fp8_scales_*")],
        r"consolidated\.00\.pth: layers\.1\..*eD_F is quantized, and there is no fp8_scales_0\.pt or int4_scales_0\.pt beside",
    ),
    "a rank's scales missing": (lambda p: (p / "fp8_scales_1.pt").unlink(), r"lacks fp8_scales_1\.pt: download it"),
    "both kinds": (lambda p: shutil.copy(p / "fp8_scales_0.pt", p / "int4_scales_0.pt"), r"keep the right one"),
    "the other kind": (
        lambda p: [(p / f"fp8_scales_{rank}.pt").rename(p / f"int4_scales_{rank}.pt") for rank in (0, 1)],
        r"int4_scales_0\.pt: layers\.1\.feed_forward\.experts\.w1 is F32 \[4, 52\].* makes it F32 \[4, 2, 52\]",
    ),
    "a key missing": (_edit(lambda s: s.pop(W2)), rf"fp8_scales_1\.pt: {W2} is missing, and {CODES} in consolidated\.01\.pth"),
    "another shape": (
        _edit(lambda s: s.update({W2: s[W2].reshape(2, -1)})),
        rf"fp8_scales_1\.pt: {W2} is F32 \[2, 256\], but {CODES} in consolidated\.01\.pth makes it F32 \[4, 128\]",
    ),
    "another rank count's": (
        _edit(lambda s: s.update({"layers.2.feed_forward.experts.w1": s["layers.2.feed_forward.experts.w1"][:, :26]})),
        r"fp8_scales_1\.pt: layers\.2\.feed_forward\.experts\.w1 is F32 \[4, 26\].*\[4, 52\]",
    ),
    "a transposed view": (
        _edit(lambda s: s.update({W2: s[W2].T.contiguous().T})),
        rf"fp8_scales_1\.pt: {W2} is F32 \[4, 128\]",
    ),
    "another dtype": (_edit(lambda s: s.update({W2: s[W2].bfloat16()})), rf"fp8_scales_1\.pt: {W2} is BF16"),
    "a NaN": (
        _edit(lambda s: s[W2][3].fill_(float("nan"))),
        rf"fp8_scales_1\.pt: {W2} has 128 scale\(s\) of expert 3 that are NaN or infinite",
    ),
    "an infinity": (_edit(lambda s: s[W2][0, 5].fill_(float("inf"))), rf"fp8_scales_1\.pt: {W2} has 1 scale"),
    "codes of a view": (
        _edit(lambda s: s.update({CODES: _a_view(s[CODES])}), "consolidated.01.pth"),
        rf"consolidated\.01\.pth: {CODES} \[208, 128\] is not what Meta's script writes",
    ),
    "codes of what is no expert": (
        lambda p: [
            _edit(lambda s: s.update({"norm.weight": s["norm.weight"].to(torch.float8_e4m3fn)}), f"consolidated.0{rank}.pth")(p)
            for rank in (0, 1)
        ],
        r"consolidated\.00\.pth: norm\.weight is F8_E4M3, and only routed experts have scales",
    ),
    "one rank not quantized": (
        _edit(lambda s: s.update({CODES: s[CODES].bfloat16()}), "consolidated.01.pth"),
        rf"the ranks disagree: {CODES} is F8_E4M3 in consolidated\.00\.pth and BF16",
    ),
    "no router": (
        lambda p: [
            _edit(lambda s: s.pop("layers.2.feed_forward.router_DE"), f"consolidated.0{rank}.pth")(p) for rank in (0, 1)
        ],
        r"layers\.2\.feed_forward\.router_DE, which tells the number of experts",
    ),
    "cut off": (lambda p: os.truncate(p / "fp8_scales_1.pt", 1000), r"fp8_scales_1\.pt is not a complete torch zip"),
    "a pickle that calls": (lambda p: torch.save({"w": Touch(p / "touched")}, p / "fp8_scales_1.pt"), "nothing was executed"),
}  # fmt: skip


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(
    quantized: Callable[..., Path], tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = FAULTS[fault]
    source = commands.copy(quantized("scout", FP8, 2), tmp_path / "src")
    damage(source)
    with pytest.raises(BadInput, match=words):
        convert(source, tmp_path / "out", shard_size=SHARD)
    assert not list((tmp_path / "out").glob("*.safetensors*"))  # found before anything is written
    assert commands.run(capsys, "convert", source, tmp_path / "other").code == 3
    if "NaN" not in fault and "infinity" not in fault:  # of which an index tells nothing
        assert commands.run(capsys, "inspect", source).code == 3
    else:
        with pytest.raises(BadInput, match=words):
            inspect(source, stats=True)
    assert not (source / "touched").exists()


def test_scales_that_nothing_needs_are_told_of(quantized: Callable[..., Path], tmp_path: Path) -> None:
    source = commands.copy(quantized("scout", FP8, 2), tmp_path / "src")
    for rank in (0, 1):
        _edit(lambda s: s.update({"layers.0.feed_forward.experts.w1": torch.ones(4, 52)}), f"fp8_scales_{rank}.pt")(
            source
        )
    dropped = {entry.name: entry.why for entry in convert(source, tmp_path / "out").dropped}
    assert dropped["layers.0.feed_forward.experts.w1"] == "scales of a tensor that is not quantized"


# -- FP8 to FP8


def experts(source: Path, layer: int, name: str) -> tuple[Tensor, Tensor]:
    """A layer's codes [E, N, K] and scales [E, N] with the ranks' outputs joined, of gate ("w1") or up ("w3")."""
    key = {"w1": "moe_w_in_eD_F", "w3": "moe_w_swiglu_eD_F", "w2": "moe_w_out_eF_D"}[name]
    codes, scales = [], []
    for rank in range(len(list(source.glob("consolidated.*.pth")))):
        scales.append(torch.load(source / f"fp8_scales_{rank}.pt")[f"layers.{layer}.feed_forward.experts.{name}"])
        state = torch.load(source / f"consolidated.{rank:02d}.pth", weights_only=False)
        stored = state[f"layers.{layer}.feed_forward.experts.{key}"].detach().view(torch.uint8)
        codes.append(stored.view(len(scales[0]), -1, stored.shape[-1]).mT)
    return torch.cat(codes, 1), torch.cat(scales, 1)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_fp8_rows_keep_their_bits(
    quantized: Callable[..., Path], tmp_path: Path, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gate and up have one scale an output on any rank count, down on one rank alone."""
    source = quantized("scout", FP8, ranks)
    told = convert(source, tmp_path / "out", recipe="fp8").quantization
    assert told.kept_bits == 3 * 4 * (3 if ranks == 1 else 2)
    found = oracle.read_safetensors_dir(tmp_path / "out")
    for layer in (1, 2, 3):
        kept = {"w1": "gate", "w3": "up"} | ({"w2": "down"} if ranks == 1 else {})
        for name, projection in kept.items():
            for e, (codes, scales) in enumerate(zip(*experts(source, layer, name), strict=True)):
                at = f"language_model.model.layers.{layer}.feed_forward.experts.{e}.{projection}_proj.weight"
                assert torch.equal(found[at].view(torch.uint8), codes)
                assert torch.equal(found[f"{at}_scale"], scales[:, None])
        if ranks > 1:
            at = f"language_model.model.layers.{layer}.feed_forward.experts.0.down_proj.weight_scale"
            assert found[at].dtype == torch.bfloat16
    checked = validate(tmp_path / "out", reference=source, tokens=16)
    assert checked.passed, checked
    text = commands.run(capsys, "convert", source, tmp_path / "again", "--recipe", "fp8").out
    assert f"kept     {told.kept_bits} matrices have the source's codes and scales, bit by bit" in text
    planned = plan(source, recipe="fp8").quantization
    assert planned.bytes_after == told.bytes_after
    assert planned.bytes_before["routed_experts"] == 2 * 5 * 4 * 3 * 128 * 104


def test_transformers_computes_with_the_kept_scales(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """In float32 with all of them; in bf16 it rounds the scales, as it does every parameter."""
    source = quantized("scout", FP8, 2)
    convert(source, tmp_path / "out", recipe="fp8")
    codes, scales = experts(source, 2, "w3")
    numbers = codes[1].view(torch.float8_e4m3fn).float()
    for dtype, scale in ((torch.float32, scales[1]), (torch.bfloat16, scales[1].bfloat16().float())):
        model = load_transformers(tmp_path / "out", dtype)
        model(torch.zeros(1, 4, dtype=torch.long))  # which decompresses it
        weight = model.get_parameter("language_model.model.layers.2.feed_forward.experts.1.up_proj.weight")
        assert torch.equal(weight, (numbers * scale[:, None]).to(dtype))


# -- int4 to int4


def int4_experts(source: Path, layer: int, name: str) -> tuple[Tensor, Tensor]:
    """A layer's codes -8 .. 7, int8 [E, N, K], and scales [E, N, K / 128], the ranks joined: of "w2" along K, else along N."""
    key = {"w1": "moe_w_in_eD_F", "w3": "moe_w_swiglu_eD_F", "w2": "moe_w_out_eF_D"}[name]
    codes, scales = [], []
    for rank in range(len(list(source.glob("consolidated.*.pth")))):
        scale = torch.load(source / f"int4_scales_{rank}.pt")[f"layers.{layer}.feed_forward.experts.{name}"]
        state = torch.load(source / f"consolidated.{rank:02d}.pth", weights_only=False)
        packed = state[f"layers.{layer}.feed_forward.experts.{key}"].detach().view(torch.int8)
        packed = packed.view(len(scale), -1, packed.shape[-1])
        codes.append(torch.stack([(packed << 4) >> 4, packed >> 4], 2).flatten(1, 2).mT)
        scales.append(scale.mT)
    along = 2 if name == "w2" else 1
    return torch.cat(codes, along), torch.cat(scales, along)


@pytest.mark.parametrize(("ranks", "recipe"), [(1, "int4"), (2, "int4-experts"), (4, "int4-signed")])
def test_int4_groups_keep_their_bits(quantized: Callable[..., Path], tmp_path: Path, ranks: int, recipe: str) -> None:
    """Groups lie inside of a rank's inputs, so down projections of any rank count are kept, too."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    source = quantized("wide", INT4, ranks)
    told = convert(source, tmp_path / "out", recipe=recipe).quantization
    assert told.kept_bits == 2 * 4 * 3
    assert planned_sizes(source, recipe) == (told.bytes_before, told.bytes_after)
    found = oracle.read_safetensors_dir(tmp_path / "out")
    for layer in (1, 2):
        for name, projection in {"w1": "gate", "w3": "up", "w2": "down"}.items():
            for e, (codes, scales) in enumerate(zip(*int4_experts(source, layer, name), strict=True)):
                at = f"model.layers.{layer}.feed_forward.experts.{e}.{projection}_proj.weight"
                assert torch.equal(found[f"{at}_packed"], pack_to_int32(codes.contiguous(), 4))
                assert found[f"{at}_scale"].dtype == torch.float32
                assert torch.equal(found[f"{at}_scale"], scales)
                assert found[f"{at}_shape"].tolist() == list(codes.shape)
    checked = validate(tmp_path / "out", reference=source, tokens=16)
    assert checked.passed, checked
    assert verify(tmp_path / "out").ok
    told = explain(source, "model.layers.1.feed_forward.experts.2.down_proj.weight_packed", recipe=recipe)
    assert told.op[-1] == "keep the codes of [128, 512] as they are, in the order of weight_packed"
    told = explain(source, "model.layers.1.feed_forward.experts.2.down_proj.weight_scale", recipe=recipe)
    assert [piece.file for piece in told.made_of] == [f"int4_scales_{rank}.pt" for rank in range(ranks)]


def planned_sizes(source: Path, recipe: str) -> tuple[Any, Any]:
    told = plan(source, recipe=recipe).quantization
    return told.bytes_before, told.bytes_after


def test_transformers_computes_with_the_kept_groups(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """Exactly: what Meta's script divides by 8 is a bf16 number, so no scale is rounded, in float32 and in bf16."""
    source = quantized("wide", INT4, 2)
    convert(source, tmp_path / "out", recipe="int4-experts")
    codes, scales = int4_experts(source, 2, "w2")
    numbers = codes[1].float() * scales[1].repeat_interleave(128, 1)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_transformers(tmp_path / "out", dtype)
        model(torch.zeros(1, 4, dtype=torch.long))  # which decompresses it
        weight = model.get_parameter("model.layers.2.feed_forward.experts.1.down_proj.weight")
        assert torch.equal(weight, numbers.to(dtype))


def test_groups_of_another_size_are_requantized(quantized: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        'format = "compressed-tensors"\n[[rule]]\nfamilies = ["routed_experts"]\nscheme = "int4"\ngroup_size = 64\n'
    )
    assert plan(quantized("wide", INT4, 2), recipe=str(tmp_path / "own.toml")).quantization.kept_bits == 0


def test_a_recipe_may_keep_some_and_quantize_others(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """Of one tensor, read partly as codes and partly as numbers, every byte is checked all the same."""
    (tmp_path / "some.toml").write_text(
        'format = "compressed-tensors"\n'
        '[[rule]]\nfamilies = ["routed_experts"]\nscheme = "fp8"\nexperts = [1]\n'
        '[[rule]]\nfamilies = ["routed_experts"]\nscheme = "int4"\ngroup_size = 32\n'
    )
    source = quantized("wide", FP8, 2)
    told = convert(source, tmp_path / "out", recipe=str(tmp_path / "some.toml")).quantization
    assert told.kept_bits == 2 * 2
    found = {key: t for path in (tmp_path / "out").glob("*.safetensors") for key, t in load_file(path).items()}
    at = "model.layers.1.feed_forward.experts.1.gate_proj.weight"
    assert torch.equal(found[at].view(torch.uint8), experts(source, 1, "w1")[0][1])
    assert "model.layers.1.feed_forward.experts.0.gate_proj.weight_packed" in found
    damaged = commands.copy(source, tmp_path / "damaged")
    path = damaged / "consolidated.00.pth"
    record = _record_of(path, "layers.1.feed_forward.experts.moe_w_in_eD_F")
    commands.flip(path, commands.data_offset(path, f"/{record}") + 128 * 256 + 7)
    with pytest.raises(BadInput, match="moe_w_in_eD_F is damaged"):
        convert(damaged, tmp_path / "other", recipe=str(tmp_path / "some.toml"))


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_other_granularities_are_requantized(quantized: Callable[..., Path], tmp_path: Path, granularity: str) -> None:
    (tmp_path / "own.toml").write_text(
        'format = "compressed-tensors"\n[[rule]]\nfamilies = ["routed_experts"]\nscheme = "fp8"\n'
        f'granularity = "{granularity}"\n'
    )
    told = plan(quantized("wide", FP8, 1), recipe=str(tmp_path / "own.toml"))
    assert told.quantization.kept_bits == 0


def test_a_nan_among_the_codes_is_told_of(quantized: Callable[..., Path], tmp_path: Path) -> None:
    source = commands.copy(quantized("scout", FP8, 1), tmp_path / "src")
    _edit(lambda s: s[CODES].view(torch.uint8)[3, 5].fill_(0x7F), "consolidated.00.pth")(source)
    found = convert(source, tmp_path / "bf16").nonfinite
    assert [(one.nan, one.inf) for one in found] == [(1, 0)]
    (one,) = convert(source, tmp_path / "fp8", recipe="fp8").nonfinite
    assert one.tensor.endswith("layers.2.feed_forward.experts.0.down_proj.weight")
    assert (one.nan, one.replaced) == (1, False)
    with pytest.raises(BadInput, match="1 NaN"):
        export(source, tmp_path / "meta", recipe="meta-fp8", ranks=2)


# -- as an output


def files(folder: Path) -> dict[str, dict[str, Tensor]]:
    """By file and key, without what an export drops."""
    found = {}
    for path in [*folder.glob("consolidated.*.pth"), *folder.glob("fp8_scales_*.pt")]:
        state = torch.load(path, weights_only=False)
        dropped = ("rope.freqs", "_extra_state", "gate_stats_3E", "expert_activation_DE")
        found[path.name] = {key: value.detach() for key, value in state.items() if not key.endswith(dropped)}
    return found


def assert_same_files(found: Path, expected: Path) -> None:
    mine, theirs = files(found), files(expected)
    assert mine.keys() == theirs.keys()
    for name, state in theirs.items():
        assert_equal(mine[name], state)


@pytest.mark.parametrize(("geometry", "ranks"), [("scout", 1), ("scout", 2), ("scout", 8), ("maverick", 4), ("odd", 2)])
def test_export_writes_what_metas_script_writes(
    plain: Callable[..., Path], quantized: Callable[..., Path], tmp_path: Path, geometry: str, ranks: int
) -> None:
    """Bit by bit, from Meta's layout at another rank count and from a Transformers directory; Meta's loader takes it."""
    expected = quantized(geometry, FP8, ranks)
    convert(plain(geometry, 2), tmp_path / "hf")
    for source in (plain(geometry, 2), tmp_path / "hf"):
        target = tmp_path / f"{source.name}-meta"
        told = export(source, target, ranks=ranks, recipe="meta-fp8").quantization
        assert_same_files(target, expected)
        layers = len({key for key in files(expected)["fp8_scales_0.pt"] if key.endswith("w1")})
        assert told.matrices == layers * 3 * GEOMETRIES[geometry]["moe_args"]["num_experts"] * ranks
        assert 1e-4 < told.relative_mse < 1e-3
        assert verify(target).ok
    for rank in range(ranks):
        loaded = meta_quantizer.load(target, rank, ranks)
        numbers = meta_quantizer.dequantized(target, rank)
        assert len(loaded) == 3 * layers
        for key, weight in loaded.items():
            name = {"w1": "moe_w_in_eD_F", "w3": "moe_w_swiglu_eD_F", "w2": "moe_w_out_eF_D"}[key.rpartition(".")[2]]
            made = (weight.weight.float() * weight.scale.unsqueeze(-1)).bfloat16().mT
            assert torch.equal(made.flatten(0, 1), numbers[f"{key.rpartition('.')[0]}.{name}"])


def test_the_spelling_of_the_source_is_kept(plain: Callable[..., Path], tmp_path: Path) -> None:
    """Codes of three axes under the names of Meta's modules: its loader takes them, and so does convert."""
    export(plain("scout", 2, "module"), tmp_path / "meta", recipe="meta-fp8")
    state = torch.load(tmp_path / "meta" / "consolidated.01.pth", weights_only=True)
    assert state["layers.1.feed_forward.experts.w2"].shape == (4, 52, 128)
    assert len(meta_quantizer.load(tmp_path / "meta", 1, 2)) == 9
    convert(tmp_path / "meta", tmp_path / "out")
    expected = oracle.slow_convert(by_hand(tmp_path / "meta", tmp_path / "hand"))
    assert_equal(oracle.read_safetensors_dir(tmp_path / "out"), expected)


@pytest.mark.parametrize(("ranks", "to"), [(2, 2), (2, 8), (8, 2)])
def test_codes_of_the_same_rows_are_written_again(
    quantized: Callable[..., Path], tmp_path: Path, ranks: int, to: int
) -> None:
    source = quantized("scout", FP8, ranks)
    told = export(source, tmp_path / "out", ranks=to, recipe="meta-fp8").quantization
    each = 3 * 4 * to  # of gate, of up, of down
    assert (told.kept_bits, told.matrices) == ((3 * each, 0) if ranks == to else (2 * each, each))
    if ranks == to:
        assert_same_files(tmp_path / "out", source)
    for layer in (1, 2, 3):
        for name in ("w1", "w3"):
            for mine, its in zip(experts(tmp_path / "out", layer, name), experts(source, layer, name), strict=True):
                assert torch.equal(mine, its)
    assert validate(tmp_path / "out", reference=source, tokens=16).passed


def test_an_interrupted_export_goes_on(plain: Callable[..., Path], tmp_path: Path) -> None:
    """Wherever it stops: a file of scales is made with the rank file before it, and that one is made again for it."""
    source = plain("scout", 2)
    export(source, tmp_path / "straight", recipe="meta-fp8")
    total = 0

    def count(n: int) -> None:
        nonlocal total
        total += n

    export(source, tmp_path / "counted", recipe="meta-fp8", progress=count)
    scales = (tmp_path / "straight" / "fp8_scales_0.pt").stat().st_size
    written = (tmp_path / "straight" / "consolidated.00.pth").stat().st_size
    for stop in (written // 3, written - scales, written, written + scales, total - 1):
        target = tmp_path / f"out-{stop}"
        with pytest.raises(commands.Stop):
            export(source, target, recipe="meta-fp8", progress=commands.stopping_after(stop))
        assert not (target / "params.json").exists()
        export(source, target, recipe="meta-fp8")
        assert commands.digests(target) == commands.digests(tmp_path / "straight")
    (tmp_path / "straight" / "fp8_scales_1.pt").unlink()
    assert not verify(tmp_path / "straight").ok
    expected = commands.digests(tmp_path / "counted")
    export(source, tmp_path / "straight", recipe="meta-fp8")
    assert commands.digests(tmp_path / "straight") == expected


def test_another_recipe_is_another_export(
    plain: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = plain("scout", 2)
    export(source, tmp_path / "out", recipe="meta-fp8")
    outcome = commands.run(capsys, "export", source, tmp_path / "out")
    assert outcome.code == 2
    assert "meta-fp8 there" in outcome.error
    assert commands.run(capsys, "export", source, tmp_path / "out", "--overwrite").code == 0
    assert not list((tmp_path / "out").glob("fp8_scales_*"))
    outcome = commands.run(capsys, "export", source, tmp_path / "out", "--recipe", "meta-fp8", "--overwrite", "--json")
    assert outcome.json["quantization"]["recipe"] == "meta-fp8"
    assert (tmp_path / "out" / "fp8_scales_1.pt").exists()


def test_recipes_belong_to_layouts(plain: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="meta-fp8 writes Meta's layout: give it to export"):
        convert(plain("scout", 2), tmp_path / "out", recipe="meta-fp8")
    with pytest.raises(UsageError, match="int4 writes Transformers' layout: give it to convert"):
        export(plain("scout", 2), tmp_path / "out", recipe="int4")
    with pytest.raises(UsageError, match="quantizes nothing of this model"):
        export(plain("guard", 2), tmp_path / "out", recipe="meta-fp8")


def test_numbers_that_are_not_finite_are_refused(plain: Callable[..., Path], tmp_path: Path) -> None:
    source = commands.copy(plain("scout", 2), tmp_path / "src")
    _edit(lambda s: s[CODES][104 // 2, 3].fill_(float("nan")), "consolidated.01.pth")(source)
    with pytest.raises(BadInput, match=rf"{CODES}: expert 1 has 1 NaN numbers, which fp8 cannot hold"):
        export(source, tmp_path / "out", recipe="meta-fp8")
    assert json.loads((tmp_path / "out" / "llama4-convert.json").read_text())["files"].keys() == {
        "tokenizer.model", "consolidated.00.pth", "fp8_scales_0.pt"
    }  # fmt: skip
