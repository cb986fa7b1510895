"""`inspect`: what a checkpoint is made of, counted apart from the tables, and as published."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import to_builtins
from safetensors.torch import load_file, save_file

from llama4.weights import parameter_shapes
from llama4_convert import convert, diff, export, fit, inspect, synth, validate
from llama4_convert.checkpoints.families import FAMILIES, active_parameters, family_of
from llama4_convert.errors import BadInput
from llama4_convert.inspection.results import DtypeShare, Inspection, Share
from llama4_convert.reference.checkpoint import Checkpoint
from tests.support import commands

ENDS = {
    "tok_embeddings": "embeddings",
    "output": "output_head",
    "router": "router",
    "attention.q": "attention",
    "attention.k": "attention",
    "attention.v": "attention",
    "attention.o": "attention",
    "norm": "norms",
}


def kind(name: str) -> str:
    """Of a tensor of the reference, by its name there."""
    if name.startswith("vision."):
        return "projector" if name.startswith(("vision.adapter", "vision.projection")) else "vision"
    for end, found in ENDS.items():
        if name.endswith(end):
            return found
    return "routed_experts" if ".experts." in name else "shared_expert" if ".shared." in name else "dense_mlp"


def parameters_of(path: Path) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, shape in parameter_shapes(Checkpoint.open(path).config).items():
        counts[kind(name)] += prod(shape)
    return dict(counts)


def told(found: Inspection, field: str) -> dict[str, int]:
    return {row.kind: getattr(row, field) for row in found.by_kind if getattr(row, field)}


def entries(path: Path) -> dict[str, Any]:
    """Of a rank file that this session has written."""
    found: dict[str, Any] = torch.load(path, weights_only=False)
    return found


# -------------------- numbers


@pytest.mark.parametrize("geometry", ["scout", "maverick", "guard", "odd", "text_only", "top2"])
def test_parameters_by_kind_are_the_references(
    geometry: str, meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path]
) -> None:
    source = meta_checkpoint(geometry, ranks=2).src
    expected = parameters_of(source)
    for path in (source, converted(geometry)):
        found = inspect(path)
        assert told(found, "parameters") == expected
        assert found.parameters == sum(expected.values())
        assert sum(row.tensors for row in found.by_kind) == len(found.tensors)
        assert sum(row.bytes for row in found.by_kind) == found.bytes
        assert [row.kind for row in found.by_kind] == [k for k in FAMILIES if k in told(found, "tensors")]


@pytest.mark.parametrize("geometry", ["maverick", "guard", "top2", "odd"])
def test_a_token_meets_all_but_the_experts_that_are_not_chosen_and_vision(
    geometry: str, meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path]
) -> None:
    checkpoint = Checkpoint.open(meta_checkpoint(geometry, ranks=2).src)
    chosen = range(checkpoint.config.text_config.num_experts_per_tok)
    met = sum(
        prod(shape)
        for name, shape in parameter_shapes(checkpoint.config).items()
        if not name.startswith("vision.") and (".experts." not in name or int(name.split(".")[4]) in chosen)
    )
    for path in (checkpoint.path, converted(geometry)):
        assert inspect(path).active_parameters == met


@pytest.mark.parametrize(
    ("geometry", "total", "active"),
    [("scout", 108_641_793_536, 17e9), ("maverick", 401_583_781_376, 17e9), ("guard", 12_001_097_216, 11e9)],
)
def test_the_published_models(geometry: str, total: int, active: float, tmp_path: Path) -> None:
    """Meta says 17 B active of 109 B and of 400 B; of Guard's 12 B the vision tower is 0.9 B."""
    synth(tmp_path, geometry=geometry, sparse=True)
    found = inspect(tmp_path)
    assert found.parameters == total
    assert found.active_parameters == pytest.approx(active, rel=0.02)


