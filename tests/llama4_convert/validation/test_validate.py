"""`validate` passes what is right, and of what is wrong names the tensor, the field, or the layer that strays."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama4.weights_transformers import transformers_key
from llama4_convert import convert, validate
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.validation.results import Validation
from quant.typed import decode
from tests.support import commands, meta_model

WEIGHTS = "model-00001-of-00001.safetensors"
METRICS = ("top1_agreement", "kl_mean", "kl_p999", "nmse", "max_abs_diff", "perplexity_reference")


@pytest.fixture(scope="session")
def source(meta_checkpoint: Callable[..., Any]) -> Callable[..., Path]:
    return lambda geometry="scout": meta_checkpoint(geometry, ranks=2).src


@pytest.fixture(scope="session")
def converted(source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Read only, as the checkpoint that it was made from."""
    made: dict[Any, Path] = {}

    def get(geometry: str = "scout", **options: Any) -> Path:
        key = (geometry, *options.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{geometry}-hf-") / "out"
            convert(source(geometry), made[key], **options)
        return made[key]

    return get


@pytest.fixture
def copy(converted: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A converted directory to be damaged."""
    return lambda geometry="scout": commands.copy(converted(geometry), tmp_path / f"{geometry}-copy")


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / WEIGHTS, {"format": "pt"})
    index = path / commands.INDEX
    body = json.loads(index.read_text())
    index.write_text(json.dumps({**body, "weight_map": dict.fromkeys(tensors, WEIGHTS)}))


def change_config(path: Path, file: str = "config.json", **changes: Any) -> None:
    """`rope_scaling__factor=1` sets a nested field; fields of the text are found in text_config. ... deletes one."""
    body = json.loads((path / file).read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = body
        if outer[:1] != ["vision_config"] and (outer or [last])[0] not in body and "text_config" in body:
            place = body["text_config"]
        for key in outer:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    (path / file).write_text(json.dumps(body))


def fields(result: Validation) -> set[str]:
    return {difference.field for difference in result.config_differences}


# -------------------- what is right


@pytest.mark.parametrize("geometry", sorted(meta_model.GEOMETRIES))
def test_a_conversion_passes(geometry: str, source: Callable[..., Path], converted: Callable[..., Path]) -> None:
    result = validate(converted(geometry), reference=source(geometry), tokens=40)
    assert result.passed, result
    assert result.config_differences == result.tensors_different == result.tensors_unexpected == []
    assert result.gates_failed == []
    assert result.candidate_failure is None
    assert result.first_divergence is None
    assert result.nmse < 1e-12
    assert [layer.layer for layer in result.layers] == list(range(len(result.layers)))


def test_the_result_has_every_field_of_the_contract(
    source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    result = validate(converted(), reference=source(), tokens=40)
    printed = json.loads(json.dumps(msgspec.to_builtins(result), allow_nan=False))
    assert decode(printed, Validation, "the JSON") == result
    assert result.passed is True
    assert result.runner == "llama4"
    assert result.dtype == "float32"
    assert result.tokens == 40 + 8 + 4 + 8  # the random ones, and a tile of 4 patches between words
    assert result.top1_agreement == 1
    assert all(isinstance(getattr(result, name), float) for name in (*METRICS, "perplexity_candidate"))
    assert set(result.gates) == {"top1_agreement", "kl_mean", "kl_p999", "nmse"}
    assert result.tensors_compared == 155
    assert [set(layer) for layer in printed["layers"]] == [
        {"layer", "nmse_local", "nmse_propagated", "router_agreement"}
    ] * 5


@pytest.mark.parametrize("geometry", ["scout", "temperature"])
def test_transformers_computes_the_same(
    geometry: str, source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    result = validate(converted(geometry), reference=source(geometry), tokens=40, runner="transformers")
    assert result.passed, result
    assert result.runner == "transformers"
    assert result.nmse < 1e-10
    assert len(result.layers) == len(validate(converted(geometry), reference=source(geometry), tokens=2).layers)
    assert all(layer.nmse_local < 1e-10 > layer.nmse_propagated for layer in result.layers)
    assert result.first_divergence is None


@pytest.mark.parametrize("is_reference", [False, True])
def test_a_text_model_beside_a_directory_that_sees(is_reference: bool, converted: Callable[..., Path]) -> None:
    """Their keys differ by a prefix, and the tower of the other is no tensor too many."""
    sides = [converted(text_only=True), converted()]
    path, reference = reversed(sides) if is_reference else sides
    said: list[str] = []
    result = validate(path, reference=reference, tokens=10, warn=said.append)
    assert result.passed, result
    assert (result.kl_mean, result.tensors_unexpected, result.config_differences) == (0, [], [])
    assert len(said) == 1
    assert f"the vision tower of {converted()} is left out" in said[0]


def test_a_text_only_conversion_passes_and_says_what_it_leaves_out(
    source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    said: list[str] = []
    for runner in ("llama4", "transformers"):
        result = validate(converted(text_only=True), reference=source(), tokens=10, runner=runner, warn=said.append)
        assert result.passed, result
        assert result.tokens == 10
    assert len(said) == 2
    assert "vision tower" in said[0]
    assert "left out of the comparison" in said[0]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_conversion_to_another_dtype_passes(
    dtype: str, source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    result = validate(converted(dtype=dtype), reference=source(), tokens=10)
    assert result.passed, result


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_sides_compute_in_the_dtype_that_is_asked_for(
    dtype: str, source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    result = validate(converted("text_only"), reference=source("text_only"), tokens=10, dtype=dtype)
    exact = validate(converted("text_only"), reference=source("text_only"), tokens=10)
    assert result.passed, result
    assert result.dtype == dtype
    assert result.perplexity_reference != exact.perplexity_reference


def test_either_layout_can_be_either_side(
    meta_checkpoint: Callable[..., Any], source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    others = (meta_checkpoint("scout", 8, "mixed").src, meta_checkpoint("scout", 1, "module").src)
    assert all(validate(other, reference=source(), tokens=5).passed for other in others)
    assert validate(converted(), reference=converted(), tokens=5).passed


def test_random_tokens_come_from_the_seed(source: Callable[..., Path], converted: Callable[..., Path]) -> None:
    one, again, other = (
        validate(converted("text_only"), reference=source("text_only"), tokens=5, seed=seed) for seed in (3, 3, 4)
    )
    assert one == again
    assert one.perplexity_reference != other.perplexity_reference


def test_progress_is_told_a_total_and_comes_near_it(
    source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    totals: list[int] = []
    steps: list[int] = []
    validate(
        converted(),
        reference=source(),
        tokens=2,
        start=lambda total, done: totals.append(total),
        progress=steps.append,
    )
    assert len(totals) == 1
    assert min(steps) >= 0
    assert 0.99 * totals[0] <= sum(steps) <= totals[0]


def test_nothing_is_written_on_either_side(source: Callable[..., Path], converted: Callable[..., Path]) -> None:
    before = [commands.times(path) for path in (source(), converted())]
    validate(converted(), reference=source(), tokens=2)
    assert [commands.times(path) for path in (source(), converted())] == before


# -------------------- weights that are wrong


Damage = Callable[[Tensor], Tensor]


def flip_bit(bit: int) -> Damage:
    def flipped(tensor: Tensor) -> Tensor:
        bits = tensor.clone().contiguous().view(torch.int16)
        at = bits.numel() * 5 // 7
        bits.view(-1)[at] ^= 1 << bit
        return bits.view(torch.bfloat16)

    return flipped


def halves_exchanged(dim: int) -> Damage:
    return lambda tensor: torch.cat(tensor.chunk(2, dim)[::-1], dim)


def first_half_repeated(dim: int) -> Damage:
    """As if one rank of two had been read twice."""
    return lambda tensor: torch.cat([tensor.chunk(2, dim)[0]] * 2, dim)


def permuted_for_half_rotation(tensor: Tensor) -> Tensor:
    """What converters of earlier Llamas do to q and k."""
    return tensor.view(-1, 4, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def first_two_exchanged(tensor: Tensor) -> Tensor:
    return tensor[[1, 0, *range(2, len(tensor))]]


def transposed(tensor: Tensor) -> Tensor:
    assert tensor.shape[-1] == tensor.shape[-2]
    return tensor.transpose(-1, -2)


def one_nan(tensor: Tensor) -> Tensor:
    return tensor.clone().index_fill(0, torch.tensor(0), math.nan)


TEXT, VISION = "language_model.model.", "vision_model."
LAYER, TOWER = f"{TEXT}layers.1.", f"{VISION}model.layers.1."

# Of the geometry named first: one flipped bit in a tensor of every kind, then whole mistakes as converters make them.
EVERY_KIND = [
    ("scout", "language_model.lm_head.weight"),
    ("scout", f"{TEXT}embed_tokens.weight"),
    ("scout", f"{TEXT}norm.weight"),
    *(
        ("scout", LAYER + name)
        for name in (
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
            "self_attn.o_proj.weight",
            "feed_forward.router.weight",
            "feed_forward.experts.gate_up_proj",
            "feed_forward.experts.down_proj",
            "feed_forward.shared_expert.gate_proj.weight",
            "feed_forward.shared_expert.up_proj.weight",
            "feed_forward.shared_expert.down_proj.weight",
        )
    ),
    *(("maverick", f"{TEXT}layers.0.feed_forward.{name}_proj.weight") for name in ("gate", "up", "down")),
    ("text_only", "model.layers.0.self_attn.o_proj.weight"),
    ("scout", "multi_modal_projector.linear_1.weight"),
    *(
        ("scout", VISION + name)
        for name in (
            "class_embedding",
            "positional_embedding_vlm",
            "patch_embedding.linear.weight",
            "layernorm_pre.weight",
            "layernorm_pre.bias",
            "layernorm_post.weight",
            "layernorm_post.bias",
            "vision_adapter.mlp.fc1.weight",
            "vision_adapter.mlp.fc2.weight",
        )
    ),
    *(
        ("scout", f"{TOWER}{name}.{kind}")
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            "mlp.fc1",
            "mlp.fc2",
        )
        for kind in ("weight", "bias")
    ),
]
MISTAKES = [
    ("scout", f"{LAYER}self_attn.q_proj.weight", transposed),
    ("scout", f"{LAYER}self_attn.o_proj.weight", transposed),
    ("scout", f"{TOWER}self_attn.v_proj.weight", transposed),
    ("scout", f"{VISION}vision_adapter.mlp.fc2.weight", transposed),
    ("scout", f"{LAYER}feed_forward.experts.gate_up_proj", halves_exchanged(2)),
    ("scout", f"{LAYER}self_attn.q_proj.weight", permuted_for_half_rotation),
    ("scout", f"{LAYER}self_attn.k_proj.weight", permuted_for_half_rotation),
    ("scout", f"{TOWER}self_attn.q_proj.weight", permuted_for_half_rotation),
    ("scout", f"{LAYER}feed_forward.experts.gate_up_proj", first_two_exchanged),
    ("scout", f"{LAYER}feed_forward.experts.down_proj", first_two_exchanged),
    ("scout", f"{LAYER}feed_forward.router.weight", first_two_exchanged),
    ("scout", f"{LAYER}self_attn.o_proj.weight", first_half_repeated(1)),
    ("scout", f"{LAYER}feed_forward.shared_expert.down_proj.weight", first_half_repeated(1)),
    ("scout", f"{LAYER}feed_forward.experts.down_proj", first_half_repeated(1)),
    ("scout", f"{LAYER}self_attn.v_proj.weight", halves_exchanged(0)),
    ("maverick", f"{TEXT}layers.0.feed_forward.gate_proj.weight", first_half_repeated(0)),
    ("scout", f"{TEXT}embed_tokens.weight", first_half_repeated(0)),
    ("scout", "language_model.lm_head.weight", halves_exchanged(0)),
    ("scout", f"{TOWER}mlp.fc2.weight", first_half_repeated(1)),
    ("scout", f"{VISION}patch_embedding.linear.weight", halves_exchanged(1)),
    ("scout", f"{LAYER}self_attn.k_proj.weight", torch.zeros_like),
    ("scout", f"{TOWER}self_attn.q_proj.bias", torch.zeros_like),
    ("scout", f"{LAYER}input_layernorm.weight", torch.ones_like),
    ("scout", f"{TEXT}norm.weight", one_nan),
    ("scout", f"{LAYER}feed_forward.experts.down_proj", one_nan),
    ("scout", f"{VISION}class_embedding", one_nan),
    ("scout", f"{LAYER}post_attention_layernorm.weight", lambda tensor: tensor - 1),
    ("scout", f"{VISION}layernorm_pre.weight", lambda tensor: tensor * 2),
]
PLANTED = [
    *((geometry, key, flip_bit((0, 15, 7)[i % 3])) for i, (geometry, key) in enumerate(EVERY_KIND)),
    *MISTAKES,
]


@pytest.mark.parametrize(
    ("geometry", "key", "damage"), PLANTED, ids=[f"{i}-{k}" for i, (_, k, _) in enumerate(PLANTED)]
)
def test_a_planted_fault_is_found_and_only_it(
    geometry: str, key: str, damage: Damage, source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy(geometry)
    change_tensors(path, lambda tensors: tensors.update({key: damage(tensors[key]).to(torch.bfloat16)}))
    result = validate(path, reference=source(geometry), tokens=2)
    assert not result.passed
    assert {fault.tensor for fault in result.tensors_different} == {key}
    assert result.config_differences == []
    assert result.candidate_failure is None
    first = result.first_divergence
    assert first == result.tensors_different[0]
    assert first.tensor == key
    assert first.layer == (int(key.split("layers.")[1].split(".")[0]) if "layers." in key else None)
    assert "elements differ" in first.cause
    json.dumps(msgspec.to_builtins(result), allow_nan=False)


def exchange(a: str, b: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


@pytest.mark.parametrize(
    ("geometry", "one", "other"),
    [
        ("scout", f"{LAYER}self_attn.k_proj.weight", f"{LAYER}self_attn.v_proj.weight"),
        ("scout", f"{LAYER}self_attn.q_proj.weight", f"{TEXT}layers.2.self_attn.q_proj.weight"),
        ("scout", f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight"),
        (
            "scout",
            f"{LAYER}feed_forward.shared_expert.gate_proj.weight",
            f"{LAYER}feed_forward.shared_expert.up_proj.weight",
        ),
        ("maverick", f"{TEXT}layers.0.feed_forward.gate_proj.weight", f"{TEXT}layers.0.feed_forward.up_proj.weight"),
        ("scout", f"{TEXT}embed_tokens.weight", "language_model.lm_head.weight"),
        ("scout", f"{VISION}model.layers.0.self_attn.k_proj.bias", f"{TOWER}self_attn.k_proj.bias"),
        ("scout", f"{VISION}layernorm_pre.weight", f"{VISION}layernorm_post.weight"),
    ],
)
def test_two_tensors_exchanged_are_both_named(
    geometry: str, one: str, other: str, source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy(geometry)
    change_tensors(path, exchange(one, other))
    result = validate(path, reference=source(geometry), tokens=2)
    assert not result.passed
    assert {fault.tensor for fault in result.tensors_different} == {one, other}


def test_an_expert_is_named_where_many_share_a_tensor(source: Callable[..., Path], copy: Callable[..., Path]) -> None:
    path = copy()
    key = f"{TEXT}layers.2.feed_forward.experts.gate_up_proj"
    change_tensors(path, lambda tensors: tensors[key][3, :, -1].zero_())
    [fault] = validate(path, reference=source(), tokens=2).tensors_different
    assert (fault.layer, fault.module, fault.tensor) == (2, "feed_forward.experts.3.up", key)
    assert fault.kind == "zeros"
    assert "; 128 of 13,312 elements differ, by up to " in fault.cause


def test_the_sign_of_a_zero_is_a_bit_like_any_other(converted: Callable[..., Path], tmp_path: Path) -> None:
    one, other = (commands.copy(converted("text_only"), tmp_path / name) for name in ("one", "other"))
    change_tensors(one, lambda tensors: tensors["model.norm.weight"].fill_(0.0))
    change_tensors(other, lambda tensors: tensors["model.norm.weight"].fill_(-0.0))
    [fault] = validate(other, reference=one, tokens=2).tensors_different
    assert fault.tensor == "model.norm.weight"


def test_a_wrong_rounding_to_another_dtype_is_found(
    source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    """float32's lower half: what a cast of bfloat16 must leave zero."""
    path = commands.copy(converted(dtype="float32"), converted(dtype="float32").parent / "rounded")
    change_tensors(path, lambda t: t.update({f"{TEXT}norm.weight": t[f"{TEXT}norm.weight"] * (1 + 2**-20)}))
    result = validate(path, reference=source(), tokens=2)
    assert [fault.tensor for fault in result.tensors_different] == [f"{TEXT}norm.weight"]


@pytest.mark.parametrize("key", [f"{LAYER}self_attn.v_proj.weight", f"{TOWER}mlp.fc1.bias"])
def test_a_missing_tensor_is_named_and_nothing_runs(
    key: str, source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy()
    change_tensors(path, lambda tensors: tensors.pop(key))
    for runner in ("llama4", "transformers"):
        result = validate(path, reference=source(), tokens=2, runner=runner)
        assert not result.passed
        assert [fault.tensor for fault in result.tensors_different] == [key]
        assert result.tensors_compared < 155
        assert key in result.candidate_failure
        assert all(getattr(result, name) is None for name in METRICS)


@pytest.mark.parametrize(
    ("key", "cut"),
    [
        (f"{LAYER}self_attn.v_proj.weight", lambda t: t[:-1]),
        (f"{LAYER}feed_forward.experts.gate_up_proj", lambda t: t[..., :-2]),
        (f"{TEXT}embed_tokens.weight", lambda t: t[:-1]),
        (f"{VISION}positional_embedding_vlm", lambda t: t[1:]),
    ],
)
def test_a_tensor_of_another_shape_is_named(
    key: str, cut: Damage, source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy()
    change_tensors(path, lambda tensors: tensors.update({key: cut(tensors[key])}))
    result = validate(path, reference=source(), tokens=2)
    assert not result.passed
    assert {fault.tensor for fault in result.tensors_different} == {key}


def test_a_tensor_that_no_llama_4_has_is_listed(source: Callable[..., Path], copy: Callable[..., Path]) -> None:
    path = copy()
    change_tensors(path, lambda tensors: tensors.update({f"{LAYER}self_attn.q_proj.bias": torch.zeros(2)}))
    result = validate(path, reference=source(), tokens=2)
    assert result.tensors_unexpected == [f"{LAYER}self_attn.q_proj.bias"]


def test_the_keys_in_these_tests_are_of_every_kind(converted: Callable[..., Path]) -> None:
    """So that no kind of tensor is left without a planted fault."""
    from llama4.weights import parameter_shapes
    from llama4_convert.reference.checkpoint import Checkpoint

    def kind(key: str) -> str:
        return ".".join("*" if part.isdigit() else part for part in key.split("."))

    for geometry in ("scout", "maverick"):
        config = Checkpoint.open(converted(geometry)).config
        kinds = {kind(transformers_key(name, True)) for name in parameter_shapes(config)}
        assert kinds <= {kind(key) for _, key in EVERY_KIND}


# -------------------- a configuration that is wrong


RUNS = [
    # geometry, changes, fields named, (layer, module) that strays
    ("scout", {"rms_norm_eps": 0.5}, {"rms_norm_eps"}, (0, "attention_norm")),
    ("scout", {"rope_theta": 100.0}, {"rope_theta"}, (0, "attention")),
    ("custom_rope", {"rope_scaling__high_freq_factor": 1000.0}, {"rope_scaling.high_freq_factor"}, (0, "attention")),
    ("custom_rope", {"rope_scaling__original_max_position_embeddings": 64},
     {"rope_scaling.original_max_position_embeddings"}, (0, "attention")),
    ("scout", {"use_qk_norm": False}, {"use_qk_norm"}, (0, "attention")),
    ("scout", {"num_experts_per_tok": 2}, {"num_experts_per_tok"}, (0, "feed_forward")),
    ("top2", {"num_experts_per_tok": 1}, {"num_experts_per_tok"}, (0, "feed_forward")),
    ("scout", {"attention_chunk_size": 4}, {"attention_chunk_size"}, (0, "attention")),
    ("scout", {"no_rope_layers": [1] * 5}, {"no_rope_layers"}, (3, "attention")),
    ("scout", {"no_rope_layers": [1, 1, 1, 0, 0]}, {"no_rope_layers"}, (4, "attention")),
    ("scout", {"layer_types": ["chunked_attention"] * 5}, {"layer_types"}, (3, "attention")),
    ("nope_without_chunks", {"attention_chunk_size": 8, "layer_types": None},
     {"attention_chunk_size", "layer_types"}, (0, "attention")),
    ("scout", {"attn_temperature_tuning": True, "floor_scale": 4, "attn_scale": 0.5},
     {"attn_temperature_tuning", "floor_scale", "attn_scale"}, (3, "attention")),
    ("temperature", {"attn_temperature_tuning": False}, {"attn_temperature_tuning"}, (1, "attention")),
    ("temperature", {"floor_scale": 8}, {"floor_scale"}, (1, "attention")),
    ("temperature", {"attn_scale": 0.1}, {"attn_scale"}, (1, "attention")),
    ("scout", {"vision_config__rope_theta": 10.0}, {"vision_config.rope_theta"}, (None, "vision.layers.0")),
    ("scout", {"vision_config__num_attention_heads": 4}, {"vision_config.num_attention_heads"}, (None, "vision.layers.0")),
]  # fmt: skip


@pytest.mark.parametrize(("geometry", "changes", "named", "strays"), RUNS, ids=str)
def test_a_wrong_field_is_named_and_logits_tell_where_it_matters(
    geometry: str,
    changes: dict[str, Any],
    named: set[str],
    strays: tuple[int | None, str],
    source: Callable[..., Path],
    copy: Callable[..., Path],
) -> None:
    path = copy(geometry)
    change_config(path, **changes)
    result = validate(path, reference=source(geometry), tokens=40)
    assert not result.passed
    assert fields(result) == named
    assert result.tensors_different == []
    assert result.candidate_failure is None
    first = result.first_divergence
    assert (first.layer, first.module, first.tensor) == (*strays, None)
    assert all(field in first.cause for field in named)
    # The logits tell it alone.
    assert {"kl_mean", "nmse"} <= set(result.gates_failed)
    assert result.kl_mean > 1e-5
    if strays[0] is not None:
        clean = result.layers[: strays[0]]
        assert all(layer.nmse_local < 1e-9 > layer.nmse_propagated for layer in clean)
        assert result.layers[strays[0]].nmse_local > 1e-9


SILENT = [
    ("scout", {"rope_scaling": None}, "rope_scaling"),
    ("custom_rope", {"rope_scaling__factor": 100.0}, "rope_scaling.factor"),
    ("scout", {"rope_scaling__factor": 8.0}, "rope_scaling.factor"),
    (
        "scout",
        {"rope_scaling__original_max_position_embeddings": 4096},
        "rope_scaling.original_max_position_embeddings",
    ),
    ("scout", {"floor_scale": 4096}, "floor_scale"),
    ("scout", {"attn_scale": 0.2}, "attn_scale"),
    ("scout", {"no_rope_layer_interval": 3}, "no_rope_layer_interval"),
    ("scout", {"interleave_moe_layer_step": 2}, "interleave_moe_layer_step"),
    ("scout", {"hidden_act": "relu"}, "hidden_act"),
    ("scout", {"attention_bias": True}, "attention_bias"),
    ("scout", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("scout", {"boi_token_index": 3}, "boi_token_index"),
    ("scout", {"eoi_token_index": 3}, "eoi_token_index"),
    ("scout", {"vision_config__norm_eps": 1e-6}, "vision_config.norm_eps"),
    ("scout", {"bos_token_id": 5}, "bos_token_id"),
    ("scout", {"bos_token_id": ...}, "bos_token_id"),
    ("scout", {"pad_token_id": None}, "pad_token_id"),
]


@pytest.mark.parametrize(("geometry", "changes", "named"), SILENT, ids=str)
def test_a_wrong_field_that_40_tokens_do_not_show_is_named_all_the_same(
    geometry: str, changes: dict[str, Any], named: str, source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy(geometry)
    change_config(path, **changes)
    result = validate(path, reference=source(geometry), tokens=40)
    assert not result.passed
    assert fields(result) == {named}


@pytest.mark.parametrize("stops", [5, [], None, [265, 5], ...], ids=str)
def test_a_generation_that_would_not_end_is_a_wrong_field(
    stops: Any, source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy()
    change_config(path, "generation_config.json", eos_token_id=stops)
    result = validate(path, reference=source(), tokens=2)
    assert not result.passed
    assert fields(result) == {"eos_token_id"}


def test_what_has_a_chat_template_must_stop_at_the_end_of_a_turn(
    source: Callable[..., Path], converted: Callable[..., Path], tmp_path: Path
) -> None:
    path = commands.copy(converted(variant="instruct"), tmp_path / "copy")
    change_config(path, "generation_config.json", eos_token_id=[265])
    assert fields(validate(path, reference=source(), tokens=2)) == {"eos_token_id"}


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("generation_config.json", {"bos_token_id": 1}, "bos_token_id"),
        ("generation_config.json", {"pad_token_id": 1}, "pad_token_id"),
        ("preprocessor_config.json", {"image_mean": [0.48, 0.46, 0.41]}, "image_mean"),
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor"),
        ("preprocessor_config.json", {"size": {"height": 336, "width": 336}}, "size"),
        ("processor_config.json", {"patch_size": 28}, "patch_size"),
    ],
    ids=str,
)
def test_a_wrong_field_of_another_file_is_named(
    file: str, changes: dict[str, Any], named: str, source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy()
    change_config(path, file, **changes)
    result = validate(path, reference=source(), tokens=2)
    assert not result.passed
    assert fields(result) == {f"{file}: {named}"}
    assert not result.config_differences[0].matters


def test_a_vocabulary_of_other_ids_is_a_wrong_file(source: Callable[..., Path], copy: Callable[..., Path]) -> None:
    path = copy()
    body = json.loads((path / "tokenizer.json").read_text())
    vocabulary = body["model"]["vocab"]
    vocabulary["X"], vocabulary["Y"] = vocabulary["Y"], vocabulary["X"]
    (path / "tokenizer.json").write_text(json.dumps(body))
    [difference] = validate(path, reference=source(), tokens=2).config_differences
    assert (difference.field, difference.expected, difference.found) == (
        "tokenizer.json", f"token {ord('X')}: 'X'", "Y",
    )  # fmt: skip


def test_a_chunk_size_that_no_layer_uses_changes_no_logit(
    source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy("guard")
    change_config(path, attention_chunk_size=8)
    result = validate(path, reference=source("guard"), tokens=20)
    [difference] = result.config_differences
    assert (difference.field, difference.matters_from) == ("attention_chunk_size", None)
    assert result.gates_failed == []


def test_readers_that_count_moe_layers_must_find_none_in_a_dense_model(
    source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy("guard")
    change_config(path, interleave_moe_layer_step=1)
    assert fields(validate(path, reference=source("guard"), tokens=2)) == {"interleave_moe_layer_step"}


@pytest.mark.parametrize(
    ("geometry", "changes", "named"),
    [
        ("scout", {"num_attention_heads": 12}, "num_attention_heads"),
        ("scout", {"num_attention_heads": 32, "head_dim": 4}, "num_attention_heads"),
        ("scout", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("scout", {"head_dim": 16}, "head_dim"),
        ("scout", {"hidden_size": 64}, "hidden_size"),
        ("scout", {"intermediate_size": 96}, "intermediate_size"),
        ("maverick", {"intermediate_size_mlp": 96}, "intermediate_size_mlp"),
        ("scout", {"vocab_size": 2000}, "vocab_size"),
        ("scout", {"num_local_experts": 5}, "num_local_experts"),
        ("scout", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("scout", {"moe_layers": [1, 2]}, "moe_layers"),
        ("scout", {"num_hidden_layers": 4}, "num_hidden_layers"),
        ("scout", {"vision_config__num_attention_heads": 7}, "vision_config.num_attention_heads"),
        ("scout", {"vision_config__hidden_size": 32}, "vision_config.hidden_size"),
        ("scout", {"vision_config__intermediate_size": 300}, "vision_config.intermediate_size"),
        ("scout", {"vision_config__num_hidden_layers": 3}, "vision_config.num_hidden_layers"),
        ("scout", {"vision_config__image_size": 28}, "vision_config.image_size"),
        ("scout", {"vision_config__patch_size": 100}, "vision_config.patch_size"),
        ("scout", {"vision_config__pixel_shuffle_ratio": 0.25}, "vision_config.pixel_shuffle_ratio"),
        ("scout", {"vision_config": None}, "vision_config"),
        ("scout", {"image_token_index": 5}, "image_token_index"),
        ("scout", {"image_token_index": -1}, "image_token_index"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_run_is_a_failed_check_in_words(
    geometry: str,
    changes: dict[str, Any],
    named: str,
    source: Callable[..., Path],
    copy: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = copy(geometry)
    change_config(path, **changes)
    outcome = commands.run(capsys, "validate", path, "--reference", source(geometry), "--tokens", 20, "--json")
    assert outcome.code == 5
    assert named in outcome.error
    result = decode(outcome.json, Validation, "the JSON")
    assert named in fields(result)
    assert result.candidate_failure
    assert "Traceback" not in result.candidate_failure + outcome.err
    assert result.tokens == 0
    assert all(getattr(result, name) is None for name in METRICS)


@pytest.mark.parametrize("changes", [{"num_attention_heads": 12}, {"hidden_size": 64}], ids=str)
def test_what_transformers_refuses_is_a_failed_check_too(
    changes: dict[str, Any], source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy("text_only")
    change_config(path, **changes)
    result = validate(path, reference=source("text_only"), tokens=2, runner="transformers")
    assert not result.passed
    assert "Transformers" in result.candidate_failure


def test_a_wrong_field_shows_in_transformers_too(source: Callable[..., Path], copy: Callable[..., Path]) -> None:
    path = copy("text_only")
    change_config(path, rms_norm_eps=0.5)
    result = validate(path, reference=source("text_only"), tokens=20, runner="transformers")
    assert not result.passed
    assert "nmse" in result.gates_failed
    assert fields(result) == {"rms_norm_eps"}


def test_a_nan_in_the_candidate_is_no_number_anywhere_in_the_result(
    source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy("text_only")
    change_tensors(path, lambda tensors: tensors["model.layers.0.input_layernorm.weight"].fill_(math.nan))
    result = validate(path, reference=source("text_only"), tokens=5)
    assert not result.passed
    assert result.gates_failed == sorted(result.gates)
    assert result.top1_agreement is result.kl_mean is result.perplexity_candidate is None
    assert result.perplexity_reference > 0
    assert {layer.nmse_propagated for layer in result.layers} == {None}


# -------------------- files that are damaged


@pytest.fixture
def refusal(
    source: Callable[..., Path], capsys: pytest.CaptureFixture[str], copy: Callable[..., Path]
) -> Callable[..., str]:
    """Damages a copy, asserts that it is bad input; returns the one line."""

    def refuse(damage: Callable[[Path], object], *options: object) -> str:
        path = copy()
        damage(path)
        outcome = commands.run(capsys, "validate", path, "--reference", source(), "--json", *options)
        assert outcome.code == 3, outcome.err
        assert outcome.out == ""
        return outcome.error

    return refuse


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 100_000, "null", '{"text_config": 3}', '{"text_config": [1]}']
)
@pytest.mark.parametrize("file", ["config.json", commands.INDEX])
def test_damaged_json(refusal: Callable[..., str], file: str, content: str) -> None:
    assert file in refusal(lambda path: (path / file).write_text(content))


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000])
def test_a_damaged_generation_config(refusal: Callable[..., str], content: str) -> None:
    assert "generation_config.json" in refusal(lambda path: (path / "generation_config.json").write_text(content))


@pytest.mark.parametrize("file", ["config.json", commands.INDEX, WEIGHTS])
def test_a_missing_file(refusal: Callable[..., str], file: str) -> None:
    refusal(lambda path: (path / file).unlink())


def test_truncated_weights(refusal: Callable[..., str]) -> None:
    def cut(path: Path) -> None:
        data = (path / WEIGHTS).read_bytes()
        (path / WEIGHTS).write_bytes(data[: len(data) // 2])

    assert WEIGHTS in refusal(cut)


def test_a_tokenizer_that_is_not_there_where_it_is_needed(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("hello\n")
    message = refusal(lambda path: (path / "tokenizer.json").unlink(), "--prompts", tmp_path / "prompts")
    assert "tokenizer" in message


@pytest.mark.parametrize("value", ["8", True, -1, 0, 1.5, 10**15, [8], {}, float("nan")], ids=str)
@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vision_config__image_size"])
def test_a_field_of_the_wrong_type_is_named(refusal: Callable[..., str], field: str, value: Any) -> None:
    message = refusal(lambda path: change_config(path, **{field: value}))
    assert "config.json" in message
    assert field.rpartition("__")[2] in message or "layers" in message


def test_a_directory_that_is_not_there(
    converted: Callable[..., Path], source: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, reference in ((tmp_path / "gone", source()), (converted(), tmp_path / "gone")):
        outcome = commands.run(capsys, "validate", path, "--reference", reference)
        assert outcome.code == 2
        assert "gone" in outcome.error


def test_damage_of_the_reference_is_the_references(
    meta_checkpoint: Callable[..., Any], converted: Callable[..., Path], tmp_path: Path
) -> None:
    damaged = commands.copy(meta_checkpoint("scout", 2).src, tmp_path / "source")
    for rank in (0, 1):
        tensors = torch.load(damaged / f"consolidated.{rank:02d}.pth", weights_only=False)
        del tensors["layers.1.attention.wo.weight"]
        torch.save(tensors, damaged / f"consolidated.{rank:02d}.pth")
    with pytest.raises(BadInput, match=r"source.*no tensor layers\.1\.attention\.wo\.weight.*download it again"):
        validate(converted(), reference=damaged, tokens=2)


# -------------------- gates


def test_a_gate_can_be_closed_and_opened(
    source: Callable[..., Path], copy: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    closed = validate(converted("text_only"), reference=source("text_only"), tokens=5, gates={"top1_agreement": 1.1})
    assert not closed.passed
    assert closed.gates_failed == ["top1_agreement"]
    assert closed.gates["top1_agreement"] == 1.1

    path = copy("text_only")
    change_config(path, rms_norm_eps=0.5)
    wide = {"top1_agreement": 0, "kl_mean": 100, "kl_p999": 100, "nmse": 100}
    opened = validate(path, reference=source("text_only"), tokens=5, gates=wide)
    assert opened.gates_failed == []
    assert not opened.passed  # the field differs whatever logits may


def test_a_gate_of_another_metric_is_added(source: Callable[..., Path], copy: Callable[..., Path]) -> None:
    path = copy("text_only")
    change_config(path, rms_norm_eps=0.5)
    result = validate(path, reference=source("text_only"), tokens=5, gates={"max_abs_diff": 1e-3})
    assert "max_abs_diff" in result.gates_failed


def test_unknown_names_are_mistakes_of_use(source: Callable[..., Path], converted: Callable[..., Path]) -> None:
    for options in ({"gates": {"kl": 1.0}}, {"dtype": "int8"}, {"runner": "vllm"}, {"tokens": 0}):
        with pytest.raises(UsageError):
            validate(converted(), reference=source(), **options)


# -------------------- the command line


@pytest.fixture
def command(
    source: Callable[..., Path], converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> Callable[..., commands.Outcome]:
    return lambda *options: commands.run(
        capsys, "validate", converted(), "--reference", source(), "--tokens", 5, *options
    )


def strict(outcome: commands.Outcome) -> Any:
    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is not JSON")

    assert outcome.out.count("\n") == 1
    return json.loads(outcome.out, parse_constant=refuse)


def test_json_is_one_object_on_stdout_and_nothing_else(command: Callable[..., commands.Outcome]) -> None:
    outcome = command("--json")
    assert outcome.code == 0
    assert strict(outcome)["passed"] is True
    assert outcome.err == ""


def test_a_failed_check_prints_the_same_json_and_one_line_of_error(
    source: Callable[..., Path], copy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy()
    change_tensors(path, lambda tensors: tensors[f"{TEXT}norm.weight"].fill_(math.nan))
    outcome = commands.run(capsys, "validate", path, "--reference", source(), "--json")
    assert outcome.code == 5
    assert strict(outcome)["passed"] is False
    assert f"{TEXT}norm.weight" in outcome.error


def test_without_json_the_same_is_said_in_words(command: Callable[..., commands.Outcome]) -> None:
    outcome = command()
    assert outcome.code == 0
    assert "every field says what the reference says" in outcome.out
    assert "155 tensors are equal bit by bit" in outcome.out
    assert "top1_agreement" in outcome.out


def test_gates_on_the_command_line(command: Callable[..., commands.Outcome]) -> None:
    outcome = command("--gate", "top1_agreement=2", "--gate", "kl_mean=0.5", "--json")
    assert outcome.code == 5
    assert outcome.json["gates"]["kl_mean"] == 0.5
    assert "logits differ: top1_agreement" in outcome.error
    unknown = command("--gate", "kl=0.5")
    assert unknown.code == 2
    assert "unknown gate 'kl': choose one of top1_agreement" in unknown.error
    for value in ("kl_mean", "kl_mean=", "kl_mean=x", "=1"):
        assert command("--gate", value).code == 2


def test_prompts_replace_the_random_tokens(command: Callable[..., commands.Outcome], tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("hello\n\nthe inn\n")
    result = command("--prompts", tmp_path / "prompts", "--json").json
    assert result["passed"]
    assert 5 < result["tokens"] <= 2 + len("hellothe inn")


@pytest.mark.parametrize("content", ["[[1, 2, 3], [4, 5]]", "1 2 3\n4,5\n"])
def test_token_ids_from_json_and_from_lines(
    command: Callable[..., commands.Outcome], tmp_path: Path, content: str
) -> None:
    (tmp_path / "ids").write_text(content)
    result = command("--token-ids", tmp_path / "ids", "--json").json
    assert result["passed"]
    assert result["tokens"] == 5


def test_an_image_is_seen_in_both_runners(command: Callable[..., commands.Outcome], tmp_path: Path) -> None:
    Image.effect_noise((112, 56), 80).convert("RGB").save(tmp_path / "picture.png")
    options = ("--image", tmp_path / "picture.png", "--json")
    ours, theirs = command(*options).json, command(*options, "--with", "transformers").json
    assert ours["passed"]
    assert theirs["passed"]
    # <bos> <image_start>, two tiles of 4 patches with separators, the global one, <image_end>
    assert ours["tokens"] == theirs["tokens"] == 1 + 1 + (4 + 1) + (4 + 1) + 1 + 4 + 1
    assert ours["perplexity_reference"] == theirs["perplexity_reference"]


def test_a_token_outside_the_vocabulary_is_bad_input(command: Callable[..., commands.Outcome], tmp_path: Path) -> None:
    (tmp_path / "ids").write_text(f"[[1], [2, {meta_model.VOCAB_SIZE}]]")
    outcome = command("--token-ids", tmp_path / "ids")
    assert outcome.code == 3
    assert f"prompt 2 has token {meta_model.VOCAB_SIZE}" in outcome.error


def test_empty_files_and_no_files_are_mistakes_of_use(command: Callable[..., commands.Outcome], tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for option in ("--prompts", "--token-ids"):
        outcome = command(option, tmp_path / "empty")
        assert outcome.code == 2
        assert "holds no" in outcome.error
        assert command(option, tmp_path / "missing").code == 2
    picture = command("--image", tmp_path / "empty")
    assert picture.code == 3
    assert "is no image" in picture.error


def test_another_tokenizer_is_named(source: Callable[..., Path], copy: Callable[..., Path], tmp_path: Path) -> None:
    """Only where there are texts to encode."""
    path = copy()
    file = path / "tokenizer.json"
    body = json.loads(file.read_text())
    body["model"]["merges"] = body["model"]["merges"][1:]
    file.write_text(json.dumps(body))
    (tmp_path / "prompts").write_text("the thin\n")
    result = validate(path, reference=source(), prompts=tmp_path / "prompts")
    assert not result.passed
    assert fields(result) == {"tokenizer.json"}


# -------------------- tracebacks, wrong words, and JSON that is none


@pytest.mark.parametrize("limit", ["inf", "nan", "-inf"])
def test_a_gate_that_json_cannot_say(command: Callable[..., commands.Outcome], limit: str) -> None:
    outcome = command("--gate", f"kl_mean={limit}", "--json")
    assert outcome.code == 2


def test_the_placeholder_of_an_image_in_a_prompt(command: Callable[..., commands.Outcome], tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("hello <|image|> there\n")
    assert command("--prompts", tmp_path / "prompts").code == 2


def test_an_image_beside_patch_tokens(command: Callable[..., commands.Outcome], tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "picture.png")
    (tmp_path / "ids").write_text(f"[[1, {meta_model.PATCH_TOKEN}, 2]]")
    outcome = command("--image", tmp_path / "picture.png", "--token-ids", tmp_path / "ids")
    assert outcome.code in (2, 3)


def test_patch_tokens_without_an_image_in_transformers(
    command: Callable[..., commands.Outcome], tmp_path: Path
) -> None:
    (tmp_path / "ids").write_text(f"[[1, {meta_model.PATCH_TOKEN}, 2]]")
    assert (
        command("--token-ids", tmp_path / "ids").code
        == command("--token-ids", tmp_path / "ids", "--with", "transformers").code
    )


def test_an_image_for_a_model_that_does_not_see(
    source: Callable[..., Path],
    converted: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "picture.png")
    arguments = ("--reference", source("text_only"), "--image", tmp_path / "picture.png")
    outcome = commands.run(capsys, "validate", converted("text_only"), *arguments)
    assert outcome.code == 2


def test_a_seed_that_torch_cannot_hold(command: Callable[..., commands.Outcome]) -> None:
    assert command("--seed", 10**30).code == 2


def test_metas_layout_has_nothing_for_transformers(
    source: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = commands.run(capsys, "validate", source(), "--reference", source(), "--with", "transformers")
    assert outcome.code == 2
    assert "Meta's layout" in outcome.error


@pytest.mark.parametrize(
    "changes", [{"num_experts_per_tok": 9}, {"head_dim": 16}, {"vision_config__num_attention_heads": 7}], ids=str
)
def test_a_reference_that_cannot_run_is_not_the_candidates_failure(
    changes: dict[str, Any], converted: Callable[..., Path], copy: Callable[..., Path], capsys: Any
) -> None:
    path = copy()
    change_config(path, **changes)
    outcome = commands.run(capsys, "validate", converted(), "--reference", path, "--tokens", 20)
    assert outcome.code == 3
    assert str(path) in outcome.error


@pytest.mark.parametrize("changes", [{"vision_config__pixel_shuffle_ratio": 0}, {"image_token_index": 10**30}], ids=str)
def test_numbers_that_end_in_a_traceback(
    changes: dict[str, Any], source: Callable[..., Path], copy: Callable[..., Path], capsys: Any
) -> None:
    path = copy()
    change_config(path, **changes)
    outcome = commands.run(capsys, "validate", path, "--reference", source(), "--tokens", 2)
    assert outcome.code in (3, 5)


@pytest.mark.parametrize("field", ["num_local_experts", "vision_config__num_hidden_layers"])
def test_absurd_counts_are_refused_before_lists_of_their_length_are_made(
    field: str, source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy()
    change_config(path, **{field: 20_000})
    with pytest.raises(BadInput, match=field.rpartition("__")[2]):
        validate(path, reference=source(), tokens=2)


def test_without_config_json_the_words_are_of_the_other_layout(refusal: Callable[..., str]) -> None:
    assert "config.json" in refusal(lambda path: (path / "config.json").unlink())


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        (f"{TEXT}norm.weight", torch.tensor(1.0)),
        (f"{TEXT}embed_tokens.weight", torch.tensor(1.0)),
        (f"{LAYER}feed_forward.experts.gate_up_proj", torch.ones(9)),
        (f"{LAYER}feed_forward.experts.gate_up_proj", torch.ones(0, 128, 208)),
        (f"{LAYER}feed_forward.experts.gate_up_proj", torch.ones(2, 128, 208)),
        (f"{LAYER}feed_forward.experts.down_proj", torch.ones(4, 104)),
    ],
    ids=["norm-0d", "embedding-0d", "experts-1d", "no-experts", "fewer-experts", "experts-2d"],
)
def test_a_tensor_of_fewer_dimensions_or_experts_is_named(
    key: str, tensor: Tensor, source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy()
    change_tensors(path, lambda tensors: tensors.update({key: tensor.to(torch.bfloat16)}))
    result = validate(path, reference=source(), tokens=2)
    assert not result.passed
    assert {fault.tensor for fault in result.tensors_different} == {key}


def test_a_wider_embedding_is_said_to_have_other_rows(source: Callable[..., Path], copy: Callable[..., Path]) -> None:
    path = copy()
    key = f"{TEXT}embed_tokens.weight"
    change_tensors(path, lambda tensors: tensors.update({key: tensors[key][:, :64]}))
    [fault] = validate(path, reference=source(), tokens=2).tensors_different
    assert "rows" not in fault.cause
