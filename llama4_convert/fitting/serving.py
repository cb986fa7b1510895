"""The command that serves a deployment in a runtime, and the notes beside it: the texts of runtimes.toml, filled in."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping

from llama4_convert.fitting.deployment import (
    Deployment,
    has_fp8_kv,
    keeps_chunks,
    memory_use,
    prefill_tokens,
    requests,
)
from llama4_convert.fitting.gpus import allowances
from llama4_convert.fitting.memory import layer_counts
from llama4_convert.fitting.runtimes import Fact, Phrase, Runtime
from llama4_convert.formatting import gib


def command(deployment: Deployment, runtime: Runtime, context: int) -> str:
    """One line for a shell that serves `context` tokens, or loads the model."""
    values = placeholders(deployment, runtime, context)
    return " ".join(_filled_in(runtime.command, facts(deployment, runtime), values))


def notes(deployment: Deployment, runtime: Runtime, largest: int) -> list[str]:
    """What a user must know, where sequences of `largest` tokens have room; first why that is too few, if it is."""
    use = memory_use(deployment, runtime)
    needed, limit = deployment.needed_context, deployment.usable_bytes - use.activations()
    found = [*_notes_on_loading(deployment, runtime)]
    if use.weights >= limit:
        each = "" if deployment.n_gpus == 1 else " on each GPU"
        found.insert(0, f"weights need {gib(use.weights)}{each}, there are {gib(limit)}")
    elif largest < needed and needed > deployment.max_context:
        found.append(f"the model itself ends at {deployment.max_context:,} tokens")
    elif largest < needed:
        many = f"{deployment.sequences} x " if deployment.sequences > 1 else ""
        room = gib(limit - use.weights)
        found.append(f"{many}{needed:,} tokens are more than the {room} left for the KV cache hold")
    return [*found, *_notes_on_serving(deployment, runtime, largest)] if largest else found


def _notes_on_loading(deployment: Deployment, runtime: Runtime) -> Iterator[str]:
    if deployment.format in runtime.decompresses:
        yield "decompresses to bf16 at the first forward: this format saves disk here, not memory"
    yield from _filled_in(runtime.loading_notes, facts(deployment, runtime), {})


def _notes_on_serving(deployment: Deployment, runtime: Runtime, context: int) -> Iterator[str]:
    true, values = facts(deployment, runtime), placeholders(deployment, runtime, context)
    if deployment.format in runtime.loads and "FP8" in true and "FP8 units" not in true:
        yield "this GPU has no FP8 units: weights are widened as they are used"
    yield from _filled_in(runtime.notes, true, values)
    _, chunked = layer_counts(deployment.geometry)
    if chunked and "keeps chunks" not in true:
        yield "every layer holds every token"
    if "FP8 KV cache" in true:
        yield "FP8 KV cache without calibrated scales: validate it"
    elif deployment.fp8_kv:
        yield "the KV cache stays bf16" + (": this GPU has no FP8 units" if "fp8" in runtime.kv_dtypes else "")
    if runtime.usage:
        yield runtime.usage.format_map(values)


def facts(deployment: Deployment, runtime: Runtime) -> set[Fact]:
    """The facts that hold for the deployment in the runtime."""
    format = deployment.format
    every: dict[Fact, bool] = {
        "several GPUs": deployment.n_gpus > 1,
        "AMD": deployment.gpu.maker == "amd",
        "FP8 units": deployment.gpu.fp8,
        "experts": bool(deployment.geometry.moe_layers),
        "int4": format in ("compressed-tensors-int4", "compressed-tensors-mixed"),
        "FP8": format == "compressed-tensors-fp8",
        "NF4": format == "bitsandbytes-nf4",
        "FP8 KV cache": has_fp8_kv(deployment, runtime),
        "keeps chunks": keeps_chunks(deployment.geometry, runtime),
    }
    return {fact for fact, is_true in every.items() if is_true}


def placeholders(deployment: Deployment, runtime: Runtime, context: int) -> dict[str, int | str]:
    """What texts of runtimes.toml may name in braces, and the value of each for serving `context` tokens."""
    use = memory_use(deployment, runtime)
    usable, memory = deployment.usable_bytes, deployment.gpu.nbytes
    has_vision = deployment.geometry.vision is not None
    values: dict[str, int | str] = {
        "directory": shlex.quote(deployment.directory),
        "directory_literal": json.dumps(deployment.directory),  # of Python
        "context": context,
        "gpus": deployment.n_gpus,
        "requests": requests(deployment, runtime),
        "prefill_tokens": prefill_tokens(deployment, runtime),
        # What the runtime may take, rounded down: no more than was counted.
        "share_of_gpu": _rounded_down(usable / memory),
        # Weights and KV cache as a share of what is free before weights are loaded.
        "share_of_free": _rounded_down((usable - use.activations()) / (memory - allowances().context.nbytes)),
        # Tokens that chunked layers keep, as a share of those that full ones keep; rounded up.
        "chunked_share": f"{min(1.0, math.ceil(use.cache.chunked_share(context, deployment.sequences) * 1e4) / 1e4):g}",
        "model_class": "AutoModelForImageTextToText" if has_vision else "AutoModelForCausalLM",
        "device_map": "cuda" if deployment.n_gpus == 1 else "auto",
    }
    return {**values, "script": shlex.quote(runtime.script.format_map(values))}


def _filled_in(phrases: Iterable[Phrase], true: set[Fact], values: Mapping[str, int | str]) -> list[str]:
    return [phrase.text.format_map(values) for phrase in phrases if true.issuperset(phrase.when)]


def _rounded_down(share: float) -> str:
    return f"{math.floor(share * 1000) / 1000:g}"
