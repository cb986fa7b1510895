"""The verdicts on GPUs: the contexts known for Scout and Maverick, what each runtime loads, and what is named instead of a no."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4.geometry import Geometry
from llama4_convert.errors import UsageError
from llama4_convert.fit import (
    CONTEXT_BYTES,
    RUNTIMES,
    WORKSPACE_BYTES,
    find_gpu,
    fit,
    fit_summary,
    gpus,
    parameters,
    recipe_bytes,
)

GIB = 1 << 30
INT4, FP8, MIXED, NF4 = (
    "compressed-tensors-int4",
    "compressed-tensors-fp8",
    "compressed-tensors-mixed",
    "bitsandbytes-nf4",
)
VISION = {
    "image_size": {"height": 336, "width": 336},
    "patch_size": {"height": 14, "width": 14},
    "dim": 1408,
    "n_layers": 34,
    "n_heads": 16,
    "mlp_ratio": 4.0,
    "output_dim": 4096,
    "pixel_shuffle_ratio": 0.5,
}


def geometry(experts: int, step: int) -> Geometry:
    return Geometry.from_params(
        {
            "dim": 5120,
            "n_layers": 48,
            "n_heads": 40,
            "n_kv_heads": 8,
            "vocab_size": 202048,
            "multiple_of": 2048,
            "ffn_dim_multiplier": 1.2,
            "ffn_exp": 4.0,
            "nope_layer_interval": 4,
            "attention_chunk_size": 8192,
            "moe_args": {"num_experts": experts, "interleave_moe_layer_step": step},
            "vision_args": VISION,
        }
    )


SCOUT, MAVERICK = geometry(16, 1), geometry(128, 2)
# Guard 4: Scout without its routed experts, and without chunks.
GUARD = replace(SCOUT, n_experts=0, expert_dim=0, dense_dim=8192, chunk_size=None, nope_interval=None)


def verdict(gib: float, format: str | None, g: Geometry = SCOUT, **options: Any) -> dict[str, Any]:
    return fit(g, int(gib * GIB), **{"gpu": "h100-80gb", "context": None, "format": format, **options})


def runtime(result: dict[str, Any], name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [r for r in result["runtimes"] if r["runtime"] == name]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("gib", "format", "thousands"),
    [
        (202.4, None, 0),
        (112.4, FP8, 0),
        (106.8, FP8, 0),
        (68.8, INT4, 46),
        (60.4, INT4, 228),
        (73.0, INT4, 0),
        (56.2, INT4, 320),
    ],
)
def test_scout_on_one_h100(gib: float, format: str | None, thousands: int) -> None:
    vllm = runtime(verdict(gib, format), "vllm")
    assert vllm["max_context"] == pytest.approx(thousands * 1000, rel=0.03)
    assert vllm["fits"] == (thousands > 0)
    assert vllm["max_context"] % 16 == 0


def test_nf4_is_for_transformers_alone() -> None:
    result = verdict(68.8, NF4)
    assert [r["runtime"] for r in result["runtimes"] if r["fits"]] == ["transformers"]
    assert runtime(result, "transformers")["max_context"] == pytest.approx(46_000, rel=0.03)
    assert runtime(result, "vllm")["command"] == ""
    assert "recipe int4" in runtime(result, "vllm")["note"]


@pytest.mark.parametrize(
    ("gib", "format"), [(748.0, None), (388.1, FP8), (213.6, INT4), (201.1, INT4), (213.7, NF4), (196.9, INT4)]
)
def test_maverick_never_fits_one_h100(gib: float, format: str | None) -> None:
    result = verdict(gib, format, MAVERICK)
    assert not result["fits"]
    assert result["best_recipe"] is None
    assert all(r["max_context"] == 0 and r["command"] == "" and r["note"] for r in result["runtimes"])


def test_kv_bytes_are_four_kib_a_token_a_layer() -> None:
    result = verdict(60.4, INT4)
    assert result["kv_bytes_per_token_per_layer"] == 4096
    assert result["kv_bytes_per_token"] == 48 * 1024
    assert result["kv_bytes_of_chunked_layers"] == 1.125 * GIB
    assert result["budget"]["kv_cache_bytes"] == result["gpu_bytes"] - CONTEXT_BYTES - WORKSPACE_BYTES - int(60.4 * GIB)


def test_a_cache_that_ignores_chunks_holds_less() -> None:
    result = verdict(60.4, INT4)
    without = runtime(result, "vllm-no-hybrid-cache")["max_context"]
    assert without == pytest.approx(11.6 * GIB / (48 * 4096), abs=16)
    assert without < runtime(result, "sglang")["max_context"] < runtime(result, "vllm")["max_context"]


@settings(max_examples=60)
@given(st.floats(1, 71.9), st.sampled_from(RUNTIMES[:3]))
def test_the_largest_context_fills_the_room_and_no_more(gib: float, name: str) -> None:
    result = verdict(gib, INT4)
    room, tokens = result["budget"]["kv_cache_bytes"], runtime(result, name)["max_context"]
    held = {"vllm": 8192, "vllm-no-hybrid-cache": None, "sglang": 16384}[name]

    def needed(n: int) -> int:
        return 4096 * (12 * n + 36 * (n if held is None else min(n, held)))

    assert needed(tokens) <= room < needed(tokens + 16)


def test_transformers_decompresses_compressed_tensors() -> None:
    for gib, format in [(60.4, INT4), (106.8, FP8), (63.1, MIXED)]:
        for gpu in ("h100-80gb", "h200-141gb"):
            there = runtime(verdict(gib, format, gpu=gpu), "transformers")
            assert not there["fits"]
            assert "202.4 GiB" in there["note"]
            assert "decompresses" in there["note"]
    assert runtime(verdict(60.4, INT4, n_gpus=4), "transformers")["fits"]


def test_mixed_is_not_for_sglang() -> None:
    result = verdict(63.1, MIXED)
    assert runtime(result, "vllm")["fits"]
    assert not runtime(result, "sglang")["fits"]


def test_fp8_scout_on_one_h100_is_a_clear_no_with_ways_out() -> None:
    result = verdict(106.8, FP8, context=131072)
    assert not result["fits"]
    assert not any(r["fits"] for r in result["runtimes"])
    assert runtime(result, "vllm")["note"] == "weights need 106.8 GiB, there are 72.0 GiB"
    assert result["best_recipe"] == "int4"
    assert "h100-80gb with recipe int4 (228," in result["advice"]
    assert "2 x h100-80gb" in result["advice"]
    assert "h200-141gb" in result["advice"]
    # The experts alone in int4 leave 46 k, which is not what was asked.
    assert "int4-experts" not in result["advice"]
    assert "int4-experts" in verdict(106.8, FP8)["advice"]
    for way in ({"n_gpus": 2}, {"gpu": "h200-141gb"}):
        assert runtime(verdict(106.8, FP8, context=131072, **way), "vllm")["fits"]


def test_a_context_that_is_asked_is_judged_and_served() -> None:
    yes, no = verdict(60.4, INT4, context=131072), verdict(60.4, INT4, context=262144)
    assert runtime(yes, "vllm")["fits"]
    assert not runtime(yes, "vllm-no-hybrid-cache")["fits"]
    assert "--max-model-len 131072 " in runtime(yes, "vllm")["command"]
    assert not no["fits"]
    assert no["advice"]
    # What does not hold what was asked is served with what it holds.
    assert f"--max-model-len {runtime(no, 'vllm')['max_context']} " in runtime(no, "vllm")["command"]


def test_no_context_beyond_the_models_own() -> None:
    assert runtime(verdict(60.4, INT4, max_context=131072), "vllm")["max_context"] == 131072
    beyond = verdict(60.4, INT4, max_context=131072, context=131073)
    assert not beyond["fits"]
    assert "131,072" in beyond["advice"]
    assert "the model itself ends" in runtime(beyond, "vllm")["note"]
    # A model that ends below the least context that is asked of others.
    assert verdict(22.4, None, GUARD, gpu="l40s-48gb", max_context=4096)["fits"]


def test_gpus_share_weights_and_kv_heads() -> None:
    one, two, eight = (verdict(60.4, INT4, n_gpus=n) for n in (1, 2, 8))
    assert [r["kv_bytes_per_token_per_layer"] for r in (one, two, eight)] == [4096, 2048, 512]
    assert [r["budget"]["weight_bytes"] for r in (one, two, eight)] == [-(-int(60.4 * GIB) // n) for n in (1, 2, 8)]
    assert "--tensor-parallel-size 2" in runtime(two, "vllm")["command"]
    assert runtime(two, "sglang")["command"].endswith("--tp 2")
    assert "parallel" not in runtime(one, "vllm")["command"]
    assert 'device_map="auto"' in runtime(verdict(68.8, NF4, n_gpus=2), "transformers")["command"]


def test_kv_heads_are_repeated_on_more_gpus_than_heads() -> None:
    few = replace(SCOUT, n_kv_heads=4)
    four, eight = (verdict(60.4, INT4, few, n_gpus=n) for n in (4, 8))
    assert four["kv_bytes_per_token_per_layer"] == eight["kv_bytes_per_token_per_layer"] == 512
    assert runtime(eight, "vllm")["fits"]


def test_the_best_recipe_is_the_one_of_least_error_that_reaches_the_context() -> None:
    def best(**options: Any) -> str | None:
        found: str | None = verdict(60.4, INT4, **options)["best_recipe"]
        return found

    assert best() == "int4"  # a good context where none is asked: int4-experts fits, but with 46 k
    assert best(context=32768) == "int4-experts"
    assert best(context=262144) is None
    assert best(gpu="h200-141gb") == "fp8"
    assert best(n_gpus=4) == "bf16"


def test_transformers_takes_prompts_in_pieces_that_its_experts_can_hold() -> None:
    for g, tokens in ((SCOUT, 512), (MAVERICK, 64), (GUARD, 4096)):
        result = verdict(14.0, NF4, g)
        assert f"prefill_chunk_size={tokens}:" in runtime(result, "transformers")["note"]


def test_heads_that_gpus_cannot_share() -> None:
    result = verdict(60.4, INT4, n_gpus=3)
    assert "40 heads" in runtime(result, "vllm")["note"]
    assert not runtime(result, "vllm")["fits"]
    assert verdict(68.8, NF4, n_gpus=3)["fits"]  # Transformers shares out layers


def test_commands() -> None:
    result = verdict(60.4, INT4, context=131072, directory="my scout")
    assert runtime(result, "vllm")["command"] == (
        "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE=1 vllm serve 'my scout' --max-model-len 131072"
        " --gpu-memory-utilization 0.929 --max-num-batched-tokens 2048"
    )
    # 16,384 of 131,072 tokens in chunked layers, and the share of the GPU that weights and cache may take.
    assert runtime(result, "sglang")["command"] == (
        "python -m sglang.launch_server --model-path 'my scout' --context-length 131072 --mem-fraction-static 0.903"
        " --swa-full-tokens-ratio 0.125"
    )
    without = runtime(verdict(60.4, INT4, context=8192), "vllm-no-hybrid-cache")["command"]
    assert without.startswith("vllm serve DIR --max-model-len 8192 ")
    assert without.endswith("--disable-hybrid-kv-cache-manager")
    load = runtime(verdict(68.8, NF4, directory="my scout"), "transformers")["command"]
    assert 'AutoModelForImageTextToText.from_pretrained("my scout"' in load


def test_text_only_and_dense_models() -> None:
    text = replace(SCOUT, vision=None)
    result = verdict(60.4, INT4, text)
    # SGLang knows the chunked layers of the architecture with vision only.
    assert runtime(result, "sglang")["max_context"] == runtime(result, "vllm-no-hybrid-cache")["max_context"]
    guard = verdict(22.4, None, GUARD, max_context=8192)
    assert guard["best_recipe"] == "bf16"
    assert all(r["fits"] for r in guard["runtimes"])
    assert guard["kv_bytes_of_chunked_layers"] == 0
    assert (
        "AutoModelForCausalLM" in runtime(verdict(22.4, None, replace(GUARD, vision=None)), "transformers")["command"]
    )


def test_parameters_are_those_of_the_published_models() -> None:
    assert parameters(SCOUT).total == 108_641_793_536
    assert parameters(SCOUT).routed_experts == pytest.approx(96.6e9, rel=0.001)
    assert parameters(MAVERICK).total == 401_583_781_376
    with pytest.raises(ValueError, match="incomplete"):
        parameters(replace(SCOUT, vocab_size=None))


@pytest.mark.parametrize(
    ("g", "sizes"),
    [
        (SCOUT, {"bf16": 202.4, "fp8": 106.8, "int4-experts": 68.8, "int4": 60.4}),
        (MAVERICK, {"bf16": 748.0, "fp8": 379.7, "int4-experts": 213.6, "int4": 201.1}),
    ],
)
def test_sizes_of_recipes(g: Geometry, sizes: dict[str, float]) -> None:
    found = recipe_bytes(g)
    for name, gib in sizes.items():
        assert found[name] / GIB == pytest.approx(gib, rel=0.001)


def test_the_table_of_gpus() -> None:
    assert find_gpu("H100-80GB").nbytes / GIB == pytest.approx(79.6, abs=0.1)
    for key, gpu in gpus().items():
        boxed = int(key.rsplit("-", 1)[1].removesuffix("gb"))
        assert 0.9 * boxed * 1e9 < gpu.nbytes <= boxed * GIB


@pytest.mark.parametrize(
    ("name", "hint"),
    [("h100", "h100-80gb"), ("h100-80", "h100-80gb"), ("rtx-4090-24gb", "rtx4090-24gb"), ("tpu", "one of")],
)
def test_an_unknown_gpu_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        verdict(60.4, INT4, gpu=name)


def test_what_cannot_be_asked() -> None:
    with pytest.raises(UsageError, match="GPUs"):
        verdict(60.4, INT4, n_gpus=0)
    with pytest.raises(UsageError, match="context"):
        verdict(60.4, INT4, context=0)
    with pytest.raises(ValueError, match="format"):
        verdict(60.4, "gptq")


def test_gpus_without_fp8_units_say_so() -> None:
    assert "no FP8 units" in runtime(verdict(106.8, FP8, gpu="a100-80gb", n_gpus=2), "vllm")["note"]
    assert "no FP8 units" not in runtime(verdict(106.8, FP8, n_gpus=2), "vllm")["note"]


def test_the_summary_says_what_the_verdict_says() -> None:
    no, yes = fit_summary(verdict(106.8, FP8, context=131072)), fit_summary(verdict(60.4, INT4, context=131072))
    assert no.startswith("fit      no: h100-80gb")
    assert "fits instead" in no
    assert "recipe int4" in no
    assert "fits instead" not in yes
    assert "228,816 tokens" in yes
    assert "$ VLLM_" in yes
    assert all(name in yes for name in RUNTIMES)