def test_experts_that_nobody_has_counted() -> None:
    assert active_parameters({"routed_experts": 8, "attention": 3, "vision": 5}, 4, 1) == 5
    assert active_parameters({"attention": 3}, None, None) == 3
    for experts, top_k in ((None, 1), (4, None), (0, 1), (2, 3), ("4", 1)):
        assert active_parameters({"routed_experts": 8}, experts, top_k) is None


# -------------------- bytes


def test_bytes_by_kind_and_dtype_are_those_of_the_files(converted: Callable[[str], Path]) -> None:
    expected: Counter[str] = Counter()
    dtypes: defaultdict[str, list[int]] = defaultdict(list)
    pieces = {
        "embed_tokens": "embeddings", "self_attn": "attention", "router": "router", "experts": "routed_experts",
        "shared_expert": "shared_expert", "lm_head": "output_head", "norm": "norms", "vision_adapter": "projector",
        "multi_modal_projector": "projector",
    }  # fmt: skip
    for path in converted("maverick").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            named = [kind for piece, kind in pieces.items() if piece in name.replace("layernorm", "norm")]
            is_tower = name.startswith("vision_model") and "vision_adapter" not in name
            found = "vision" if is_tower else next(iter(named), "dense_mlp")
            expected[found] += tensor.nbytes
            dtypes[str(tensor.dtype)].append(tensor.nbytes)
    found = inspect(converted("maverick"))
    assert told(found, "bytes") == dict(expected)
    (sizes,) = dtypes.values()
    assert found.dtypes == {"BF16": DtypeShare(tensors=len(sizes), bytes=sum(sizes))}


def test_metas_files_count_every_rank_and_what_is_dropped(meta_checkpoint: Callable[..., Any]) -> None:
    source = meta_checkpoint("scout", ranks=2, dtype=torch.float32).src
    sizes: Counter[str] = Counter()
    for path in sorted(source.glob("*.pth")):
        for key, value in entries(path).items():
            if isinstance(value, torch.Tensor):
                is_dropped = key.endswith(("freqs", "gate_stats_3E", "expert_activation_DE", "_extra_state"))
                sizes["router" if "router_DE" in key else "dropped" if is_dropped else "other"] += value.nbytes
    found = told(inspect(source), "bytes")
    assert (found["router"], found["dropped"]) == (sizes["router"], sizes["dropped"])
    assert sum(found.values()) == sum(sizes.values())
    assert sum(one.bytes for one in inspect(source).dtypes.values()) == sum(sizes.values())


def test_what_no_llama_4_has_is_other(converted: Callable[[str], Path], tmp_path: Path) -> None:
    path = commands.copy(converted("text_only"), tmp_path / "out")
    save_file({"model.layers.0.mystery.weight": torch.zeros(3, 5)}, path / "model-x.safetensors")
    index = json.loads((path / commands.INDEX).read_text())
    index["weight_map"]["model.layers.0.mystery.weight"] = "model-x.safetensors"
    (path / commands.INDEX).write_text(json.dumps(index))
    (row,) = [row for row in inspect(path).by_kind if row.kind == "other"]
    assert row == Share(kind="other", tensors=1, parameters=15, bytes=60)


# -------------------- spelling


@pytest.mark.parametrize(
    ("written", "said"), [("published", "published"), ("module", "module names"), ("mixed", "mixed")]
)
def test_the_spelling_of_metas_keys(written: str, said: str, meta_checkpoint: Callable[..., Any]) -> None:
    source = meta_checkpoint("maverick", ranks=2, spelling=written).src
    found = inspect(source).spelling
    assert found.spelling == said
    assert {one.kind for one in found.kinds} == {
        "attention",
        "routed_experts",
        "shared_expert",
        "dense_mlp",
        "norms",
    }
    if written != "mixed":
        assert {one.spelling for one in found.kinds} == {said}
    keys = {re.sub(r"^layers\.\d+", "layers.*", key) for key in entries(source / "consolidated.00.pth")}
    assert {key for one in found.kinds for key in one.keys} <= keys
    experts = next(one for one in found.kinds if one.kind == "routed_experts").keys
    if written == "published":
        assert experts == [
            f"layers.*.feed_forward.experts.moe_w_{name}" for name in ("in_eD_F", "out_eF_D", "swiglu_eD_F")
        ]
    if written == "module":
        assert experts == [f"layers.*.feed_forward.experts.w{n}" for n in (1, 2, 3)]


