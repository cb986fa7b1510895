"""The verdicts on GPUs: the contexts known for Scout and Maverick, what each runtime loads, and what is named instead of a no."""

from __future__ import annotations

import ast
import itertools
import shlex
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from llama4.geometry import Geometry
from llama4_convert.errors import UsageError
from llama4_convert.fitting.deployment import Deployment, MemoryUse, memory_use
from llama4_convert.fitting.gpus import allowances, find_gpu, gpus
from llama4_convert.fitting.judge import judge
from llama4_convert.fitting.memory import Weights, kv_bytes, prefill_bytes
from llama4_convert.fitting.results import FitVerdict, RuntimeVerdict
from llama4_convert.fitting.runtimes import runtimes
from llama4_convert.fitting.table import fit_summary
from tests.support.geometries import GUARD, MAVERICK, SCOUT

GIB = 1 << 30
RUNTIMES = ("vllm", "vllm-no-hybrid-cache", "sglang", "transformers")
INT4, FP8, MIXED, NF4 = (
    "compressed-tensors-int4",
    "compressed-tensors-fp8",
    "compressed-tensors-mixed",
    "bitsandbytes-nf4",
)


def case(gib: float, format: str | None, g: Geometry = SCOUT, gpu: str = "h100-80gb", **options: Any) -> Deployment:
    """Weights of `gib` in all, which tensor parallelism splits evenly."""
    longest = {"max_context": 10_485_760}
    return Deployment(g, Weights(other=int(gib * GIB)), format, find_gpu(gpu), **{**longest, **options})


def verdict(gib: float, format: str | None, g: Geometry = SCOUT, **options: Any) -> FitVerdict:
    return judge(case(gib, format, g, **options))


def runtime(result: FitVerdict, name: str) -> RuntimeVerdict:
    found = [r for r in result.runtimes if r.runtime == name]
    assert len(found) == 1
    return found[0]


def memory(asked: Deployment, name: str) -> MemoryUse:
    return memory_use(asked, next(r for r in runtimes() if r.name == name))


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
    assert vllm.max_context == pytest.approx(thousands * 1000, rel=0.03)
    assert vllm.fits == (thousands > 0)
    assert vllm.max_context % 16 == 0


def test_nf4_is_for_transformers_alone() -> None:
    result = verdict(68.8, NF4)
    assert [r.runtime for r in result.runtimes if r.fits] == ["transformers"]
    assert runtime(result, "transformers").max_context == pytest.approx(46_000, rel=0.03)
    assert runtime(result, "vllm").command == ""
    assert "recipe int4" in runtime(result, "vllm").note


@pytest.mark.parametrize(
    ("gib", "format"), [(748.0, None), (388.1, FP8), (213.6, INT4), (201.1, INT4), (213.7, NF4), (196.9, INT4)]
)
def test_maverick_never_fits_one_h100(gib: float, format: str | None) -> None:
    result = verdict(gib, format, MAVERICK)
    assert not result.fits
    assert result.best_recipe is None
    assert all(r.max_context == 0 and r.command == "" and r.note for r in result.runtimes)


def test_kv_bytes_are_four_kib_a_token_a_layer() -> None:
    result = verdict(60.4, INT4)
    assert result.kv_bytes_per_token_per_layer == 4096
    assert result.kv_bytes_per_token == 48 * 1024
    assert result.kv_bytes_of_chunked_layers == 1.125 * GIB
    assert result.weights == int(60.4 * GIB)
    assert result.context_overhead == (81559 - 74 * 1024) * (1 << 20)
    assert result.activations == 2 * GIB
    parts = ("weights", "kv_cache", "activations", "context_overhead")
    assert sum(getattr(result, part) for part in parts) == result.gpu_bytes


def test_a_cache_that_ignores_chunks_holds_less() -> None:
    result = verdict(60.4, INT4)
    without = runtime(result, "vllm-no-hybrid-cache").max_context
    assert without == pytest.approx(11.6 * GIB / (48 * 4096), abs=16)
    assert without < runtime(result, "sglang").max_context < runtime(result, "vllm").max_context


