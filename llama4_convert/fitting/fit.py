"""`fit`: whether GPUs hold a checkpoint in each runtime, with how much context, by which command; and if not, what would fit."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama4.config import Llama4Config, check_runnable
from llama4.config_fields import ConfigError
from llama4_convert.checkpoints import is_meta
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.tensors import StoredTensor
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.fitting.gpus import Gpu, find_gpu, gpus
from llama4_convert.fitting.judging import judge, recipe_cases
from llama4_convert.fitting.memory import Weights
from llama4_convert.fitting.runtimes import Case
from llama4_convert.formatting import gib

DEFAULT_GPU = "h100-80gb"


def fit(
    path: str | os.PathLike[str],
    *,
    gpu: str = DEFAULT_GPU,
    gpus: int = 1,
    context: int | None = None,
    sequences: int = 1,
    kv_cache_dtype: str = "bf16",
) -> dict[str, Any]:
    """Whether `gpus` GPUs of a kind hold the checkpoint at `path` in each runtime. Reads headers only.

    `path` is a finished directory in Transformers' layout, in bf16 or quantized with compressed-tensors or bitsandbytes; or
    Meta's, of which every built-in recipe is tried. `gpu` is a key of gpus.toml, or "all". `context` None asks for 8,192
    tokens. `kv_cache_dtype` is "bf16" or "fp8".

    Returns `fits`; `verdicts`, one a format and GPU (see `judge`; `recipe` is the recipe tried, None for what is there, and
    `convert` the command that makes it); `fit`, the one of them that is advised; and `advice` in words.
    Raises UsageError, BadInput or EnvironmentFailed.
    """
    if kv_cache_dtype not in ("bf16", "fp8"):
        raise UsageError(f"kv_cache_dtype must be bf16 or fp8, not {kv_cache_dtype!r:.40}")
    path = Path(path)
    cases, name = _meta_cases(path) if is_meta(path) else _directory_cases(path)
    verdicts = []
    for one in _gpus_asked(gpu):
        for recipe, case in cases.items():
            asked = replace(
                case, gpu=one, n_gpus=gpus, context=context, sequences=sequences, fp8_kv=kv_cache_dtype == "fp8"
            )
            unquantized = cases["bf16"].weights if is_meta(path) else None
            made = {"recipe": recipe, "name": recipe or _short(case), "convert": _convert(path, recipe, case.directory)}
            verdicts.append({**made, **judge(asked, unquantized)})
    advised = _advised(verdicts)
    return {
        "path": str(path),
        "layout": "meta" if is_meta(path) else "transformers",
        "model": name,
        "max_context": next(iter(cases.values())).max_context,
        "context": context,
        "sequences": sequences,
        "kv_cache_dtype": kv_cache_dtype,
        "fits": advised["fits"],
        "fit": advised,
        "verdicts": verdicts,
        "advice": _words(verdicts, advised),
    }


def _convert(path: Path, recipe: str | None, target: str) -> str:
    """The command that makes what a recipe's verdict is on; empty for what is there."""
    if recipe is None:
        return ""
    option = "" if recipe == "bf16" else f" --recipe {recipe}"
    return f"llama4-convert convert {shlex.quote(str(path))} {target}{option}"


def _gpus_asked(name: str) -> list[Gpu]:
    return list(gpus().values()) if name.strip().lower() == "all" else [find_gpu(name)]


def _short(case: Case) -> str:
    return (case.format or "bf16").removeprefix("compressed-tensors-")


def _meta_cases(path: Path) -> tuple[dict[str | None, Case], str]:
    from llama4_convert.formatting import parameters
    from llama4_convert.metadata.variant import infer_variant, max_position_embeddings
    from llama4_convert.planning.planner import make_plan

    plan = make_plan(MetaCheckpoint.open(path))
    variant, _ = infer_variant(plan.geometry, plan.base_evidence, path)
    weights = Weights.of((tensor.name, tensor.nbytes) for tensor in plan.tensors)
    base = Case(
        plan.geometry, weights, None, find_gpu(DEFAULT_GPU), max_context=max_position_embeddings(variant, plan.geometry)
    )
    cases = recipe_cases(base, weights)
    return {
        name: replace(case, directory=f"llama4-{name}") for name, case in cases
    }, f"{variant}, {parameters(plan.parameters)}"


