"""What a runtime makes of a case: the verdict, what there is to say about it, and the command that serves."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from typing import Any

from llama4_convert.fitting.gpus import allowances
from llama4_convert.fitting.memory import chunked_layers
from llama4_convert.fitting.runtimes import (
    SGLANG_PIECE,
    Case,
    Runtime,
    batch,
    has_fp8_kv,
    holds_chunks,
    largest_context,
    memory,
    refusal,
    transformers_piece,
    vllm_piece,
)
from llama4_convert.formatting import gib


def verdict(case: Case, runtime: Runtime) -> dict[str, Any]:
    """Whether and how `runtime` serves the case; of `memory`, the bytes are one GPU's, at the context of `command`."""
    refused = refusal(case, runtime)
    if refused:
        return {
            "runtime": runtime,
            "fits": False,
            "max_context": 0,
            "max_context_fp8_kv": None,
            "command": "",
            "note": refused,
            "memory": None,
        }
    of, notes = memory(case, runtime), []
    largest = largest_context(case, of)
    fits = largest >= case.needed
    room = case.usable - of.activations - of.weights
    if runtime == "transformers" and case.format is not None and case.format.startswith("compressed-tensors"):
        notes.append("decompresses to bf16 at the first forward: this format saves disk here, not memory")
        if case.format == "compressed-tensors-fp8" and case.gpu.fp8:
            notes.append(
                "CompressedTensorsConfig(use_optimized_inference=True) may keep FP8, which is not counted on here"
            )
    if room <= 0:
        each = "" if case.n_gpus == 1 else " on each GPU"
        limit = case.usable - of.activations
        notes.insert(0, f"weights need {gib(of.weights)}{each}, there are {gib(limit)}")
    elif not fits and case.needed > case.max_context:
        notes.append(f"the model itself ends at {case.max_context:,} tokens")
    elif not fits:
        many = f"{case.sequences} x " if case.sequences > 1 else ""
        notes.append(f"{many}{case.needed:,} tokens are more than the {gib(room)} left for the KV cache hold")
    if largest:
        notes += _serving_notes(case, runtime)
    served = case.context if fits and case.context is not None else largest
    return {
        "runtime": runtime,
        "fits": fits,
        "max_context": largest,
        "max_context_fp8_kv": _with_fp8_kv(case, runtime, largest),
        "command": command(case, runtime, served) if largest else "",
        "note": "; ".join(notes),
        "memory": {
            "weights": of.weights,
            "kv_cache": of.cache.nbytes(served, case.sequences),
            "activations": of.activation_bytes(served),
            "context_overhead": allowances().overhead,
        },
    }


def _with_fp8_kv(case: Case, runtime: Runtime, largest: int) -> int | None:
    """The largest context with an FP8 KV cache; None where there is none."""
    other = replace(case, fp8_kv=True)
    if not has_fp8_kv(other, runtime):
        return None
    return largest if case.fp8_kv else largest_context(other, memory(other, runtime))


def _serving_notes(case: Case, runtime: Runtime) -> list[str]:
    notes = []
    if case.format == "compressed-tensors-fp8" and not case.gpu.fp8 and runtime != "transformers":
        notes.append("this GPU has no FP8 units: weights are widened as they are used")
    if case.gpu.maker == "amd":
        if _has_int4(case) and runtime == "sglang":
            notes.append("whether its ROCm kernels take int4 experts is not known here")
        elif case.format == "bitsandbytes-nf4":
            notes.append("asks for a bitsandbytes that is built for ROCm")
    if chunked_layers(case.geometry):
        if runtime == "vllm":
            notes.append("hybrid KV cache: chunked layers hold one chunk")
        elif runtime == "vllm-no-hybrid-cache":
            notes.append("every layer holds every token")
        elif runtime == "sglang":
            hybrid = holds_chunks(case.geometry, runtime)
            piece = f"chunked layers hold one chunk and {SGLANG_PIECE:,} tokens"
            notes.append(piece if hybrid else "every layer holds every token")
    if case.fp8_kv:
        if has_fp8_kv(case, runtime):
            notes.append("FP8 KV cache without calibrated scales: validate it")
        else:
            notes.append(
                "the KV cache stays bf16" + ("" if runtime == "transformers" else ": this GPU has no FP8 units")
            )
    if runtime == "transformers":
        piece = f"{transformers_piece(case.geometry, case.sequences)}"
        notes.append(f"call generate with prefill_chunk_size={piece}: it runs every expert on every token")
    return notes


def command(case: Case, runtime: Runtime, context: int) -> str:
    """One line for a shell that serves `context` tokens; of Transformers, one that loads the model."""
    where, n, gpu = shlex.quote(case.directory), case.n_gpus, case.gpu
    if runtime == "transformers":
        name = "AutoModelForCausalLM" if case.geometry.vision is None else "AutoModelForImageTextToText"
        device = "cuda" if n == 1 else "auto"
        load = f'm = {name}.from_pretrained({json.dumps(case.directory)}, dtype="auto", device_map="{device}")'
        return f"python -i -c {shlex.quote(f'from transformers import {name}; {load}')}"
    if runtime == "sglang":
        of = memory(case, runtime)
        parts = [f"python -m sglang.launch_server --model-path {where} --context-length {context}"]
        # A share of what is free before weights are loaded. Rounded down: no more may be taken than was counted.
        free = gpu.nbytes - allowances().context
        parts.append(f"--mem-fraction-static {_floor3((case.usable - of.activations) / free)}")
        parts.append(f"--chunked-prefill-size {SGLANG_PIECE} --max-running-requests {batch(case)}")
        if of.cache.chunked_layers:
            chunked = case.sequences * min(context, of.cache.chunk) + min(
                SGLANG_PIECE, max(0, context - of.cache.chunk)
            )
            ratio = math.ceil(chunked / (case.sequences * context) * 1e4) / 1e4
            parts.append(f"--swa-full-tokens-ratio {min(1.0, ratio):g}")
        if _has_int4_experts(case):
            parts.append("--moe-runner-backend triton")
        if has_fp8_kv(case, runtime):
            parts.append("--kv-cache-dtype fp8_e4m3")
        return " ".join([*parts, *([f"--tp {n}"] if n > 1 else [])])
    parts = [f"vllm serve {where} --max-model-len {context}"]
    if n > 1:
        parts.append(f"--tensor-parallel-size {n}")
    parts.append(f"--gpu-memory-utilization {_floor3(case.usable / gpu.nbytes)}")
    parts.append(f"--max-num-batched-tokens {vllm_piece(case)}")
    parts.append(f"--max-num-seqs {batch(case)}")
    if _has_int4_experts(case):
        parts.append("--moe-backend triton")
    if has_fp8_kv(case, runtime):
        parts.append("--kv-cache-dtype fp8")
    if runtime == "vllm-no-hybrid-cache":
        parts.append("--disable-hybrid-kv-cache-manager")
    elif holds_chunks(case.geometry, runtime):
        # Off by default for chunked attention in some versions.
        parts.insert(0, "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE=1")
    return " ".join(parts)


def _has_int4(case: Case) -> bool:
    return case.format in ("compressed-tensors-int4", "compressed-tensors-mixed")


def _has_int4_experts(case: Case) -> bool:
    """Whether a command must name Triton's kernels: others apply the router's score elsewhere than on an expert's input."""
    return _has_int4(case) and bool(case.geometry.moe_layers)


def _floor3(fraction: float) -> str:
    return f"{math.floor(fraction * 1000) / 1000:g}"