@settings(max_examples=60)
@given(st.floats(1, 71.9), st.sampled_from(RUNTIMES[:3]))
def test_the_largest_context_fills_the_room_and_no_more(gib: float, name: str) -> None:
    result = verdict(gib, INT4)
    room, tokens = result.kv_cache, runtime(result, name).max_context
    held = {"vllm": 8192, "vllm-no-hybrid-cache": None, "sglang": 16384}[name]

    def needed(n: int) -> int:
        return 4096 * (12 * n + 36 * (n if held is None else min(n, held)))

    assert needed(tokens) <= room < needed(tokens + 16)


def test_transformers_decompresses_compressed_tensors() -> None:
    for gib, format in [(60.4, INT4), (106.8, FP8), (63.1, MIXED)]:
        for gpu in ("h100-80gb", "h200-141gb"):
            there = runtime(verdict(gib, format, gpu=gpu), "transformers")
            assert not there.fits
            assert "202.4 GiB" in there.note
            assert "decompresses" in there.note
    assert runtime(verdict(60.4, INT4, n_gpus=4), "transformers").fits


def test_mixed_is_not_for_sglang() -> None:
    result = verdict(63.1, MIXED)
    assert runtime(result, "vllm").fits
    assert not runtime(result, "sglang").fits


def test_fp8_scout_on_one_h100_is_a_clear_no_with_ways_out() -> None:
    result = verdict(106.8, FP8, context=131072)
    assert not result.fits
    assert not any(r.fits for r in result.runtimes)
    assert runtime(result, "vllm").note == "weights need 106.8 GiB, there are 72.0 GiB"
    assert result.best_recipe == "int4"
    assert "h100-80gb with recipe int4 (228," in result.advice
    assert "2 x h100-80gb" in result.advice
    assert "h200-141gb" in result.advice
    # The experts alone in int4 leave 46 k, which is not what was asked.
    assert "int4-experts" not in result.advice
    assert "int4-experts" in verdict(106.8, FP8).advice
    for way in ({"n_gpus": 2}, {"gpu": "h200-141gb"}):
        assert runtime(verdict(106.8, FP8, context=131072, **way), "vllm").fits


def test_a_context_that_is_asked_is_judged_and_served() -> None:
    yes, no = verdict(60.4, INT4, context=131072), verdict(60.4, INT4, context=262144)
    assert runtime(yes, "vllm").fits
    assert not runtime(yes, "vllm-no-hybrid-cache").fits
    assert "--max-model-len 131072 " in runtime(yes, "vllm").command
    assert not no.fits
    assert no.advice
    # What does not hold what was asked is served with what it holds.
    assert f"--max-model-len {runtime(no, 'vllm').max_context} " in runtime(no, "vllm").command


def test_no_context_beyond_the_models_own() -> None:
    assert runtime(verdict(60.4, INT4, max_context=131072), "vllm").max_context == 131072
    beyond = verdict(60.4, INT4, max_context=131072, context=131073)
    assert not beyond.fits
    assert "131,072" in beyond.advice
    assert "the model itself ends" in runtime(beyond, "vllm").note
    # A model that ends below the least context that is asked of others.
    assert verdict(22.4, None, GUARD, gpu="l40s-48gb", max_context=4096).fits


