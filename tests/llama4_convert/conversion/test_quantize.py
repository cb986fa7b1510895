"""`convert --recipe`: what is written, who loads it, what it cost, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4_convert import convert, inspect, load_reference, plan, validate
from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.errors import BadInput, CheckFailed, EnvironmentFailed, UsageError
from llama4_convert.validation.parity.transformers_runner import load_transformers
from quant.schemes.int4 import Int4
from tests.support import commands, meta_model

RECIPES = ("int4", "int4-experts", "int4-signed", "fp8", "mixed", "nf4")
FEED_FORWARD = (
    "experts.",
    "shared_expert.",
    "feed_forward.gate_proj",
    "feed_forward.up_proj",
    "feed_forward.down_proj",
)

# Widths that groups of 128 divide, and no powers of two; MoE and dense layers, with and without a vision tower.
_WIDE: dict[str, Any] = {
    **meta_model.GEOMETRIES["scout"],
    "dim": 384,
    "n_layers": 4,
    "n_heads": 6,
    "n_kv_heads": 2,
    "head_dim": 64,
    "multiple_of": 128,
    "ffn_dim_multiplier": 0.5,
    "ffn_exp": 4.0,
    "attention_chunk_size": 16,
    "moe_args": {**meta_model.GEOMETRIES["scout"]["moe_args"], "num_experts": 3, "interleave_moe_layer_step": 2},
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "mixed": _WIDE,
    "text": {**_WIDE, "vision_args": None, "n_layers": 2},
    "dense": {**_WIDE, "moe_args": None, "n_layers": 2},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(geometry: str) -> Path:
        if geometry not in made:
            model = meta_model.build(GEOMETRIES[geometry], seed=1)
            made[geometry] = tmp_path_factory.mktemp(geometry)
            meta_model.write_checkpoint(model, GEOMETRIES[geometry], made[geometry], ranks=2)
        return made[geometry]

    return get


@pytest.fixture(scope="module")
def plain(source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(geometry: str) -> Path:
        if geometry not in made:
            made[geometry] = tmp_path_factory.mktemp(f"{geometry}-bf16") / "out"
            convert(source(geometry), made[geometry])
        return made[geometry]

    return get


@pytest.fixture(scope="module")
def quantized(
    source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, dict[str, Any]]]:
    made: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}

    def get(geometry: str, recipe: str) -> tuple[Path, dict[str, Any]]:
        if (geometry, recipe) not in made:
            path = tmp_path_factory.mktemp(f"{geometry}-{recipe}") / "out"
            made[geometry, recipe] = path, convert(source(geometry), path, recipe=recipe)
        return made[geometry, recipe]

    return get


def matrices(plain: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every feed-forward matrix of a bf16 directory as a linear layer's [out, in], experts one by one."""
    for key, tensor in tensors(plain).items():
        if key.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                for name, half in zip(("gate_proj", "up_proj"), both.chunk(2, -1), strict=True):
                    yield f"{key.removesuffix('gate_up_proj')}{e}.{name}", half.T
        elif key.endswith("experts.down_proj"):
            yield from ((f"{key.removesuffix('down_proj')}{e}.down_proj", one.T) for e, one in enumerate(tensor))
        elif any(part in key for part in FEED_FORWARD):
            yield key.removesuffix(".weight"), tensor


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {key: t for file in sorted(path.glob("*.safetensors")) for key, t in load_file(file).items()}


def cases() -> list[tuple[str, str]]:
    return [(g, r) for g in GEOMETRIES for r in RECIPES if (g, r) != ("dense", "int4-experts")]


