"""What the candidate holds: of weights that are wrong `validate` names the tensor, and only it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from llama4.weights_transformers import transformers_key
from llama4_convert import validate
from tests.support import commands
from tests.support.candidates import (
    LAYER,
    METRICS,
    TEXT,
    TOWER,
    VISION,
    change_tensors,
)

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