def _directory_cases(path: Path) -> tuple[dict[str | None, Case], str]:
    checkpoint = TransformersCheckpoint.open(path)
    try:
        config = Llama4Config.from_json(checkpoint.config)
        check_runnable(config)
    except ConfigError as error:
        raise BadInput(f"{path}: config.json: {error}") from error
    text: Any = checkpoint.config.get("text_config") or checkpoint.config
    longest = text.get("max_position_embeddings")
    format, group = _stored(path, checkpoint)
    weights = Weights.of((name, tensor.nbytes) for name, tensor in checkpoint.tensors.items())
    case = Case(
        config.to_geometry(),
        weights,
        format,
        find_gpu(DEFAULT_GPU),
        group=group,
        max_context=longest if type(longest) is int and longest > 0 else 131_072,
        directory=str(path),
    )
    return {None: case}, format or "bf16"


def _stored(path: Path, checkpoint: TransformersCheckpoint) -> tuple[str | None, int | None]:
    """The format of a directory, and the inputs that share a scale if tensor parallelism must not part them."""
    body = checkpoint.config.get("quantization_config")
    if body is None:
        return None, None
    method = body.get("quant_method") if isinstance(body, Mapping) else None
    tensors = checkpoint.tensors
    if method == "bitsandbytes" and any(".quant_state.bitsandbytes__nf4" in name for name in tensors):
        return "bitsandbytes-nf4", None
    if method == "compressed-tensors":
        kinds: set[str] = set()
        group = 0
        for name, scale in tensors.items():
            if not name.endswith(".weight_scale"):
                continue
            module = name.removesuffix(".weight_scale")
            packed, plain = tensors.get(f"{module}.weight_packed"), tensors.get(f"{module}.weight")
            if packed is not None:
                kinds.add("int4")
                group = max(group, _inputs_a_scale(packed, scale, 8))
            elif plain is not None and plain.dtype == "F8_E4M3":
                kinds.add("fp8")
                if len(scale.shape) == 2 and scale.shape[1] > 1:
                    group = max(group, _inputs_a_scale(plain, scale, 1))
        if kinds:
            from quant.config import storage_format

            return storage_format(kinds), group or None
    raise UsageError(
        f"{path} is quantized in a way that fit does not know ({method!r:.40}):"
        " it knows compressed-tensors (int4, FP8) and bitsandbytes (NF4)"
    )


def _inputs_a_scale(weight: StoredTensor, scale: StoredTensor, a_word: int) -> int:
    if len(weight.shape) != 2 or len(scale.shape) != 2 or not scale.shape[1]:
        return 0
    return -(-weight.shape[1] * a_word // scale.shape[1])


def _advised(verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """The verdict to act on: of the smallest GPU that fits, that of its best recipe; else of what comes nearest."""
    fitting = [v for v in verdicts if v["fits"]]
    if not fitting:
        return min(verdicts, key=lambda v: (v["weight_bytes"], -v["gpu_bytes"]))
    here = [v for v in fitting if v["gpu"] == fitting[0]["gpu"]]
    return next((v for v in here if v["recipe"] is not None and v["recipe"] == v["best_recipe"]), here[0])


def _words(verdicts: list[dict[str, Any]], advised: dict[str, Any]) -> str:
    """The verdict in words, on the GPU that is advised: what fits with how much context, and what does not but elsewhere."""
    yes, no = [], []
    for v in (v for v in verdicts if v["gpu"] == advised["gpu"] and v["recipe"] != "int4-signed"):
        size = f"{v['name']} ({gib(v['weight_bytes'])})"
        best = max((r for r in v["runtimes"] if r["fits"]), key=lambda r: r["max_context"], default=None)
        if best is not None:
            yes.append(f"{size} fits with {best['max_context']:,} tokens in {best['runtime']}")
        else:
            no.append(f"{size} does not fit{' (' + ' or '.join(v['elsewhere']) + ' would)' if v['elsewhere'] else ''}")
    several = f"{advised['n_gpus']} x " if advised["n_gpus"] > 1 else ""
    text = f"On {several}{advised['gpu']}: {'; '.join(no + yes)}."
    return f"{text} Instead: {advised['advice']}." if advised["advice"] else text
