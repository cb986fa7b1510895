"""`--adapter`: what PEFT's own merge makes in fp32, bit by bit, in the stream and before any recipe."""

from __future__ import annotations

import functools
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama4_convert import convert, plan
from llama4_convert.errors import BadInput
from llama4_convert.planning import changes
from llama4_convert.planning.changes import row_blocks
from llama4_convert.validation.parity.transformers_runner import load_transformers
from tests.support import adapter as peft
from tests.support import commands, meta_model

REPOSITORY = Path(__file__).resolve().parents[3]
WEIGHTS = "adapter_model.safetensors"

# Ranks and alphas by module, rank-stabilized scaling, experts fused, embeddings, and what is trained whole.
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": peft.ATTENTION},
    "feed-forward": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {r"layers\.1\.feed_forward\..*gate_proj": 1},
    },
    "experts": {
        "r": 2,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": ["o_proj"],
        "target_parameters": peft.EXPERTS,
        "rank_pattern": {"experts.down_proj": 5, "o_proj": 16},
        "alpha_pattern": {"experts.gate_up_proj": 3},
    },
    "down only": {"r": 4, "target_modules": ["q_proj"], "target_parameters": peft.EXPERTS[1:]},
    "ends": {
        "r": 6,
        "lora_alpha": 16,
        "target_modules": ["embed_tokens", "lm_head"],
        "modules_to_save": ["router", "input_layernorm"],
    },
}


def source(meta_checkpoint: Callable[..., Any], geometry: str) -> Path:
    path: Path = meta_checkpoint(geometry, 2, dtype=torch.float32).src
    return path