@pytest.mark.parametrize(("geometry", "recipe"), cases())
def test_transformers_loads_it_and_computes_what_the_dequantized_model_does(
    geometry: str,
    recipe: str,
    quantized: Callable[..., Any],
    plain: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """No missing, unexpected or mismatched key (`load_transformers` raises); the weights are those that our reader makes.

    Both are loaded in bf16, as the weights are, and compute in float32, where nothing but the weights tells them apart.
    """
    path, _ = quantized(geometry, recipe)
    model = load_transformers(path, torch.bfloat16)
    if recipe == "nf4":  # by bitsandbytes itself: its layers compute in bf16 alone, on each processor in another way
        model.dequantize()
    tokens = torch.arange(5, 45)[None] * 50 % 2000
    with torch.no_grad():
        found = model(tokens).logits  # and with compressed-tensors the weights are decompressed by this
    if recipe in ("fp8", "mixed"):  # activations are quantized as well, which the dequantized model does not do
        assert found.isfinite().all()
        return
    expected = dequantized_model(path, plain(geometry), tmp_path)
    for one in (model, expected):
        torch.nn.Module.float(one)  # Transformers' own refuses what was quantized
    with torch.no_grad():
        ours, theirs = expected(tokens).logits, model(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_bitsandbytes_layers_compute_with_these_weights_up_to_the_rounding_of_bf16(
    geometry: str, quantized: Callable[..., Any]
) -> None:
    """Run as they are, in bf16. On processors with avx512_bf16 they also round the scales, which others do not."""
    path, _ = quantized(geometry, "nf4")
    model, value = load_transformers(path, torch.bfloat16), read(path)
    layers = {name: layer for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"}
    assert layers.keys() == json.loads((path / "llama4-convert.json").read_bytes())["errors"].keys()
    for name, layer in layers.items():
        weight = value(name)
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.no_grad():
            found = layer(x).double()
        # Four roundings, each by at most 2^-9 of what is rounded, and that is at most the sum of the products' magnitudes.
        limit = 4 * 2**-9 * (x.double().abs() @ weight.double().abs().T)
        assert ((found - x.double() @ weight.double().T).abs() <= limit).all(), name


def dequantized_model(path: Path, plain: Path, folder: Path) -> Any:
    """The bf16 directory with every quantized matrix replaced by what our reader makes of it, in Transformers."""
    reader = read(path)
    shutil.copytree(plain, folder / "dequantized")
    for file in (folder / "dequantized").glob("*.safetensors"):
        changed = load_file(file)
        for key, tensor in changed.items():
            stem = key.removesuffix(".weight")
            if key.endswith("experts.gate_up_proj"):
                for e in range(len(tensor)):
                    at = f"{key.removesuffix('gate_up_proj')}{e}."
                    tensor[e] = torch.cat([reader(f"{at}{n}_proj") for n in ("gate", "up")]).T
            elif key.endswith("experts.down_proj"):
                for e in range(len(tensor)):
                    tensor[e] = reader(f"{key.removesuffix('down_proj')}{e}.down_proj").T
            elif any(part in key for part in FEED_FORWARD):
                tensor.copy_(reader(stem))
        save_file({k: t.contiguous() for k, t in changed.items()}, file, {"format": "pt"})
    return load_transformers(folder / "dequantized", torch.bfloat16)


def read(path: Path) -> Callable[[str], torch.Tensor]:
    """Module name -> the matrix that a runtime computes with, through our reader."""
    from llama4.loading import to_tensor
    from llama4_convert.reference.checkpoint import Checkpoint

    reader = Checkpoint.open(path).readers[0]
    return lambda module: to_tensor(reader.read(f"{module}.weight"), reader.dtype(f"{module}.weight"))


@pytest.mark.parametrize(("geometry", "recipe"), cases())
def test_errors_are_what_was_really_made(
    geometry: str, recipe: str, quantized: Callable[..., Any], plain: Callable[[str], Path]
) -> None:
    """Recomputed from the written files against the bf16 conversion, matrix by matrix."""
    path, result = quantized(geometry, recipe)
    told = json.loads((path / "llama4-convert.json").read_bytes())["errors"]
    value = read(path)
    seen = set()
    error = power = 0.0
    for module, weight in matrices(plain(geometry)):
        if module not in told:
            assert recipe == "int4-experts"
            assert torch.equal(value(module), weight)
            continue
        seen.add(module)
        e = (value(module).double() - weight.double()).square().sum().item()
        p = weight.double().square().sum().item()
        # What runtimes compute with is rounded to bf16, the error that is told is the exact product's.
        assert told[module][0] == pytest.approx(e, rel=0.02)
        assert told[module][1] == pytest.approx(p, rel=1e-5)
        error, power = error + told[module][0], power + told[module][1]
    assert seen == told.keys()
    quantization = result.quantization
    assert quantization.relative_mse == pytest.approx(error / power)
    assert quantization.matrices == len(told)
    bound = 0.001 if recipe == "fp8" else 0.0125
    assert quantization.relative_mse < bound
    assert quantization.worst[0].relative_mse == pytest.approx(max(e / p for e, p in told.values()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_plan_knows_every_byte(recipe: str, source: Callable[[str], Path], quantized: Callable[..., Any]) -> None:
    path, _ = quantized("mixed", recipe)
    promised = plan(source("mixed"), recipe=recipe)
    found = {key: (list(t.shape), t.nbytes) for key, t in tensors(path).items()}
    assert {t.name: (t.shape, t.bytes) for t in promised.tensors} == found
    assert promised.output_bytes == sum(f.stat().st_size for f in path.glob("*.safetensors"))
    assert promised.parameters == plan(source("mixed")).parameters
    told = promised.quantization
    assert sum(told.bytes_after.values()) == sum(nbytes for _, nbytes in found.values())
    assert sum(told.bytes_before.values()) == sum(t.bytes for t in plan(source("mixed")).tensors)
    expected = {"int4": 4.125, "int4-experts": 4.125, "int4-signed": 4.125, "fp8": 8, "nf4": 4.127}.get(recipe)
    if expected:  # and a little for what a matrix has once
        assert expected <= told.bits_per_quantized_weight < expected + 0.3


@pytest.mark.parametrize("recipe", RECIPES)
def test_tensors_are_aligned_for_readers_that_view_them_in_place(recipe: str, source: Callable[[str], Path]) -> None:
    sizes = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "U8": 1, "F8_E4M3": 1}
    for tensor in plan(source("mixed"), recipe=recipe).tensors:
        assert tensor.offset % sizes[tensor.dtype] == 0, tensor["name"]


def test_int4_is_the_schemes_own_result(quantized: Callable[..., Any], plain: Callable[[str], Path]) -> None:
    """Ranks, gathering and threads change nothing: each matrix is as if it had been quantized alone."""
    path, _ = quantized("mixed", "int4")
    found = tensors(path)
    for module, weight in matrices(plain("mixed")):
        bits = weight.contiguous().view(torch.int16).numpy().view(np.uint16)
        expected = Int4().quantize(bits, in_out=False)
        assert np.array_equal(found[f"{module}.weight_packed"].numpy(), expected.packed)
        assert np.array_equal(found[f"{module}.weight_scale"].view(torch.int16).numpy().view(np.uint16), expected.scale)
        assert found[f"{module}.weight_shape"].tolist() == list(weight.shape)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_reference_and_validate_read_it(
    recipe: str, source: Callable[[str], Path], quantized: Callable[..., Any]
) -> None:
    path, _ = quantized("mixed", recipe)
    result = validate(path, reference=source("mixed"), tokens=48)
    assert result.config_differences == []
    assert result.tensors_different == []
    assert sum(told.matrices for told in result.tensors_quantized.values()) > 0
    assert 0 < result.kl_mean < 1
    tokens = torch.arange(3, 20)[None]
    assert load_reference(path, dtype=torch.float32)(tokens).isfinite().all()


def test_a_wrong_tensor_in_a_quantized_directory_is_named(
    source: Callable[[str], Path], quantized: Callable[..., Any], tmp_path: Path
) -> None:
    path, _ = quantized("text", "int4")
    shutil.copytree(path, tmp_path / "bad")
    [file] = (tmp_path / "bad").glob("*.safetensors")
    changed = load_file(file)
    key = "model.layers.1.feed_forward.experts.2.up_proj.weight_packed"
    changed[key] = changed[key].flip(0)
    save_file(changed, file, {"format": "pt"})
    result = validate(tmp_path / "bad", reference=source("text"), tokens=8)
    assert not result.passed
    assert result.first_divergence.tensor == "model.layers.1.feed_forward.experts.gate_up_proj"
    assert "experts.2.up" in result.first_divergence.module


def test_rules_by_layer_and_expert(source: Callable[[str], Path], plain: Callable[[str], Path], tmp_path: Path) -> None:
    """MoE layers that stay are linearized all the same: no runtime reads fused and single experts side by side."""
    (tmp_path / "mine.toml").write_text(
        'format = "compressed-tensors"\n'
        '[[rule]]\nfamilies = ["routed_experts", "shared_expert"]\nscheme = "keep"\nlayers = [1]\n'
        '[[rule]]\nfamilies = ["routed_experts", "shared_expert"]\nscheme = "int4"\ngroup_size = 64\n'
        '[[rule]]\nfamilies = ["dense_mlp"]\nscheme = "fp8"\nlayers = [0]\n'
    )
    convert(source("mixed"), tmp_path / "out", recipe=str(tmp_path / "mine.toml"))
    found = tensors(tmp_path / "out")
    assert not any("experts.gate_up_proj" in key for key in found)
    at = "language_model.model.layers."
    for module, weight in matrices(plain("mixed")):
        layer = int(module.removeprefix(at).split(".")[0])
        if layer in (1, 2):
            assert torch.equal(found[f"{module}.weight"], weight)
        elif layer == 0:
            assert found[f"{module}.weight"].dtype == torch.float8_e4m3fn
        else:
            assert found[f"{module}.weight_scale"].shape == (weight.shape[0], weight.shape[1] // 64)
    model = load_transformers(tmp_path / "out", torch.bfloat16)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_quantized_from_bf16(dtype: torch.dtype, tmp_path: Path) -> None:
    """As if the checkpoint had been rounded to bf16 before."""
    model = meta_model.build(GEOMETRIES["text"], seed=1, dtype=dtype)
    meta_model.write_checkpoint(model, GEOMETRIES["text"], tmp_path / "wide", ranks=2, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    meta_model.write_checkpoint(model, GEOMETRIES["text"], tmp_path / "narrow", ranks=2)
    for name in ("wide", "narrow"):
        convert(tmp_path / name, tmp_path / f"{name}-out", recipe="int4")
    narrow, wide = tensors(tmp_path / "narrow-out"), tensors(tmp_path / "wide-out")
    assert narrow.keys() == wide.keys()
    for key in narrow:
        if "weight_" in key:
            assert torch.equal(narrow[key], wide[key]), key


class TestRefused:
    def test_numbers_that_are_not_finite(self, source: Callable[[str], Path], tmp_path: Path) -> None:
        shutil.copytree(source("text"), tmp_path / "nan")
        file = tmp_path / "nan" / "consolidated.01.pth"
        content = torch.load(file, weights_only=False)
        content["layers.1.feed_forward.experts.moe_w_out_eF_D"][3, 5] = float("nan")
        torch.save(content, file)
        with pytest.raises(BadInput, match=r"experts\.0\.down_proj\.weight has 1 NaN of .* leave it out"):
            convert(tmp_path / "nan", tmp_path / "out", recipe="int4")
        assert not list((tmp_path / "out").glob("*.index.json"))
        convert(tmp_path / "nan", tmp_path / "plain")  # without a recipe they pass as they are

    def test_widths_that_groups_do_not_divide(self, meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
        source = meta_checkpoint("odd", ranks=2).src
        with pytest.raises(BadInput, match=r"96 inputs do not divide by the group size 128.*take a smaller group"):
            plan(source, recipe="int4")
        (tmp_path / "mine.toml").write_text(
            'format = "compressed-tensors"\n[[rule]]\nfamilies = ["dense_mlp"]\nscheme = "fp8"\n'
        )
        assert plan(source, recipe=str(tmp_path / "mine.toml")).quantization.recipe == "mine"

    def test_a_recipe_that_names_nothing_of_the_model(self, source: Callable[[str], Path]) -> None:
        with pytest.raises(UsageError, match="int4-experts quantizes nothing of this model"):
            plan(source("dense"), recipe="int4-experts")

    def test_an_unknown_recipe_on_the_command_line(
        self, source: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        outcome = commands.run(capsys, "convert", source("text"), tmp_path / "out", "--recipe", "int5")
        assert outcome.code == 2
        assert 'did you mean "int4"?' in outcome.error

    def test_more_error_than_was_allowed(
        self, source: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(CheckFailed, match=r"relative squared error of 0\.01.* more than the 0\.001"):
            convert(source("text"), tmp_path / "out", recipe="int4", max_error=0.001)
        assert not list((tmp_path / "out").glob("*.index.json"))
        outcome = commands.run(
            capsys, "convert", source("text"), tmp_path / "out", "--recipe", "int4", "--max-error", "0.001"
        )
        assert outcome.code == 5
        assert convert(source("text"), tmp_path / "out", recipe="int4", max_error=0.5).status == "converted"


def test_another_recipe_is_another_conversion(source: Callable[[str], Path], tmp_path: Path) -> None:
    convert(source("text"), tmp_path / "out", recipe="int4")
    assert convert(source("text"), tmp_path / "out", recipe="int4").status == "already complete"
    with pytest.raises(UsageError, match="another conversion: recipe"):
        convert(source("text"), tmp_path / "out", recipe="fp8")


def test_a_killed_run_goes_on_to_the_same_bytes(source: Callable[[str], Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": "mixed", "shard_size": 300_000}
    whole = convert(source("mixed"), tmp_path / "whole", **options)
    with pytest.raises(commands.Stop):
        convert(source("mixed"), tmp_path / "killed", progress=commands.stopping_after(4_000_000), **options)
    resumed = convert(source("mixed"), tmp_path / "killed", **options)
    assert resumed.files_kept_from_earlier_run > 0
    assert resumed.files == whole.files
    assert resumed.quantization == whole.quantization


def test_tensors_that_share_a_storage_are_read_in_any_order(source: Callable[[str], Path], tmp_path: Path) -> None:
    """The next matrix is read while one is encoded: with all records one, nothing may come to depend on the order."""
    import codecs
    import io

    (tmp_path / "shared").mkdir()
    for path in sorted(source("mixed").iterdir()):
        if path.suffix != ".pth":
            shutil.copy(path, tmp_path / "shared")
            continue
        with torch.serialization.safe_globals([io.BytesIO, codecs.encode]):
            rank = torch.load(path, weights_only=True)
        found = {key: value for key, value in rank.items() if isinstance(value, torch.Tensor)}
        flat = torch.cat([value.flatten() for value in found.values()])
        parts = flat.split([value.numel() for value in found.values()])
        views = {key: part.view_as(found[key]) for key, part in zip(found, parts, strict=True)}
        torch.save({**rank, **views}, tmp_path / "shared" / path.name)
    for name, from_ in (("one", tmp_path / "shared"), ("apart", source("mixed"))):
        convert(from_, tmp_path / name, recipe="int4", shard_size=1 << 20)
    one, apart = (tensors(tmp_path / name) for name in ("one", "apart"))
    assert one.keys() == apart.keys()
    assert all(torch.equal(one[key], apart[key]) for key in apart)


def test_a_record_that_feeds_several_files_is_checked_over_all_of_them(
    source: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each file: the CRCs go on where they were. Damaged behind the first files: these are made again, too."""
    from llama4_convert.streaming import writer

    sound, damaged, target = source("mixed"), tmp_path / "damaged", tmp_path / "out"
    options: dict[str, Any] = {"recipe": "int4", "shard_size": 100_000}
    convert(sound, tmp_path / "straight", **options)
    straight = commands.digests(tmp_path / "straight")
    commit, begun = writer.FileWriter.commit, []

    def once(self: writer.FileWriter) -> str:
        if begun:
            raise OSError(28, "full")
        begun.append(self.path.name)
        return commit(self)

    with monkeypatch.context() as patch:
        patch.setattr(writer.FileWriter, "commit", once)
        carried = 0
        for _ in range(len(straight)):
            begun.clear()
            with contextlib.suppress(EnvironmentFailed):
                convert(sound, target, **options)
                break
            carried += bool(json.loads((target / "llama4-convert.json").read_text())["records"])
    assert carried > 2
    assert commands.digests(target) == straight
    assert json.loads((target / "llama4-convert.json").read_text())["records"] == []

    shutil.rmtree(target)
    shutil.copytree(sound, damaged)
    rank = sorted(damaged.glob("*.pth"))[0]
    key = next(key for key in PthIndex.read(rank).tensors if "layers.1." in key and "experts" in key)
    record = PthIndex.read(rank).tensors[key].record
    commands.flip(rank, record.offset + record.size - 1)
    with pytest.raises(BadInput, match="damaged"):
        convert(damaged, target, **options)
    kept = json.loads((target / "llama4-convert.json").read_text())["files"]
    weights = sorted(name for name in straight if name.endswith(".safetensors"))
    assert kept.keys() & set(weights)
    made = {name for name in weights if (target / name).exists()}
    assert made - kept.keys()  # finished before the damage was met, and made of what it was met in
    convert(sound, target, **options)
    assert commands.digests(target) == straight


def _interrupted_after(files: int) -> Callable[[Any], str]:
    """A `FileWriter.commit` that works so many times."""
    from llama4_convert.streaming import writer

    commit, left = writer.FileWriter.commit, [files]

    def committing(self: writer.FileWriter) -> str:
        if not left[0]:
            raise OSError(28, "full")
        left[0] -= 1
        return commit(self)

    return committing


def test_what_was_made_of_a_record_that_was_never_checked_to_its_end_is_made_again(
    source: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage at its beginning, an interruption before its end, a file lost, and the source repaired: nothing of it stays."""
    from llama4_convert.streaming import writer

    sound, target, options = source("mixed"), tmp_path / "out", {"recipe": "int4", "shard_size": 100_000}
    convert(sound, tmp_path / "straight", **options)  # type: ignore[arg-type]
    straight = commands.digests(tmp_path / "straight")
    damaged = tmp_path / "damaged"
    shutil.copytree(sound, damaged)
    rank = sorted(damaged.glob("*.pth"))[0]
    for name in ("moe_w_in", "moe_w_swiglu", "w1", "w3"):  # gate and up, by turns: both are read in part
        for key, tensor in PthIndex.read(rank).tensors.items():
            if "layers.1." in key and "experts" in key and name in key:
                commands.flip(rank, tensor.record.offset + 1)
    for files in range(len(straight)):
        shutil.rmtree(target, ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(writer.FileWriter, "commit", _interrupted_after(files))
            with contextlib.suppress(EnvironmentFailed, BadInput):
                convert(damaged, target, **options)  # type: ignore[arg-type]
        body = json.loads((target / "llama4-convert.json").read_text())
        if len(body["records"]) >= 2:
            break
    else:
        pytest.fail("no two records were ever read in part")
    last = sorted(name for name in body["files"] if name.endswith(".safetensors"))[-1]
    (target / last).unlink()
    convert(sound, target, **options)  # type: ignore[arg-type]
    assert commands.digests(target) == straight


def test_names_that_a_terminal_would_not_print_are_names(
    source: Callable[[str], Path], plain: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(plain("text"), tmp_path / "src")
    (tmp_path / "src" / "notes\u202f1.md").write_text("a space as macOS makes it")
    (tmp_path / "src" / "bell\a.md").write_text("left out")
    convert(tmp_path / "src", tmp_path / "out", recipe="int4")
    assert (tmp_path / "out" / "notes\u202f1.md").exists()
    assert not (tmp_path / "out" / "bell\a.md").exists()
    assert convert(tmp_path / "src", tmp_path / "out", recipe="int4").status == "already complete"


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = commands.run(capsys, "recipes", "--json")
    assert {r["name"] for r in json.loads(outcome.out)["recipes"]} == {*RECIPES, "meta-fp8"}


def test_plan_with_a_gpu(source: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--recipe", "int4", "--gpu", "h100-80gb", "--context", "64")
    outcome = commands.run(capsys, "plan", source("mixed"), *options, "--json")
    fit = json.loads(outcome.out)["fit"]
    assert fit["gpu"] == "h100-80gb"
    weights = sum(t["bytes"] for t in json.loads(outcome.out)["tensors"])
    assert fit["weight_bytes"] == weights
    assert {r["runtime"] for r in fit["runtimes"]} >= {"vllm", "sglang", "transformers"}
    assert all(r["fits"] for r in fit["runtimes"])
    assert commands.run(capsys, "plan", source("mixed"), "--context", "64").code == 2


class TestFromATransformersDirectory:
    """Fine-tunes come so, experts fused or linearized: the same bytes as from Meta's files."""

    @staticmethod
    def linearize(plain: Path, folder: Path) -> Path:
        """A copy whose experts are linear layers, in files of another cut."""
        shutil.copytree(plain, folder)
        content = tensors(plain)
        for file in [*folder.glob("*.safetensors"), folder / "llama4-convert.json"]:
            file.unlink()
        single = {f"{module}.weight": t.contiguous() for module, t in matrices(plain)}
        rest = {key: t for key, t in content.items() if not key.endswith(("experts.gate_up_proj", "experts.down_proj"))}
        save_file({k: t for k, t in single.items() if ".experts." in k}, folder / "experts.safetensors")
        save_file(rest, folder / "rest.safetensors")
        weight_map = dict.fromkeys(rest, "rest.safetensors")
        weight_map |= {k: "experts.safetensors" for k in single if ".experts." in k}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("form", ["fused", "linearized"])
    def test_the_weights_are_those_from_metas_files(
        self, form: str, recipe: str, plain: Callable[[str], Path], quantized: Callable[..., Any], tmp_path: Path
    ) -> None:
        source = plain("mixed") if form == "fused" else self.linearize(plain("mixed"), tmp_path / "linear")
        result = convert(source, tmp_path / "out", recipe=recipe)
        expected, found = tensors(quantized("mixed", recipe)[0]), tensors(tmp_path / "out")
        assert found.keys() == expected.keys()
        for key in found:
            assert torch.equal(found[key].view(torch.uint8), expected[key].view(torch.uint8)), key
        assert result.quantization == quantized("mixed", recipe)[1].quantization
        config = (tmp_path / "out" / "config.json").read_bytes()
        assert config == (quantized("mixed", recipe)[0] / "config.json").read_bytes()
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()

    def test_what_makes_no_sense_is_refused(
        self, plain: Callable[[str], Path], quantized: Callable[..., Any], tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match="already: add --recipe"):
            convert(plain("text"), tmp_path / "out")
        with pytest.raises(UsageError, match="--dtype is for Meta's layout"):
            convert(plain("text"), tmp_path / "out", recipe="int4", dtype="float16")
        with pytest.raises(UsageError, match="quantized already"):
            convert(quantized("text", "int4")[0], tmp_path / "out", recipe="fp8")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                lambda t: t.pop("model.layers.1.feed_forward.experts.down_proj"),
                r"missing model\.layers\.1\..*down_proj",
            ),
            (lambda t: t.update({"model.extra": torch.zeros(1)}), "unknown key model.extra"),
            (lambda t: t.update({"model.norm.weight": torch.zeros(5)}), r"model\.norm\.weight has shape \[5\]"),
        ],
        ids=["missing", "unknown", "misshapen"],
    )
    def test_a_directory_that_does_not_fit_its_config(
        self, change: Callable[[dict[str, Any]], Any], words: str, plain: Callable[[str], Path], tmp_path: Path
    ) -> None:
        shutil.copytree(plain("text"), tmp_path / "bad")
        [file] = (tmp_path / "bad").glob("*.safetensors")
        content = load_file(file)
        change(content)
        save_file(content, file)
        weight_map = dict.fromkeys(content, file.name)
        (tmp_path / "bad" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(BadInput, match=words):
            convert(tmp_path / "bad", tmp_path / "out", recipe="int4")


class TestDevice:
    @pytest.mark.parametrize("recipe", ["int4", "mixed", "nf4"])
    def test_the_bytes_are_the_same(
        self, recipe: str, source: Callable[[str], Path], quantized: Callable[..., Any], tmp_path: Path
    ) -> None:
        """What a GPU runs, run by torch without one."""
        result = convert(source("text"), tmp_path / "out", recipe=recipe, device="torch-cpu")
        assert result.files == quantized("text", recipe)[1].files

    def test_a_device_that_is_not_there(self, source: Callable[[str], Path], tmp_path: Path) -> None:
        for device in ("tpu", f"cuda:{torch.cuda.device_count()}"):
            with pytest.raises(UsageError, match=f"device '{device}'"):
                convert(source("text"), tmp_path / "out", recipe="int4", device=device)
        with pytest.raises(UsageError, match="without --recipe nothing is computed"):
            convert(source("text"), tmp_path / "out", device="cuda")


@pytest.mark.parametrize("recipe", ["int4", "mixed", "nf4"])
def test_inspect_counts_what_packed_words_stand_for(
    recipe: str, plain: Callable[[str], Path], quantized: Callable[..., Any]
) -> None:
    path, result = quantized("mixed", recipe)
    found = inspect(path)
    assert found.parameters == inspect(plain("mixed")).parameters == result.parameters
    assert sum(found.quantized.values()) == result.quantization.matrices


def test_progress_ends_where_it_said(source: Callable[[str], Path], tmp_path: Path) -> None:
    """Both numbers count the bytes that are read, not the fewer that are written."""
    told: list[int] = []
    moved: list[int] = []
    convert(
        source("mixed"), tmp_path / "out", recipe="mixed", start=lambda total, done: told.append(total - done),
        progress=moved.append,
    )  # fmt: skip
    assert sum(moved) == told[0]


def test_nf4_in_transformers_wants_bfloat16(source: Callable[[str], Path], quantized: Callable[..., Any]) -> None:
    path, _ = quantized("text", "nf4")
    with pytest.raises(UsageError, match="add --dtype bfloat16"):
        validate(path, reference=source("text"), runner="transformers", tokens=8)
    assert validate(path, reference=source("text"), runner="transformers", tokens=8, dtype="bfloat16").tokens