def test_gpus_share_weights_and_kv_heads() -> None:
    one, two, eight = (verdict(60.4, INT4, n_gpus=n) for n in (1, 2, 8))
    assert [r.kv_bytes_per_token_per_layer for r in (one, two, eight)] == [4096, 2048, 512]
    assert [r.weights for r in (one, two, eight)] == [-(-int(60.4 * GIB) // n) for n in (1, 2, 8)]
    assert "--tensor-parallel-size 2" in runtime(two, "vllm").command
    assert runtime(two, "sglang").command.endswith("--tp 2")
    assert "parallel" not in runtime(one, "vllm").command
    assert 'device_map="auto"' in runtime(verdict(68.8, NF4, n_gpus=2), "transformers").command


def test_kv_heads_are_repeated_on_more_gpus_than_heads() -> None:
    few = replace(SCOUT, n_kv_heads=4)
    four, eight = (verdict(60.4, INT4, few, n_gpus=n) for n in (4, 8))
    assert four.kv_bytes_per_token_per_layer == eight.kv_bytes_per_token_per_layer == 512
    assert runtime(eight, "vllm").fits


def test_the_best_recipe_is_the_one_of_least_error_that_reaches_the_context() -> None:
    def best(**options: Any) -> str | None:
        found: str | None = verdict(60.4, INT4, **options).best_recipe
        return found

    assert best() == "int4"  # a good context where none is asked: int4-experts fits, but with 46 k
    assert best(context=32768) == "int4-experts"
    assert best(context=262144) is None
    assert best(gpu="h200-141gb") == "fp8"
    assert best(n_gpus=4) == "bf16"


def test_transformers_takes_prompts_in_pieces_that_its_experts_can_hold() -> None:
    for g, tokens in ((SCOUT, 512), (MAVERICK, 64), (GUARD, 4096)):
        result = verdict(14.0, NF4, g)
        assert f"prefill_chunk_size={tokens}:" in runtime(result, "transformers").note


def test_heads_that_gpus_cannot_share() -> None:
    result = verdict(60.4, INT4, n_gpus=3)
    assert "40 heads" in runtime(result, "vllm").note
    assert not runtime(result, "vllm").fits
    assert verdict(68.8, NF4, n_gpus=3).fits  # Transformers shares out layers


def test_commands() -> None:
    result = verdict(60.4, INT4, context=131072, directory="my scout")
    assert runtime(result, "vllm").command == (
        "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE=1 vllm serve 'my scout' --max-model-len 131072"
        " --gpu-memory-utilization 0.929 --max-num-batched-tokens 2048 --max-num-seqs 16 --moe-backend triton"
    )
    # 16,384 of 131,072 tokens in chunked layers, and the share of the GPU that weights and cache may take.
    assert runtime(result, "sglang").command == (
        "python -m sglang.launch_server --model-path 'my scout' --context-length 131072 --mem-fraction-static 0.915"
        " --chunked-prefill-size 8192 --max-running-requests 16 --swa-full-tokens-ratio 0.125"
        " --moe-runner-backend triton"
    )
    without = runtime(verdict(60.4, INT4, context=8192), "vllm-no-hybrid-cache").command
    assert without.startswith("vllm serve DIR --max-model-len 8192 ")
    assert without.endswith("--disable-hybrid-kv-cache-manager")
    load = runtime(verdict(68.8, NF4, directory="my scout"), "transformers").command
    assert 'AutoModelForImageTextToText.from_pretrained("my scout"' in load


@pytest.mark.parametrize(
    ("format", "g", "is_named"),
    [(INT4, SCOUT, True), (MIXED, SCOUT, True), (INT4, GUARD, False), (FP8, SCOUT, False), (None, SCOUT, False)],
    ids=["int4", "mixed", "no-experts", "fp8", "bf16"],
)
def test_commands_name_tritons_kernels_for_int4_experts(format: str | None, g: Geometry, is_named: bool) -> None:
    result = verdict(20, format, g, max_context=8192)
    for name in ("vllm", "vllm-no-hybrid-cache"):
        assert ("--moe-backend triton" in runtime(result, name).command) == is_named
    if format != MIXED:  # which SGLang does not load
        assert ("--moe-runner-backend triton" in runtime(result, "sglang").command) == is_named
    assert "triton" not in runtime(result, "transformers").command


def test_text_only_and_dense_models() -> None:
    text = replace(SCOUT, vision=None)
    result = verdict(60.4, INT4, text)
    # SGLang passes over the experts of the architecture without vision: what it would serve is another model.
    assert not runtime(result, "sglang").fits
    assert "drops the routed experts" in runtime(result, "sglang").note
    assert runtime(result, "sglang").command == ""
    # It knows the chunked layers of the architecture with vision, a full layer in four, only.
    odd = verdict(60.4, INT4, replace(SCOUT, nope_interval=3))
    assert "every layer holds every token" in runtime(odd, "sglang").note
    guard = verdict(22.4, None, GUARD, max_context=8192)
    assert guard.best_recipe == "bf16"
    assert all(r.fits for r in guard.runtimes)
    assert guard.kv_bytes_of_chunked_layers == 0
    dense = verdict(22.4, None, replace(GUARD, vision=None))
    assert "AutoModelForCausalLM" in runtime(dense, "transformers").command
    assert runtime(dense, "sglang").fits


def test_what_cannot_be_asked() -> None:
    with pytest.raises(UsageError, match="GPUs"):
        verdict(60.4, INT4, n_gpus=0)
    with pytest.raises(UsageError, match="context"):
        verdict(60.4, INT4, context=0)
    with pytest.raises(ValueError, match="format"):
        verdict(60.4, "gptq")


def test_gpus_without_fp8_units_say_so() -> None:
    assert "no FP8 units" in runtime(verdict(106.8, FP8, gpu="a100-80gb", n_gpus=2), "vllm").note
    assert "no FP8 units" not in runtime(verdict(106.8, FP8, n_gpus=2), "vllm").note


def test_the_summary_says_what_the_verdict_says() -> None:
    no, yes = fit_summary(verdict(106.8, FP8, context=131072)), fit_summary(verdict(60.4, INT4, context=131072))
    assert no.startswith("fit      no: h100-80gb")
    assert "fits instead" in no
    assert "recipe int4" in no
    assert "fits instead" not in yes
    assert "228,816 tokens" in yes
    assert "$ VLLM_" in yes
    assert all(name in yes for name in RUNTIMES)


# -------------------- what is held against the runtimes' own rules


@pytest.mark.parametrize(
    "g", [SCOUT, MAVERICK, replace(SCOUT, n_layers=7, nope_interval=3), replace(SCOUT, n_layers=192)]
)
@pytest.mark.parametrize("sequences", [1, 4])
def test_vllm_finds_room_for_what_it_is_told_to_serve(g: Geometry, sequences: int) -> None:
    """At its start vLLM asks for a chunk and two pieces of prompts in chunked layers, and for all tokens in the others."""
    asked = case(40, INT4, g, sequences=sequences)
    tokens = runtime(judge(asked), "vllm").max_context
    chunked = sum(g.is_chunked(layer) for layer in range(g.n_layers))
    of = kv_bytes(g) * ((g.n_layers - chunked) * tokens + chunked * min(tokens, 8192 + 2 * 2048))
    assert of <= asked.usable_bytes - int(40 * GIB) - prefill_bytes(g, 2048, 16, 1)


def test_sequences_share_what_is_left() -> None:
    one, four = verdict(60.4, INT4), verdict(60.4, INT4, sequences=4)
    # Four chunks instead of one, and a quarter of the rest: 11.6 GiB are 4 x (1.125 GiB + 48 KiB a token).
    assert runtime(four, "vllm").max_context == pytest.approx((11.6 / 4 - 1.125) * GIB / 49152, abs=32)
    assert runtime(four, "vllm").max_context < runtime(one, "vllm").max_context / 4
    assert "--max-num-seqs 16" in runtime(four, "vllm").command
    assert "--max-num-seqs 32" in runtime(verdict(50, INT4, sequences=32, context=2048), "vllm").command
    assert "--max-running-requests 32" in runtime(verdict(50, INT4, sequences=32, context=2048), "sglang").command
    with pytest.raises(UsageError, match="sequences"):
        verdict(60.4, INT4, sequences=0)


def test_an_fp8_cache_holds_twice_as_much_where_there_is_one() -> None:
    bf16, fp8 = verdict(60.4, INT4), verdict(60.4, INT4, fp8_kv=True)
    # Chunks are half as large as well: (11.6 - 0.5625) GiB / 24 KiB.
    assert runtime(fp8, "vllm").max_context == pytest.approx((11.6 - 0.5625) * GIB / 24576, abs=32)
    assert runtime(bf16, "vllm").max_context_fp8_kv == runtime(fp8, "vllm").max_context
    assert "--kv-cache-dtype fp8 " in runtime(fp8, "vllm").command + " "
    assert "--kv-cache-dtype fp8_e4m3" in runtime(fp8, "sglang").command
    assert "kv-cache-dtype" not in runtime(bf16, "vllm").command
    there = runtime(verdict(50, NF4, fp8_kv=True), "transformers")
    assert there.max_context_fp8_kv is None
    assert "stays bf16" in there.note
    a100 = verdict(60.4, INT4, gpu="a100-80gb")
    assert runtime(a100, "vllm").max_context_fp8_kv is None
    assert (
        runtime(verdict(60.4, INT4, gpu="a100-80gb", fp8_kv=True), "vllm").max_context
        == runtime(a100, "vllm").max_context
    )
    # A context that only such a cache holds.
    assert "h100-80gb with --kv-cache-dtype fp8" in verdict(60.4, INT4, context=300_000).advice


def test_transformers_repeats_keys_and_values_for_every_head() -> None:
    """48 KiB a token in the cache and 20 KiB (40 heads x 128 x 2 x 2 bytes) in one layer at a time, where a piece has a mask."""
    of = memory(case(60.4, NF4), "transformers")
    tokens = runtime(verdict(60.4, NF4), "transformers").max_context
    piece = 512 * 16 * 3 * (5120 + 8192) * 2  # every expert on every token
    assert of.activations(tokens) == piece + 20 * 1024 * tokens
    assert int(60.4 * GIB) + 1.125 * GIB + 48 * 1024 * tokens + piece + 20 * 1024 * tokens <= 74 * GIB
    assert of.activations(16) == 2 * GIB


# -------------------- tensor parallelism


@pytest.mark.parametrize(
    ("changes", "format", "options", "reason"),
    [
        ({}, None, {"n_gpus": 3}, "40 heads"),
        ({"n_kv_heads": 5}, None, {"n_gpus": 4}, "5 KV heads"),
        ({"expert_dim": 8196}, None, {"n_gpus": 8}, "8,196"),
        ({"expert_dim": 1280}, INT4, {"n_gpus": 8, "group": 128}, "int4 groups of 128 do not divide the 160"),
        ({"expert_dim": 1280}, FP8, {"n_gpus": 8, "group": 128}, "FP8 blocks of 128 do not divide the 160"),
    ],
)
def test_what_gpus_cannot_split(changes: dict[str, Any], format: str | None, options: Any, reason: str) -> None:
    g = replace(SCOUT, **changes)
    result = verdict(20, format, g, **options)
    for name in RUNTIMES[:3]:
        assert reason in runtime(result, name).note
        assert runtime(result, name).command == ""
        assert not runtime(result, name).fits
    # One GPU splits nothing.
    assert runtime(verdict(20, format, g, **{**options, "n_gpus": 1}), "vllm").fits


def test_what_gpus_can_split() -> None:
    narrow = replace(SCOUT, expert_dim=1280)
    assert runtime(verdict(20, None, narrow, n_gpus=8), "vllm").fits
    assert runtime(verdict(20, FP8, narrow, n_gpus=8), "vllm").fits  # a scale a row
    assert runtime(verdict(20, INT4, narrow, n_gpus=8, group=32), "vllm").fits
    tower = replace(SCOUT, vision=replace(SCOUT.vision, n_heads=6)) if SCOUT.vision else SCOUT
    assert "vision tower" in runtime(verdict(20, None, tower, n_gpus=4), "vllm").note


def test_replicated_weights_are_on_every_gpu() -> None:
    g = replace(SCOUT, n_kv_heads=2)
    asked = Deployment(
        g, Weights(keys_values=4 * GIB, replicated=GIB, other=64 * GIB), None, find_gpu("h100-80gb"), n_gpus=8
    )
    assert judge(asked).weights == (64 // 8 + 4 // 2 + 1) * GIB


# -------------------- properties

SIZES = st.floats(1, 160)
NAMES = st.sampled_from(sorted(gpus()))
FORMAT = st.sampled_from([None, INT4, FP8, MIXED, NF4])
MODELS = st.sampled_from(
    [SCOUT, MAVERICK, GUARD, replace(SCOUT, vision=None), replace(SCOUT, n_layers=5, nope_interval=3)]
)


@settings(max_examples=40, deadline=None)
@given(SIZES, FORMAT, MODELS, NAMES, st.integers(1, 2_000_000), st.integers(1, 500_000))
def test_more_context_never_fits_better(
    gib: float, format: str | None, g: Geometry, gpu: str, context: int, more: int
) -> None:
    less, much = (verdict(gib, format, g, gpu=gpu, context=n) for n in (context, context + more))
    for a, b in zip(less.runtimes, much.runtimes, strict=True):
        assert a.fits or not b.fits
        assert a.max_context == b.max_context
        assert a.fits == (a.max_context >= context)


@settings(max_examples=40, deadline=None)
@given(SIZES, FORMAT, MODELS, NAMES, st.sampled_from([(1, 2), (2, 4), (4, 8), (1, 8)]))
def test_more_gpus_never_hold_less(
    gib: float, format: str | None, g: Geometry, gpu: str, counts: tuple[int, int]
) -> None:
    few, many = (verdict(gib, format, g, gpu=gpu, n_gpus=n) for n in counts)
    for a, b in zip(few.runtimes, many.runtimes, strict=True):
        assert a.max_context <= b.max_context


@settings(max_examples=40, deadline=None)
@given(SIZES, FORMAT, MODELS, NAMES, st.integers(1, 8), st.booleans())
def test_what_is_served_fits_and_sixteen_tokens_more_do_not(
    gib: float, format: str | None, g: Geometry, gpu: str, sequences: int, fp8_kv: bool
) -> None:
    asked = case(gib, format, g, gpu, sequences=sequences, fp8_kv=fp8_kv)
    for r in judge(asked).runtimes:
        if r.memory is not None and r.max_context:
            assert sum(structs.astuple(r.memory)) <= asked.gpu.nbytes
            of = memory(asked, r.runtime)
            assert r.max_context == asked.max_context or of.nbytes(r.max_context + 16, sequences) > asked.usable_bytes


@settings(max_examples=40, deadline=None)
@given(SIZES, FORMAT, MODELS, NAMES, st.sampled_from([1, 2, 4, 8]), st.none() | st.integers(16, 10**6))
def test_every_command_is_a_command(
    gib: float, format: str | None, g: Geometry, gpu: str, n: int, context: int | None
) -> None:
    result = verdict(gib, format, g, gpu=gpu, n_gpus=n, context=context, directory="it's a model")
    for r in result.runtimes:
        if not r.command:
            assert r.max_context == 0
            continue
        words = shlex.split(r.command)
        flags = dict(itertools.pairwise(words))
        served = str(context if r.fits and context is not None else r.max_context)
        if r.runtime == "transformers":
            assert words[:3] == ["python", "-i", "-c"]
            call = ast.parse(words[3]).body[-1]
            assert isinstance(call, ast.Assign)
            assert isinstance(call.value, ast.Call)
            assert ast.literal_eval(call.value.args[0]) == "it's a model"
        elif r.runtime == "sglang":
            assert words[:5] == ["python", "-m", "sglang.launch_server", "--model-path", "it's a model"]
            assert flags["--context-length"] == served
            assert flags.get("--tp") == (str(n) if n > 1 else None)
            assert 0 < float(flags["--mem-fraction-static"]) < 1
            assert 0 < float(flags.get("--swa-full-tokens-ratio", "1")) <= 1
        else:
            words = [word for word in words if not word.startswith("VLLM_")]
            assert words[:3] == ["vllm", "serve", "it's a model"]
            assert flags["--max-model-len"] == served
            assert flags.get("--tensor-parallel-size") == (str(n) if n > 1 else None)
            assert ("--disable-hybrid-kv-cache-manager" in words) == (r.runtime == "vllm-no-hybrid-cache")
            assert (
                float(flags["--gpu-memory-utilization"]) * find_gpu(gpu).nbytes
                <= find_gpu(gpu).nbytes - allowances().overhead.nbytes
            )
