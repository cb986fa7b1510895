"""`params.json` to geometry: the published models' widths, Meta's defaults, and errors that name their field."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from llama4.geometry import Geometry, GeometryError, RopeScaling, swiglu_width

VISION: dict[str, Any] = {
    "image_size": {"height": 336, "width": 336},
    "patch_size": {"height": 14, "width": 14},
    "dim": 1408,
    "n_layers": 34,
    "n_heads": 16,
    "mlp_ratio": 4.0,
    "output_dim": 4096,
    "pixel_shuffle_ratio": 0.5,
}
SCOUT: dict[str, Any] = {
    "dim": 5120,
    "n_layers": 48,
    "n_heads": 40,
    "n_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 202048,
    "multiple_of": 2048,
    "ffn_dim_multiplier": 1.2,
    "ffn_exp": 4.0,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "use_qk_norm": True,
    "nope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "moe_args": {
        "num_experts": 16,
        "top_k": 1,
        "capacity_factor": 1.0,
        "auto_scale_F": True,
        "interleave_moe_layer_step": 1,
    },
    "vision_args": VISION,
}
MAVERICK = SCOUT | {
    "use_scaled_rope": False,
    "use_qk_norm": False,
    "moe_args": SCOUT["moe_args"] | {"num_experts": 128, "interleave_moe_layer_step": 2},
}
GUARD = {k: v for k, v in SCOUT.items() if k != "moe_args"} | {
    "nope_layer_interval": None,
    "attention_chunk_size": None,
}
MINIMAL: dict[str, Any] = {"dim": 64, "n_layers": 4, "n_heads": 4}


def geometry(params: dict[str, Any] = MINIMAL, **changes: Any) -> Geometry:
    """`params` with fields replaced; `moe_args__top_k=2` reaches into a nested object, `...` removes a field."""
    changed = copy.deepcopy(params)
    for path, value in changes.items():
        *outer, name = path.split("__")
        inner = changed
        for step in outer:
            inner = inner[step]
        if value is ...:
            inner.pop(name)
        else:
            inner[name] = value
    return Geometry.from_params(changed)


# -- the published models


def test_scout() -> None:
    g = geometry(SCOUT)
    assert (g.head_dim, g.n_heads, g.n_kv_heads, g.vocab_size) == (128, 40, 8, 202048)
    assert (g.expert_dim, g.n_experts, g.moe_layers) == (8192, 16, list(range(48)))
    assert (g.rope_scaling, g.use_qk_norm) == (RopeScaling(16.0, 1.0, 1.0, 8192), True)
    assert [layer for layer in range(48) if not g.uses_rope(layer)] == list(range(3, 48, 4))
    assert [g.is_chunked(layer) for layer in range(4)] == [True, True, True, False]


def test_maverick() -> None:
    g = geometry(MAVERICK)
    assert (g.expert_dim, g.dense_dim, g.n_experts) == (8192, 16384, 128)
    assert g.moe_layers == list(range(1, 48, 2)), "even layers are dense"
    assert (g.rope_scaling, g.use_qk_norm) == (None, False)


def test_guard_is_dense_and_sees_everything() -> None:
    g = geometry(GUARD)
    assert (g.is_dense, g.n_experts, g.moe_layers, g.expert_dim) == (True, 0, [], 0)
    assert (g.nope_interval, g.chunk_size) == (None, None)
    assert all(g.uses_rope(layer) and not g.is_chunked(layer) for layer in range(48))


def test_the_vision_tower_that_all_three_share() -> None:
    v = geometry(SCOUT).vision
    assert v is not None
    assert (v.n_patches, v.patch_dim, v.mlp_dim, v.shuffled_dim, v.output_dim) == (576, 588, 5632, 5632, 4096)
    assert geometry(MAVERICK).vision == geometry(GUARD).vision == v


def published_parameters(g: Geometry) -> int:
    """The size of a model by its architecture, written out."""
    assert g.vocab_size is not None
    assert g.expert_dim is not None
    assert g.dense_dim is not None
    assert g.n_experts is not None
    assert g.vision is not None
    attention = g.dim * g.head_dim * 2 * (g.n_heads + g.n_kv_heads) + 2 * g.dim
    moe = 3 * g.dim * g.expert_dim * (g.n_experts + 1) + g.dim * g.n_experts
    n_moe = len(g.moe_layers)
    text = g.n_layers * attention + n_moe * moe + (g.n_layers - n_moe) * 3 * g.dim * g.dense_dim
    text += 2 * g.vocab_size * g.dim + g.dim
    v = g.vision
    layer = 4 * v.dim * (v.dim + 1) + 2 * v.dim * v.mlp_dim + v.mlp_dim + v.dim + 4 * v.dim
    vision = v.n_layers * layer + v.dim * (v.patch_dim + 1 + v.n_patches + 1 + 4)
    return text + vision + v.shuffled_dim * v.output_dim + v.output_dim**2 + g.dim * v.output_dim


def test_the_widths_add_up_to_the_published_parameter_counts() -> None:
    assert published_parameters(geometry(SCOUT)) == 108_641_793_536
    assert published_parameters(geometry(MAVERICK)) == 401_583_781_376


@pytest.mark.parametrize(
    ("changes", "expert", "dense"),
    [
        ({}, 8192, 16384),
        ({"moe_args__auto_scale_F": False}, 16384, 16384),
        ({"moe_args__capacity_factor": 3.0}, 4096, 16384),
        ({"ffn_exp": 8.0}, 16384, 16384),  # the dense blocks ignore ffn_exp
        ({"multiple_of": 1000}, 9000, 17000),
        ({"multiple_of": ...}, 8192, 16384),  # Meta's default, 256
        ({"ffn_exp": ...}, None, 16384),  # the tensors tell
        ({"ffn_dim_multiplier": ...}, None, 14336),
    ],
)
def test_widths_by_metas_formula(changes: dict[str, Any], expert: int | None, dense: int) -> None:
    g = geometry(SCOUT, **changes)
    assert (g.expert_dim, g.dense_dim) == (expert, dense)


def test_a_width_is_cut_after_every_step_and_rounded_up_once() -> None:
    assert swiglu_width(20480, 1.2, 2, 1) == 8191  # int(int(1.2 * 13653) / 2): 16383 halved
    assert swiglu_width(20480, 1.2, 2, 2048) == 8192


# -- defaults


def test_absent_fields_take_metas_defaults() -> None:
    g = geometry()
    assert g.n_kv_heads == 4
    assert (g.norm_eps, g.rope_theta, g.rope_scaling, g.use_qk_norm) == (1e-5, 500000.0, None, False)
    assert (g.nope_interval, g.chunk_size) == (None, None)
    assert (g.attn_temperature_tuning, g.floor_scale, g.attn_scale) == (False, 8192.0, 0.1)
    assert (g.vocab_size, g.n_experts, g.vision) == (None, 0, None)
    assert (g.top_k, g.moe_step) == (1, 1)


OPTIONAL = [
    *("n_kv_heads", "head_dim", "vocab_size", "multiple_of", "ffn_dim_multiplier", "ffn_exp", "norm_eps", "rope_theta"),
    *("use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "use_qk_norm", "nope_layer_interval"),
    *("attention_chunk_size", "attn_temperature_tuning", "floor_scale", "attn_scale", "moe_args", "vision_args"),
]


@pytest.mark.parametrize("field", OPTIONAL)
def test_null_means_absent(field: str) -> None:
    without = {key: value for key, value in SCOUT.items() if key != field}
    assert geometry({**SCOUT, field: None}) == geometry(without)


def test_no_optional_field_is_ignored() -> None:
    stated = {"n_kv_heads": 2, "vocab_size": 100, "multiple_of": 7, "ffn_dim_multiplier": 9, "ffn_exp": 40.0}
    stated |= {"norm_eps": 1e-6, "rope_theta": 1e4, "use_qk_norm": True, "nope_layer_interval": 3}
    stated |= {"attention_chunk_size": 32, "attn_temperature_tuning": True, "floor_scale": 5, "attn_scale": 0.2}
    base = MINIMAL | {"dim": 1024, "moe_args": {"num_experts": 2}, "ffn_exp": 4.0, "ffn_dim_multiplier": 1.2}
    for field, value in stated.items():
        assert geometry(base, **{field: value}) != geometry(base), field
    scaled = geometry(use_scaled_rope=True, rope_scaling_factor=8.0, rope_high_freq_factor=4.0)
    assert scaled.rope_scaling == RopeScaling(8.0, 4.0)


def test_open_sizes_are_left_to_the_tensors() -> None:
    g = geometry(vocab_size=-1, moe_args={})
    assert (g.vocab_size, g.n_experts, g.expert_dim, g.is_dense) == (None, None, None, False)
    done = g.completed(100, 3, 16, 32)
    assert (done.vocab_size, done.n_experts, done.expert_dim, done.dense_dim) == (100, 3, 16, g.dense_dim)
    assert replace(done, vocab_size=None, n_experts=None, expert_dim=None) == g


@pytest.mark.parametrize("params", [SCOUT, MAVERICK, GUARD, MINIMAL])
def test_fields_may_be_nested_under_model(params: dict[str, Any]) -> None:
    assert geometry({"model": params, "tokenizer": {}}) == geometry(params)


def test_a_model_that_is_no_object_is_ignored() -> None:
    assert geometry(MINIMAL | {"model": "llama4"}) == geometry()


def test_whole_floats_are_integers_and_squares_may_be_one_number() -> None:
    assert geometry(dim=64.0) == geometry()
    assert geometry(SCOUT, vision_args__image_size=336, vision_args__patch_size=14) == geometry(SCOUT)


def test_a_chunk_size_of_zero_is_none() -> None:
    assert geometry(attention_chunk_size=0).chunk_size is None


# -- errors


@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads"])
@pytest.mark.parametrize("value", [None, ..., 0, -1, 1.5, "64", True, [], {}, float("nan"), float("inf"), 2**41])
def test_a_required_size_is_a_positive_integer(field: str, value: Any) -> None:
    with pytest.raises(GeometryError, match=rf"\b{field}\b"):
        geometry(**{field: value})


V = "vision_args__"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_heads": 7}, r"dim \(5120\) must be a multiple of n_heads \(7\)"),
        ({"n_kv_heads": 7}, r"n_heads \(40\) must be a multiple of n_kv_heads \(7\)"),
        ({"dim": 120, "head_dim": ...}, r"dim / n_heads \(3\) must be even"),
        ({"head_dim": 64}, r"head_dim \(64\) contradicts dim / n_heads \(128\)"),
        ({"n_kv_heads": 0}, "n_kv_heads"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"ffn_dim_multiplier": "1.2"}, "ffn_dim_multiplier"),
        ({"ffn_exp": []}, "ffn_exp"),
        ({"norm_eps": "small"}, "norm_eps"),
        ({"rope_theta": False}, "rope_theta"),
        ({"use_scaled_rope": 1}, "use_scaled_rope must be true or false"),
        ({"rope_scaling_factor": "16"}, "rope_scaling_factor"),
        ({"rope_high_freq_factor": "1"}, "rope_high_freq_factor"),
        ({"use_qk_norm": "true"}, "use_qk_norm"),
        ({"nope_layer_interval": 0}, "nope_layer_interval"),
        ({"attention_chunk_size": 0.5}, "attention_chunk_size"),
        ({"attn_temperature_tuning": 4}, "attn_temperature_tuning"),
        ({"floor_scale": "x"}, "floor_scale"),
        ({"attn_scale": float("inf")}, "attn_scale"),
        ({"moe_args": [16]}, "moe_args must be an object"),
        ({"moe_args__num_experts": 1.5}, r"moe_args\.num_experts"),
        ({"moe_args__top_k": 17}, r"moe_args\.top_k \(17\) is more than moe_args\.num_experts \(16\)"),
        ({"moe_args__top_k": 0}, r"moe_args\.top_k"),
        ({"moe_args__interleave_moe_layer_step": 0}, r"moe_args\.interleave_moe_layer_step"),
        ({"moe_args__auto_scale_F": 1}, r"moe_args\.auto_scale_F"),
        ({"moe_args__capacity_factor": "1"}, r"moe_args\.capacity_factor"),
        ({"vision_args": 336}, "vision_args must be an object"),
        *(({f"{V}{field}": ...}, rf"vision_args\.{field} is missing") for field in VISION),
        ({f"{V}image_size": {"height": 336, "width": 224}}, r"vision_args\.image_size is 336 x 224"),
        ({f"{V}image_size": {"height": 336}}, r"vision_args\.image_size\.width is missing"),
        ({f"{V}patch_size": "14"}, r"vision_args\.patch_size"),
        ({f"{V}image_size": 335}, r"image_size \(335\) must be a multiple of patch_size \(14\)"),
        ({f"{V}n_heads": 3}, r"vision_args: dim / n_heads \(1408 / 3\)"),
        ({f"{V}n_heads": 704}, r"vision_args: dim / n_heads \(1408 / 704\) must be a multiple of 4"),
        ({f"{V}pixel_shuffle_ratio": 0}, "pixel_shuffle_ratio"),
        ({f"{V}pixel_shuffle_ratio": 2}, "pixel_shuffle_ratio"),
        ({f"{V}pixel_shuffle_ratio": 0.3}, "pixel_shuffle_ratio"),
        ({f"{V}n_layers": 0}, r"vision_args\.n_layers"),
        ({f"{V}mlp_ratio": "4"}, r"vision_args\.mlp_ratio"),
    ],
)
def test_a_field_that_cannot_be_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(GeometryError, match=named):
        geometry(SCOUT, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dim": 10**400}, "dim"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"ffn_exp": 1e308}, "ffn_exp"),
        ({"ffn_exp": -4.0}, "ffn_exp"),
        ({"ffn_dim_multiplier": 1e308}, "ffn_dim_multiplier"),
        ({"ffn_dim_multiplier": -1.0}, "ffn_dim_multiplier"),
        ({"moe_args__capacity_factor": -1}, "capacity_factor"),
        ({"moe_args__capacity_factor": -3}, "capacity_factor"),
        ({f"{V}mlp_ratio": 1e308}, "mlp_ratio"),
        ({f"{V}mlp_ratio": -1}, "mlp_ratio"),
    ],
)
def test_a_number_that_no_width_can_come_from_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(GeometryError, match=named):
        geometry(SCOUT, **changes)
