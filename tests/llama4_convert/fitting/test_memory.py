"""The arithmetic of memory against plans, hand-made sums and the rules of runtimes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4.geometry import Geometry
from llama4_convert.conversion.convert import bind
from llama4_convert.conversion.request import Request
from llama4_convert.fitting.deployment import Deployment, memory_use
from llama4_convert.fitting.gpus import find_gpu
from llama4_convert.fitting.memory import KVCache, Weights, grouped_layers, kv_bytes, parameters, prefill_bytes
from llama4_convert.fitting.runtimes import runtimes
from quant.recipe import built_in
from tests.support import meta_model
from tests.support.geometries import GUARD, MAVERICK, SCOUT

GIB = 1 << 30


# -------------------- weights


def test_parameters_are_those_of_the_published_models() -> None:
    assert parameters(SCOUT).total == 108_641_793_536
    # 48 layers of 16 experts, each three matrices of 5,120 x 8,192.
    assert parameters(SCOUT).routed_experts == 48 * 16 * 3 * 5120 * 8192
    assert parameters(SCOUT).keys_values == 48 * 2 * 5120 * 1024
    assert parameters(MAVERICK).total == 401_583_781_376
    assert parameters(MAVERICK).dense_mlp == 24 * 3 * 5120 * 16384
    with pytest.raises(ValueError, match="incomplete"):
        parameters(replace(SCOUT, vocab_size=None))


@pytest.mark.parametrize(
    ("g", "sizes"),
    [
        (SCOUT, {"fp8": 106.8, "int4-experts": 68.8, "int4": 60.4, "nf4": 60.4, "mixed": 63.1}),
        (MAVERICK, {"fp8": 379.7, "int4-experts": 213.6, "int4": 201.1}),
    ],
)
def test_sizes_of_recipes(g: Geometry, sizes: dict[str, float]) -> None:
    bf16 = Weights.from_geometry(g)
    assert bf16.total / GIB == pytest.approx({16: 202.4, 128: 748.0}[g.n_experts or 0], abs=0.05)
    for name, gib in sizes.items():
        assert bf16.quantized(g, built_in()[name]).total / GIB == pytest.approx(gib, abs=0.05)


def test_fp8_experts_of_scout_are_112_gib() -> None:
    counts = parameters(SCOUT)
    experts = counts.routed_experts * 1 + 2 * 48 * 16 * (2 * 8192 + 5120)  # a byte each, and a bf16 scale a row
    assert (experts + 2 * (counts.total - counts.routed_experts)) / GIB == pytest.approx(112.4, abs=0.05)


def test_int4_of_scout_by_hand() -> None:
    """8 codes in 4 bytes, a bf16 scale for 128 inputs, and 16 bytes of shape a matrix."""
    matrices = 48 * (16 + 1) * 3
    packed = matrices * (5120 * 8192 // 2 + 5120 * 8192 // 128 * 2 + 16)
    counts = parameters(SCOUT)
    kept = 2 * (counts.total - counts.routed_experts - counts.shared_expert)
    assert Weights.from_geometry(SCOUT).quantized(SCOUT, built_in()["int4"]).total == packed + kept


@pytest.mark.parametrize("name", sorted(meta_model.GEOMETRIES))
def test_every_tensor_is_counted_as_what_it_is(name: str, meta_checkpoint: Callable[..., Any]) -> None:
    """By the names of a plan and by the geometry: two ways to the same numbers, kind by kind."""
    plan = bind(Request(meta_checkpoint(name).src)).job.plan
    by_name = Weights.from_tensors((t.name, t.numel * 2) for t in plan.tensors)
    by_geometry = Weights.from_geometry(plan.geometry)
    assert by_name == by_geometry
    assert by_name.total == 2 * plan.parameters


def test_a_directory_of_fused_experts_counts_as_one_of_single_ones(meta_checkpoint: Callable[..., Any]) -> None:
    plan = bind(Request(meta_checkpoint("scout").src)).job.plan
    linear = [("language_model.model.layers.0.feed_forward.experts.3.gate_proj.weight_packed", 10)]
    assert Weights.from_tensors(linear).routed_experts == 10
    assert Weights.from_tensors((t.name, t.nbytes) for t in plan.tensors).routed_experts > 0


def test_gpus_that_split_tensors() -> None:
    g = replace(SCOUT, n_kv_heads=2)
    weights = Weights(routed_experts=800, shared_expert=80, dense_mlp=8, keys_values=40, replicated=3, other=16)
    assert weights.total == 947
    assert weights.split_by_tensors(1, 2) == 947
    assert weights.split_by_tensors(8, 2) == 904 // 8 + 40 // 2 + 3  # two KV heads on eight GPUs: four copies each
    assert weights.split_by_layers(1, g) == 947
    assert Weights.from_geometry(SCOUT).split_by_layers(4, SCOUT) / GIB == pytest.approx(202.4 / 4 + 4.07, abs=0.1)


# -------------------- KV cache


def test_kv_bytes_of_scout() -> None:
    """Keys and values, 8 heads of 128 numbers, two bytes each."""
    assert kv_bytes(SCOUT) == 2 * 8 * 128 * 2 == 4096
    assert [kv_bytes(SCOUT, n) for n in (2, 4, 8, 16)] == [2048, 1024, 512, 512]
    assert kv_bytes(SCOUT, 1, 1) == 2048


def test_a_cache_of_scout_by_hand() -> None:
    cache = KVCache(4096, 12, 36, 8192, 0)
    assert cache.nbytes(8192) == 4096 * 48 * 8192  # not yet beyond a chunk
    assert cache.nbytes(131072) == 4096 * (12 * 131072 + 36 * 8192) == 7.125 * GIB
    assert cache.nbytes(131072, 3) == 3 * cache.nbytes(131072)
    assert cache.nbytes(17) == cache.nbytes(32)  # whole blocks of 16
    behind = replace(cache, piece_tokens=4096)
    assert behind.nbytes(8192) == cache.nbytes(8192)
    assert behind.nbytes(131072, 3) == cache.nbytes(131072, 3) + 4096 * 36 * 4096  # the piece once, not for each


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.integers(1, 8), st.integers(0, 40), st.integers(0, 40))
def test_more_tokens_never_take_less(tokens: int, more: int, sequences: int, full: int, chunked: int) -> None:
    cache = KVCache(4096, full, chunked, 8192, 2048)
    assert cache.nbytes(tokens, sequences) <= cache.nbytes(tokens + more, sequences)
    assert cache.nbytes(tokens, sequences) <= cache.nbytes(tokens, sequences + 1)
    assert (
        cache.nbytes(tokens, sequences)
        <= replace(cache, full_layers=full + chunked, chunked_layers=0).nbytes(tokens, sequences)
        + cache.token_bytes * chunked * 2048
    )


@pytest.mark.parametrize(
    ("layers", "stored"),
    [
        ((12, 36), (12, 36)),  # Scout: four groups of twelve
        ((1, 4), (1, 4)),
        ((2, 9), (2, 10)),  # one layer of padding
        ((10, 14), (14, 14)),  # less than 1.5 times: the larger count is the size
        ((48, 0), (48, 0)),
        ((0, 5), (0, 5)),
    ],
)
def test_groups_of_vllms_hybrid_cache(layers: tuple[int, int], stored: tuple[int, int]) -> None:
    assert grouped_layers(*layers) == stored


# -------------------- activations


@pytest.mark.parametrize("g", [SCOUT, MAVERICK, GUARD])
def test_what_can_be_derived_is_well_below_what_is_allowed(g: Geometry) -> None:
    """The allowance for activations has to have room for what is not derived: workspaces of kernels."""
    assert 0.1 * GIB < prefill_bytes(g, 2048, 16, 1) < 1 * GIB
    assert prefill_bytes(g, 2048, 16, 4) < prefill_bytes(g, 2048, 16, 1)


def test_prefill_of_scout_by_hand() -> None:
    # Residual, its norm and the block's output; q, k, v and what attention makes; gate, up and product of two experts, and
    # of the routed one the scaled input and the output, of the shared one the output.
    width = 3 * 5120 + 2 * (40 + 8) * 128 + 2 * 3 * 8192 + 3 * 5120
    picture = 17 * 577 * (4 * 1408 + 5632)
    assert prefill_bytes(SCOUT, 2048, 16, 1) == 2 * (2048 * width + picture) + 16 * 202048 * 12


def test_what_is_derived_counts_where_it_is_more_than_the_allowance() -> None:
    """A thousand rows of logits, and the keys and values that two pieces of a prompt write behind the chunk."""
    vllm, without_chunks = runtimes()[:2]
    asked = Deployment(SCOUT, Weights(), None, find_gpu("h100-80gb"), sequences=1024)
    written = 36 * 2 * 2048 * 4096
    assert memory_use(asked, vllm).activations() == prefill_bytes(SCOUT, 2048, 1024, 1) + written > 2 * GIB
    assert memory_use(asked, without_chunks).activations() == prefill_bytes(SCOUT, 2048, 1024, 1)
    assert memory_use(replace(asked, sequences=1), vllm).activations() == 2 * GIB


def test_a_plan_tells_its_recipes_sizes_to_the_byte(tmp_path: Path) -> None:
    """Of widths that are no powers of two, with dense layers: what `fit` counts is what `convert` would write."""
    params = {**meta_model.GEOMETRIES["scout"], "dim": 384, "n_heads": 6, "n_kv_heads": 2, "head_dim": 64}
    params |= {"n_layers": 4, "multiple_of": 128, "ffn_dim_multiplier": 0.5, "ffn_exp": 4.0}
    params["moe_args"] = {**params["moe_args"], "num_experts": 3, "interleave_moe_layer_step": 2}
    meta_model.write_checkpoint(meta_model.build(params, seed=1), params, tmp_path, ranks=2)
    plain = bind(Request(tmp_path)).job.plan
    weights = Weights.from_tensors((t.name, t.nbytes) for t in plain.tensors)
    for name, recipe in built_in().items():
        if recipe.format == "meta":
            continue  # for export
        planned = bind(Request(tmp_path, recipe=name)).job.plan
        assert weights.quantized(plain.geometry, recipe) == Weights.from_tensors(
            (t.name, t.nbytes) for t in planned.tensors
        )