# -------------------- quantization and the manifest


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("meta")
    synth(path, geometry="maverick", tiny=True, ranks=2)
    return path


_GROUPS = {
    "int4": [{"scheme": "int4", "group_size": 128, "kinds": {"routed_experts": 24, "shared_expert": 6, "dense_mlp": 6}}],
    "mixed": [
        {"scheme": "fp8", "granularity": "channel", "kinds": {"shared_expert": 6, "dense_mlp": 6}},
        {"scheme": "int4", "group_size": 128, "kinds": {"routed_experts": 24}},
    ],
    "nf4": [
        {
            "scheme": "nf4", "block_size": 64, "double_quant": True,
            "kinds": {"routed_experts": 24, "shared_expert": 6, "dense_mlp": 6},
        }
    ],
}  # fmt: skip
_METHODS = {"int4": "pack-quantized", "mixed": "mixed-precision", "nf4": "nf4"}


@pytest.mark.parametrize("recipe", _GROUPS)
def test_what_is_quantized_and_how(recipe: str, meta: Path, tmp_path: Path) -> None:
    """Two MoE layers of four experts, two dense ones; three matrices each."""
    result = convert(meta, tmp_path / "out", recipe=recipe)
    found = inspect(tmp_path / "out")
    said = found.quantization
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said.method == config["quant_method"]
    assert said.format == _METHODS[recipe]
    assert said.ignored == config["ignore" if "ignore" in config else "llm_int8_skip_modules"]
    measured = ("matrices", "parameters", "bytes", "bits_per_weight")
    groups = [{k: v for k, v in to_builtins(group).items() if k not in measured} for group in said.groups]
    assert sorted(groups, key=str) == sorted(_GROUPS[recipe], key=str)
    for group in said.groups:
        assert group.matrices == sum(group.kinds.values())
        assert group.bits_per_weight == 8 * group.bytes / group.parameters
    bits = 8 * sum(g.bytes for g in said.groups) / sum(g.parameters for g in said.groups)
    assert bits == pytest.approx(result.quantization.bits_per_quantized_weight)
    # Quantization changes no count of numbers, and its scales are none of them.
    plain = told(inspect(meta), "parameters")
    assert told(found, "parameters") == plain
    stored = sum(
        tensor.nbytes for path in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(path).values()
    )
    assert found.bytes == stored == sum(told(found, "bytes").values())
    assert told(found, "bytes")["quantization_scales"] < 0.3 * sum(g.bytes for g in said.groups)


def test_the_manifest_is_told_of(meta: Path, tmp_path: Path) -> None:
    assert inspect(meta).manifest is None
    result = convert(meta, tmp_path / "out", recipe="int4", variant="instruct")
    found = inspect(tmp_path / "out").manifest
    assert found.tool.startswith("llama4-convert ")
    assert (found.source["layout"], found.source["ranks"]) == ("meta", 2)
    assert found.options["variant"] == "instruct"
    assert found.recipe["name"] == "int4"
    assert (found.files, found.complete) == (len(result.files), True)
    errors = to_builtins(found.errors)
    quantization = to_builtins(result.quantization)
    assert errors == {k: quantization[k] for k in errors}
    assert {"relative_mse", "families", "worst"} <= errors.keys()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("language_model.model.layers.3.feed_forward.experts.7.up_proj.weight_packed", "routed_experts"),
        ("language_model.model.layers.3.feed_forward.experts.7.up_proj.weight_shape", "quantization_scales"),
        ("model.layers.3.feed_forward.gate_proj.weight.quant_state.bitsandbytes__nf4", "quantization_scales"),
        ("model.layers.3.feed_forward.gate_proj.weight", "dense_mlp"),
        ("model.layers.3.feed_forward.shared_expert.gate_proj.input_scale", "quantization_scales"),
        ("vision_model.positional_embedding_vlm", "vision"),
        ("vision_model.model.layers.0.self_attn.q_proj.weight", "vision"),
        ("model.norm.weight", "norms"),
        ("decoder.model.norm.weight", "other"),
    ],
)
def test_kinds_by_key(key: str, expected: str) -> None:
    assert family_of(key) == expected