@pytest.fixture(scope="session")
def whole(meta_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`whole(geometry)`: its conversion, in fp32."""

    @functools.cache
    def get(geometry: str) -> Path:
        path = tmp_path_factory.mktemp(f"{geometry}-fp32-") / "out"
        convert(source(meta_checkpoint, geometry), path)
        return path

    return get


@pytest.fixture(scope="session")
def trained(whole: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`trained(geometry, name)`: an adapter of PEFT's. Read only."""

    @functools.cache
    def get(geometry: str, name: str) -> Path:
        folder = tmp_path_factory.mktemp("adapter")
        return peft.train(load_transformers(whole(geometry), torch.float32), folder, **ADAPTERS[name])

    return get


# -------------------- what is warned of


def test_factors_that_change_nothing_are_named(
    whole: Callable[..., Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    assert convert(whole("maverick"), tmp_path / "trained", adapter=trained("maverick", "attention")).warnings == []
    adapter = tmp_path / "adapter"
    shutil.copytree(trained("maverick", "attention"), adapter)
    factors = load_file(adapter / WEIGHTS)
    key = next(key for key in factors if "layers.1.self_attn.q_proj.lora_B" in key)
    factors[key] = torch.zeros_like(factors[key])
    save_file(factors, adapter / WEIGHTS)
    (warning,) = convert(whole("maverick"), tmp_path / "one", adapter=adapter).warnings
    assert f"1 of {len(factors) // 2} pairs of factors change nothing" in warning
    assert "layers.1.self_attn.q_proj)" in warning
    change(adapter, lora_alpha=0)
    (warning,) = convert(whole("maverick"), tmp_path / "all", adapter=adapter).warnings
    assert f"{len(factors) // 2} of {len(factors) // 2} pairs" in warning
    base = peft.tensors(whole("maverick"))
    assert peft.different(peft.tensors(tmp_path / "all"), base) == []


def test_a_product_that_overflows_the_dtype_is_named(
    whole: Callable[..., Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trained("maverick", "attention"), adapter)
    factors = load_file(adapter / WEIGHTS)
    for key in factors:
        if "language_model.model.layers.1.self_attn.q_proj.lora" in key:
            factors[key] = torch.full_like(factors[key], 3e38)
    save_file(factors, adapter / WEIGHTS)
    told: list[str] = []
    result = convert(whole("maverick"), tmp_path / "out", adapter=adapter, warn=told.append)
    assert ["language_model.model.layers.1.self_attn.q_proj" in one.tensor for one in result.nonfinite] == [True]
    assert any("layers.1.self_attn.q_proj" in text for text in told), told


# -------------------- what PEFT makes


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("geometry", ["odd", "maverick"])
def test_equals_pefts_merge(
    geometry: str, name: str, whole: Callable[..., Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    """From a Transformers directory. `odd`: 3 experts and widths that are no powers of two; `maverick`: dense layers, too."""
    result = convert(whole(geometry), tmp_path / "out", adapter=trained(geometry, name))
    found, base = peft.tensors(tmp_path / "out"), peft.tensors(whole(geometry))
    assert peft.different(found, peft.merged(whole(geometry), trained(geometry, name))) == []
    assert len(peft.different(found, base)) > 3
    assert result.adapter.rank == ADAPTERS[name]["r"]


@pytest.mark.parametrize(
    ("geometry", "name"), [("scout", "experts"), ("top2", "feed-forward"), ("guard", "feed-forward")]
)
def test_from_metas_layout_too(
    geometry: str,
    name: str,
    whole: Callable[..., Path],
    trained: Callable[..., Path],
    meta_checkpoint: Callable[..., Any],
    tmp_path: Path,
) -> None:
    convert(source(meta_checkpoint, geometry), tmp_path / "out", adapter=trained(geometry, name))
    expected = peft.merged(whole(geometry), trained(geometry, name))
    assert peft.different(peft.tensors(tmp_path / "out"), expected) == []


def test_every_linear_layer_of_the_vision_tower(whole: Callable[..., Path], tmp_path: Path) -> None:
    """Biases included: those that were trained (`bias="all"`), and those that factors have (`lora_bias`)."""
    modules = [r"vision_model.model.*fc1", r"vision_model.*q_proj", "linear_1"]
    for name, more in (("all", {"bias": "all"}), ("factors", {"lora_bias": True})):
        targets = modules[:2] if name == "factors" else modules
        path = peft.train(
            load_transformers(whole("odd"), torch.float32),
            tmp_path / name,
            r=4,
            target_modules=f"(.*\\.)?({'|'.join(targets)})",
            **more,
        )
        convert(whole("odd"), tmp_path / f"{name}-out", adapter=path)
        found = peft.tensors(tmp_path / f"{name}-out")
        assert peft.different(found, peft.merged(whole("odd"), path)) == []
        changed = peft.different(found, peft.tensors(whole("odd")))
        assert any(key.endswith("q_proj.bias") for key in changed)


def test_linearized_experts_into_fused_ones(whole: Callable[..., Path], tmp_path: Path) -> None:
    """Only gate and down are trained, and expert 1 is left out: up, and that, keep every bit, -0 included."""

    def model() -> Any:
        return peft.linearize(load_transformers(whole("odd"), torch.float32))

    path = peft.train(model(), tmp_path / "adapter", r=4, target_modules=r".*experts\.[02]\.(gate|down)_proj")
    result = convert(whole("odd"), tmp_path / "out", adapter=path)
    expected = peft.fused(peft.merged_model(model(), path).state_dict())
    found = peft.tensors(tmp_path / "out")
    assert peft.different(found, expected) == []
    assert result.adapter.matrices_merged == 2 * 2 * 2  # two layers with experts, two of these, two projections

    state = load_file(path / WEIGHTS)  # as axolotl trains them: lists, `experts.gate_projs.2`
    save_file(
        {re.sub(r"experts\.(\d)\.(\w+)_proj", r"experts.\2_projs.\1", k): t for k, t in state.items()}, path / WEIGHTS
    )
    convert(whole("odd"), tmp_path / "lists", adapter=path)
    assert peft.different(peft.tensors(tmp_path / "lists"), expected) == []


def test_patterns_name_a_target_parameter_as_peft_does(whole: Callable[..., Path], tmp_path: Path) -> None:
    """By its own name: "q_proj" is the module, and says nothing of its weight where that is the target."""
    path = peft.train(
        load_transformers(whole("odd"), torch.float32),
        tmp_path / "adapter",
        r=4,
        target_modules=["k_proj"],
        target_parameters=["self_attn.q_proj.weight", "self_attn.v_proj.weight", "embed_tokens.weight"],
        rank_pattern={"v_proj.weight": 2},
        alpha_pattern={"q_proj": 3, "v_proj.weight": 5, "k_proj.weight": 7},
    )
    convert(whole("odd"), tmp_path / "out", adapter=path)
    assert peft.different(peft.tensors(tmp_path / "out"), peft.merged(whole("odd"), path)) == []


def test_a_linearized_source_and_a_fused_adapter(
    whole: Callable[..., Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    """Without a recipe experts are written fused."""
    linear = commands.copy(whole("odd"), tmp_path / "linear")
    state = peft.linearize(load_transformers(whole("odd"), torch.float32)).state_dict()
    for file in linear.glob("*.safetensors*"):
        file.unlink()
    save_file({key: t.contiguous() for key, t in state.items()}, linear / "model.safetensors")
    (linear / "llama4-convert.json").unlink()
    convert(linear, tmp_path / "out", adapter=trained("odd", "experts"))
    assert peft.different(peft.tensors(tmp_path / "out"), peft.merged(whole("odd"), trained("odd", "experts"))) == []


def test_factors_in_bf16(whole: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT loads them as fp32; what is saved in bf16 is exact in it."""
    model = load_transformers(whole("odd"), torch.float32)
    path = peft.train(model, tmp_path / "adapter", dtype=torch.bfloat16, **ADAPTERS["experts"])
    assert {t.dtype for t in load_file(path / WEIGHTS).values()} == {torch.bfloat16}
    convert(whole("odd"), tmp_path / "out", adapter=path)
    assert peft.different(peft.tensors(tmp_path / "out"), peft.merged(whole("odd"), path)) == []


@pytest.mark.parametrize("name", ["attention", "experts", "ends"])
def test_bf16_weights_are_rounded_once(
    name: str, converted: Callable[..., Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    """The sum is made in fp32. PEFT rounds linear layers once as well, but the product of experts before it is added, and what
    was saved whole beside factors (the ends, in fp32) before something is added to it.
    """
    convert(converted("odd"), tmp_path / "out", adapter=trained("odd", name))
    found = peft.tensors(tmp_path / "out")
    exact = peft.merged(converted("odd"), trained("odd", name))  # bf16 weights, held as fp32
    assert peft.different(found, {key: t.bfloat16() for key, t in exact.items()}) == []
    theirs = peft.merged(converted("odd"), trained("odd", name), torch.bfloat16)
    twice = {".".join(key.split(".")[-2:]) for key in peft.different(found, theirs)}
    expected = {
        "experts": {"experts.gate_up_proj", "experts.down_proj"},
        "ends": {"embed_tokens.weight", "lm_head.weight"},
    }
    assert twice == expected.get(name, set())


@pytest.mark.parametrize(("geometry", "name"), [("scout", "experts"), ("maverick", "feed-forward")])
def test_transformers_computes_what_peft_computes(
    geometry: str, name: str, whole: Callable[..., Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    """The adapter unmerged on the base model, against our merged directory."""
    convert(whole(geometry), tmp_path / "out", adapter=trained(geometry, name))
    tokens = torch.arange(5, 35)[None] * 60 % 2000
    with torch.no_grad(), peft.quiet():
        base = load_transformers(whole(geometry), torch.float32)
        before = base(tokens).logits
        expected = peft.PeftModel.from_pretrained(base, trained(geometry, name))(tokens).logits
        found = load_transformers(tmp_path / "out", torch.float32)(tokens).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (before - expected).abs().max() > 0.01 * expected.abs().max()


# -------------------- which side of an expert's matrix a factor belongs to

_SQUARE = {
    **meta_model.GEOMETRIES["top2"],
    "n_layers": 1,
    "multiple_of": 128,
    "ffn_dim_multiplier": 0.5,
    "ffn_exp": 4.0,
    "moe_args": {**meta_model.GEOMETRIES["top2"]["moe_args"], "auto_scale_F": True},
}


def test_the_layout_of_older_adapters_is_told_by_shapes(whole: Callable[..., Path], tmp_path: Path) -> None:
    """Before 0.19.1 PEFT took the first side of an expert's parameter for the input, as it still does if it is told to."""

    def model() -> Any:
        found = load_transformers(whole("odd"), torch.float32)
        for module in found.modules():
            if type(module).__name__ == "Llama4TextExperts":
                module.is_transposed = True
        return found

    path = peft.train(model(), tmp_path / "adapter", **ADAPTERS["experts"])
    convert(whole("odd"), tmp_path / "out", adapter=path)
    expected = peft.merged_model(model(), path).state_dict()
    assert peft.different(peft.tensors(tmp_path / "out"), expected) == []
    assert peft.different(expected, peft.tensors(whole("odd")))


def test_of_square_experts_pefts_version_tells(tmp_path: Path) -> None:
    meta_model.write_checkpoint(meta_model.build(_SQUARE, 0), _SQUARE, tmp_path / "meta", ranks=1, dtype=torch.float32)
    base = tmp_path / "base"
    convert(tmp_path / "meta", base)
    name = "model.layers.0.feed_forward.experts.down_proj"
    assert peft.tensors(base)[name].shape[1] == peft.tensors(base)[name].shape[2]
    model = load_transformers(base, torch.float32)
    path = peft.train(model, tmp_path / "adapter", r=2, target_modules=["q_proj"], target_parameters=peft.EXPERTS[1:])
    convert(base, tmp_path / "new", adapter=path)
    assert peft.different(peft.tensors(tmp_path / "new"), peft.merged(base, path)) == []

    change(path, peft_version="0.18.0")
    convert(base, tmp_path / "old", adapter=path)
    deltas = [peft.tensors(tmp_path / which)[name] - peft.tensors(base)[name] for which in ("new", "old")]
    torch.testing.assert_close(deltas[0], deltas[1].transpose(1, 2))

    for version in (None, "9" * 5000):
        change(path, peft_version=version)
        with pytest.raises(BadInput, match="peft_version is missing"):
            convert(base, tmp_path / "none", adapter=path)


# -------------------- before a recipe

_WIDE = {
    **meta_model.GEOMETRIES["top2"],
    "dim": 256,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 64,
    "multiple_of": 128,
    "moe_args": {**meta_model.GEOMETRIES["top2"]["moe_args"], "num_experts": 3, "interleave_moe_layer_step": 2},
}


@pytest.mark.parametrize("recipe", ["int4", "int4-experts", "fp8", "nf4"])
def test_quantized_as_the_merged_model_is(recipe: str, tmp_path: Path) -> None:
    """Whatever is fused, linearized or dense: the bytes that the recipe makes of PEFT's merged model."""
    meta_model.write_checkpoint(meta_model.build(_WIDE, 1), _WIDE, tmp_path / "meta", ranks=2, dtype=torch.float32)
    base = tmp_path / "base"
    convert(tmp_path / "meta", base)
    config = {**ADAPTERS["experts"], "target_modules": ["q_proj", "gate_proj", "down_proj"]}
    path = peft.train(load_transformers(base, torch.float32), tmp_path / "adapter", **config)
    peft.merged_model(load_transformers(base, torch.float32), path).save_pretrained(tmp_path / "merged")
    convert(tmp_path / "merged", tmp_path / "expected", recipe=recipe)
    expected = peft.tensors(tmp_path / "expected")
    for source in ("base", "meta"):
        convert(tmp_path / source, tmp_path / f"from-{source}", recipe=recipe, adapter=path)
        assert peft.different(peft.tensors(tmp_path / f"from-{source}"), expected) == []
    assert peft.different(expected, unmerged(base, recipe, tmp_path))


def unmerged(base: Path, recipe: str, folder: Path) -> dict[str, Tensor]:
    convert(base, folder / "unmerged", recipe=recipe)
    return peft.tensors(folder / "unmerged")


# -------------------- what is refused


def copied(trained: Callable[..., Path], tmp_path: Path, name: str = "experts", **tensors: Tensor | None) -> Path:
    """A copy of an adapter for `odd` with some tensors replaced, or left out; names are ends of keys with _ for dots."""
    path = commands.copy(trained("odd", name), tmp_path / "copy")
    state = load_file(path / WEIGHTS)
    for end, tensor in tensors.items():
        key = next((k for k in state if k.replace(".", "_").endswith(end)), None)
        assert key is not None, end
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor
    save_file(state, path / WEIGHTS)
    return path


def change(path: Path, **fields: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


A = "layers_1_self_attn_o_proj_lora_A_weight"
B = "layers_1_self_attn_o_proj_lora_B_weight"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            {A: torch.ones(5, 96)},
            "layers.1.self_attn.o_proj.lora_A.weight has rank 5, but adapter_config.json makes it 16",
        ),
        ({B: torch.ones(96, 15)}, "o_proj.lora_B.weight has rank 15"),
        ({A: torch.ones(16, 95)}, "o_proj.lora_A.weight does not fit: lora_B @ lora_A is [96, 95]"),
        ({B: torch.ones(97, 16)}, "o_proj.lora_B.weight does not fit: lora_B @ lora_A is [97, 96]"),
        ({B: None}, "o_proj.lora_A.weight has no lora_B beside it"),
        ({A: torch.full((16, 96), float("nan"))}, "o_proj.lora_A.weight has 1,536 NaN numbers"),
        ({B: torch.full((96, 16), float("inf"))}, "o_proj.lora_B.weight has 1,536 infinite numbers"),
        ({B: torch.ones(96, 16, dtype=torch.int32)}, "o_proj.lora_B.weight is I32"),
        ({A: torch.ones(16, 96, 1)}, "o_proj.lora_A.weight has shape [16, 96, 1]"),
        (
            {"layers_2_feed_forward_experts_lora_A_weight": torch.ones(15, 95)},
            "layers.2.feed_forward.experts.lora_A.weight",
        ),
        ({"layers_2_feed_forward_experts_lora_A_weight": torch.ones(12, 96)}, "experts.lora_A.weight has rank 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_factor_that_does_not_fit_is_named(
    tensors: dict[str, Any],
    says: str,
    whole: Callable[..., Path],
    trained: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = copied(trained, tmp_path, **tensors)
    outcome = commands.run(capsys, "convert", whole("odd"), tmp_path / "out", "--adapter", path)
    assert outcome.code == 3
    assert says in outcome.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "shape", "says"),
    [
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", [2, 96], "layers.9.self_attn.q_proj"),
        ("base_model.model.score.weight", [2, 96], "score.weight matches no tensor"),
        ("base_model.model.model.embed_tokens.weight", [9999, 96], "the vocabulary was resized"),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            [96],
            "lora_magnitude_vector matches no",
        ),
        ("base_model.model.model.layers.1.self_attn.o_proj.lora_B.bias", [96], "has no bias to be added to"),
    ],
)
def test_a_key_that_matches_nothing_is_named(
    key: str, shape: list[int], says: str, whole: Callable[..., Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    path = copied(trained, tmp_path)
    state = load_file(path / WEIGHTS) | {key: torch.ones(shape)}
    if key.endswith("lora_A.weight"):
        state[key.replace("lora_A", "lora_B")] = torch.ones(96, 2)
    if key.endswith("lora_B.bias"):
        state = {k.replace("language_model.", ""): t for k, t in state.items()}
    save_file(state, path / WEIGHTS)
    with pytest.raises(BadInput) as error:
        plan(whole("odd"), adapter=path)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("peft_type", "IA3"),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa"),
        ("a_field_of_the_future", {"changes": "everything"}),
        ("r", "4"),
        ("r", 0),
        ("lora_alpha", None),
        ("rank_pattern", {"q_proj": 1.5}),
        ("alpha_pattern", {"(": 1}),
        ("alpha_pattern", {"(?i)q_proj": 1}),  # an expression alone, none inside of PEFT's
        ("rank_pattern", {"(([a-z_.0-9])+)+X": 2}),  # which would not end
        ("rank_pattern", [1]),
        ("target_parameters", "experts"),
    ],
)
def test_what_is_no_plain_lora_is_named(
    field: str, value: Any, whole: Callable[..., Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    path = copied(trained, tmp_path)
    change(path, **{field: value})
    with pytest.raises(BadInput, match=field):
        plan(whole("odd"), adapter=path)


def test_directories_that_are_no_adapters(
    whole: Callable[..., Path], trained: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(path: Path) -> tuple[int, str]:
        outcome = commands.run(capsys, "plan", whole("odd"), "--adapter", path)
        return outcome.code, outcome.error

    assert said(tmp_path / "nowhere")[0] == 2
    path = copied(trained, tmp_path)
    assert said(tmp_path)[1].endswith(f"give the directory of a PEFT adapter, {path}")  # PEFT's place for a named one
    (path / WEIGHTS).unlink()
    assert said(path) == (
        3,
        f"{path} has neither {WEIGHTS} nor adapter_model.bin: it comes with adapter_config.json, fetch it again",
    )
    save_file({}, path / WEIGHTS)
    assert "holds no tensor" in said(path)[1]
    (path / "adapter_config.json").write_text("{")
    assert said(path)[0] == 3
    assert commands.run(capsys, "plan", whole("odd")).code == 2  # Transformers' layout, and nothing to be done


# -------------------- adapter_model.bin


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/executed",)


def test_a_pickle_is_read_and_never_executed(
    whole: Callable[..., Path], trained: Callable[..., Path], tmp_path: Path
) -> None:
    path = copied(trained, tmp_path)
    state = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    torch.save(state, path / "adapter_model.bin")
    result = convert(whole("odd"), tmp_path / "out", adapter=path)
    assert peft.different(peft.tensors(tmp_path / "out"), peft.merged(whole("odd"), trained("odd", "experts"))) == []
    assert result.adapter.sha256.keys() == {"adapter_config.json", "adapter_model.bin"}

    with zipfile.ZipFile(path / "adapter_model.bin") as archive:
        record = next(n for n in archive.namelist() if n.endswith("/data/0"))
    commands.flip(path / "adapter_model.bin", commands.data_offset(path / "adapter_model.bin", record) + 2)
    with pytest.raises(BadInput, match="damaged"):
        plan(whole("odd"), adapter=path)

    marker = Path("/tmp/executed")
    marker.unlink(missing_ok=True)
    for content in (pickle.dumps(_Evil()), b"PK"):
        (path / "adapter_model.bin").write_bytes(content)
        with pytest.raises(BadInput, match=WEIGHTS):
            plan(whole("odd"), adapter=path)
    torch.save({"x": _Evil()}, path / "adapter_model.bin")
    with pytest.raises(BadInput, match="nothing was executed"):
        plan(whole("odd"), adapter=path)
    assert not marker.exists()


# -------------------- manifest, resume, plan


def test_another_adapter_is_another_conversion(
    whole: Callable[..., Path], trained: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = trained("odd", "attention"), trained("odd", "experts")
    arguments = ["convert", whole("odd"), tmp_path / "out"]
    made = commands.run(capsys, *arguments, "--adapter", first, "--json").json
    before = commands.digests(tmp_path / "out"), weights_times(tmp_path / "out")
    copy = commands.copy(first, tmp_path / "moved")  # it is the content that counts
    again = commands.run(capsys, *arguments, "--adapter", copy, "--json").json
    assert (made["status"], again["status"]) == ("converted", "already complete")
    assert again["adapter"] == made["adapter"]
    assert (commands.digests(tmp_path / "out"), weights_times(tmp_path / "out")) == before
    manifest = json.loads((tmp_path / "out" / "llama4-convert.json").read_text())
    digests = commands.digests(first)
    assert manifest["source"]["adapter"] == {n: digests[n] for n in ("adapter_config.json", WEIGHTS)}
    outcome = commands.run(capsys, *arguments, "--adapter", second)
    assert outcome.code == 2
    assert "another adapter" in outcome.error
    outcome = commands.run(capsys, *arguments, "--recipe", "fp8")
    assert outcome.code == 2
    assert "no adapter now" in outcome.error
    change(copy, lora_alpha=9)  # the factors are the same
    assert commands.run(capsys, *arguments, "--adapter", copy).code == 2


def weights_times(folder: Path) -> dict[str, int]:
    return {name: at for name, at in commands.times(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_goes_on_where_it_stopped(
    part: float, meta_checkpoint: Callable[..., Any], trained: Callable[..., Path], tmp_path: Path
) -> None:
    src = source(meta_checkpoint, "odd")
    options: dict[str, Any] = {"adapter": trained("odd", "experts"), "shard_size": commands.SHARD}
    convert(src, tmp_path / "straight", **options)
    size = sum(file.stat().st_size for file in src.glob("*.pth"))
    with pytest.raises(commands.Stop):
        convert(src, tmp_path / "out", progress=commands.stopping_after(part * size), **options)
    convert(src, tmp_path / "out", **options)
    assert commands.digests(tmp_path / "out") == commands.digests(tmp_path / "straight")


def test_the_plan_tells_of_it(
    whole: Callable[..., Path], trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = commands.run(capsys, "plan", whole("odd"), "--adapter", trained("odd", "experts"), "--json")
    told = outcome.json["adapter"]
    assert (
        told["matrices_merged"] == 6 + 2 + 2 * 3 * 2
    )  # o_proj of 6 layers and of 2 in the tower; 2 layers, 3 experts, 2 each
    assert told["ranks"] == [2, 5, 16]
    assert (
        "adapter  20 matrices" in commands.run(capsys, "plan", whole("odd"), "--adapter", trained("odd", "experts")).out
    )


_PEAK = """
import sys
from llama4_convert import convert
options = eval(sys.argv[1])
if options is not None:
    convert(*sys.argv[2:4], **options)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux' count of a process's memory")
def test_memory_is_bounded_by_a_matrix_not_by_a_tensor(tmp_path: Path) -> None:
    """The fused tensor has 134 MB in fp32, and so has what is added to it."""
    experts, width, inner, rank = 32, 512, 1024, 4
    base = tmp_path / "base"
    base.mkdir()
    fused = "model.layers.0.feed_forward.experts"
    small = {"input_layernorm": [width], "post_attention_layernorm": [width], "feed_forward.router": [experts, width]}
    small |= {f"self_attn.{n}_proj": [width, width] for n in "qkvo"}
    small |= {f"feed_forward.shared_expert.{n}_proj": [inner, width] for n in ("gate", "up")}
    small |= {"feed_forward.shared_expert.down_proj": [width, inner]}
    state = {f"model.layers.0.{n}.weight": torch.randn(s).bfloat16() for n, s in small.items()}
    state |= {
        "model.embed_tokens.weight": torch.zeros(64, width).bfloat16(),
        "model.norm.weight": torch.ones(width).bfloat16(),
    }
    state |= {"lm_head.weight": torch.zeros(64, width).bfloat16()}
    state |= {f"{fused}.gate_up_proj": torch.randn(experts, width, 2 * inner).bfloat16()}
    state |= {f"{fused}.down_proj": torch.randn(experts, inner, width).bfloat16()}
    save_file(state, base / "model.safetensors")
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_local_experts": experts, "vocab_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": width // 4}
    (base / "config.json").write_text(json.dumps({"model_type": "llama4_text", **sizes}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 8}))
    factors = {"A": torch.randn(rank * experts, 2 * inner), "B": torch.randn(width, rank * experts)}
    save_file({f"base_model.model.{fused}.lora_{n}.weight": t for n, t in factors.items()}, adapter / WEIGHTS)

    def peak(options: dict[str, Any] | None) -> int:
        arguments = [sys.executable, "-c", _PEAK, repr(options), str(base), str(tmp_path / "out")]
        return int(subprocess.check_output(arguments, cwd=REPOSITORY)) << 10

    bound = plan(base, adapter=str(adapter)).peak_memory_bytes
    assert bound < 420 << 20
    assert peak({"adapter": str(adapter), "max_memory": bound}) - peak(None) < bound
    delta = (
        peft.tensors(tmp_path / "out")[f"{fused}.gate_up_proj"][5].float() - state[f"{fused}.gate_up_proj"][5].float()
    )
    product = factors["B"][:, 5::experts] @ factors["A"][5 * rank : 6 * rank] * 2
    torch.testing.assert_close(delta, product, atol=0.1, rtol=0.05)  # both sides of the difference are rounded to bf16


def test_large_vocabularies_are_multiplied_in_aligned_blocks() -> None:
    ranges = [rows for rows, _ in row_blocks((202048, 5120), [])]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 202048
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert all(start % 64 == 0 and 4 * 5120 * (stop - start) <= 257 << 20 for start, stop in ranges)
    assert (
        min(stop - start for start, stop in ranges) > 8192
    )  # no sliver, which the library would compute in another way
    assert [rows for rows, _ in row_blocks((16384, 5120), [])] == [(0, 16384)]


@pytest.mark.parametrize("name", ["ends", "attention"])
def test_blocks_change_no_bit(
    name: str,
    whole: Callable[..., Path],
    trained: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Blocks of 320 of 2,312 rows. The last has 72: one of 8 the library would compute in another way on some processors.
    monkeypatch.setattr(changes, "_WHOLE_BYTES", 100_000)
    monkeypatch.setattr(changes, "_BLOCK_BYTES", 100_000)
    convert(whole("odd"), tmp_path / "out", adapter=trained("odd", name))
    assert peft.different(peft.tensors(tmp_path / "out"), peft.merged(whole("odd"), trained("odd", name))) == []


def test_an_adapter_of_a_text_model_fits_the_whole_one_and_the_other_way_round(
    whole: Callable[..., Path], trained: Callable[..., Path], meta_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """The language model's names differ by a prefix."""
    src = source(meta_checkpoint, "odd")
    path = copied(trained, tmp_path, "experts")
    state = {k: t for k, t in load_file(path / WEIGHTS).items() if "vision" not in k}
    save_file({k.replace("language_model.", ""): t for k, t in state.items()}, path / WEIGHTS)
    convert(src, tmp_path / "out", adapter=path)
    save_file(state, path / WEIGHTS)
    convert(src, tmp_path / "text", adapter=path, text_only=True)
    expected = peft.merged(whole("odd"), trained("odd", "experts"))
    for folder, prefix in (("out", ""), ("text", "language_model.")):
        found = {prefix + key: t for key, t in peft.tensors(tmp_path / folder).items() if not key.startswith("vision")}
        assert all(torch.equal(t, expected[key]) for key, t in found.items())
    shutil.rmtree(path)
    with pytest.raises(BadInput, match=r"vision_model.*left out"):
        convert(src, tmp_path / "none", adapter=trained("odd", "experts"), text_only=True)