@pytest.mark.parametrize("claim", ["null", "[]", "3", '"int4"', "true"])
def test_a_quantization_config_that_is_no_object(claim: str, converted: Callable[[str], Path], tmp_path: Path) -> None:
    """null is Transformers' word for a model that is not quantized."""
    path = commands.copy(converted("scout"), tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": json.loads(claim)}))
    readers: list[Callable[[], Any]] = [
        lambda: inspect(path),
        lambda: diff(path, converted("scout")),
        lambda: validate(path, reference=converted("scout"), tokens=8),
    ]
    for read in readers:
        if claim == "null":
            read()
        else:
            with pytest.raises(BadInput, match="quantization_config is no object"):
                read()


def test_a_quantization_config_of_null_is_none_to_what_writes(converted: Callable[[str], Path], tmp_path: Path) -> None:
    path = commands.copy(converted("scout"), tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    (path / "llama4-convert.json").unlink()  # its digest of config.json
    convert(path, tmp_path / "fp8", recipe="fp8")
    made = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert made["quantization_config"]["quant_method"] == "compressed-tensors"
    export(path, tmp_path / "meta")
    assert diff(tmp_path / "meta", converted("scout")).equal
    assert [verdict.format for verdict in fit(path).verdicts] == [None]


def test_scales_of_no_groups_are_bad_input(converted: Callable[[str], Path], tmp_path: Path) -> None:
    path = commands.copy(converted("text_only"), tmp_path / "out")
    module = "model.layers.0.feed_forward.experts.0.up_proj"
    parts = {
        f"{module}.weight_packed": torch.zeros(2, 4, dtype=torch.int32),
        f"{module}.weight_scale": torch.zeros(2, 0),
    }
    save_file(parts, path / "model-x.safetensors")
    index = json.loads((path / commands.INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(parts, "model-x.safetensors")
    (path / commands.INDEX).write_text(json.dumps(index))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(BadInput, match="do not fit together"):
        inspect(path)


# -------------------- the screen


def test_the_summary_is_a_table(meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(meta, tmp_path / "out", recipe="mixed")
    found = inspect(tmp_path / "out")
    lines = commands.run(capsys, "inspect", tmp_path / "out").out.splitlines()
    assert "5.1 M parameters, 3.7 M of them active for a token of text" in lines[1]
    rows = [line for line in lines if " %  " in line]
    assert len(rows) == len(found.by_kind)
    assert len({row.index(" %") for row in rows}) == 1  # columns stand below each other
    attention = next(row for row in rows if row.split()[0] == "attention")
    assert attention.split()[1] == "16"
    assert max(rows, key=lambda row: row.count("█")) == attention
    text = "\n".join(lines)
    assert "int4 in groups of 128: 24 routed experts; 4.13 bits a weight" in text
    assert "FP8 e4m3, a scale a channel: 6 shared expert, 6 dense MLP" in text or "6 dense MLP, 6 shared expert" in text
    assert "from Meta's layout of 2 ranks" in text
    assert f"largest {found.manifest.errors.worst[0].relative_mse:.4g}" in text
    assert "spelling   published" in commands.run(capsys, "inspect", meta).out
