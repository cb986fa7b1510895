"""`fit`: whether GPUs hold a checkpoint in each runtime, with how much context, by which command; and if not, what would fit."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import structs

from llama4.config import Llama4Config, check_runnable
from llama4.config_fields import ConfigError
from llama4_convert.checkpoints.layouts import is_meta
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.tensors import StoredTensor
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.fitting.advice import advised_verdict, in_words, recipe_deployments
from llama4_convert.fitting.deployment import Deployment
from llama4_convert.fitting.gpus import find_gpu
from llama4_convert.fitting.gpus import gpus as known_gpus
from llama4_convert.fitting.judge import judge
from llama4_convert.fitting.memory import Weights
from llama4_convert.fitting.results import Fit, FitVerdict
from llama4_convert.formatting import parameters
from llama4_convert.metadata.variant import infer_variant, max_position_embeddings
from llama4_convert.planning.binding import bind_meta, check_complete
from llama4_convert.planning.plan import Plan
from llama4_convert.planning.planner import TransformersLayout, make_plan
from quant.config import parted_group, storage_format
from quant.recipe import Recipe

DEFAULT_GPU = "h100-80gb"


def fit(
    path: str | os.PathLike[str],
    *,
    gpu: str = DEFAULT_GPU,
    gpus: int = 1,
    context: int | None = None,
    sequences: int = 1,
    kv_cache_dtype: str = "bf16",
) -> Fit:
    """Whether `gpus` GPUs of a kind hold the checkpoint at `path` in each runtime. Reads headers only.

    `path` is a finished directory in Transformers' layout, in bf16 or quantized with compressed-tensors or bitsandbytes; or
    Meta's directory, for which every built-in recipe is tried. `gpu` is a key of gpus.toml, or "all". `sequences` of `context`
    tokens each (None: 8,192) must have room at a time. `kv_cache_dtype` is "bf16" or "fp8".
    Raises UsageError, BadInput or EnvironmentFailed.
    """
    if kv_cache_dtype not in ("bf16", "fp8"):
        raise UsageError(f"kv_cache_dtype must be bf16 or fp8, not {kv_cache_dtype!r:.40}")
    path = Path(path)
    layout = "meta" if is_meta(path) else "transformers"
    model, deployments, notes = _meta_deployments(path) if layout == "meta" else _directory_deployment(path)
    verdicts = []
    for one in known_gpus().values() if gpu.strip().lower() == "all" else [find_gpu(gpu)]:
        for recipe, deployment in deployments.items():
            asked = replace(
                deployment,
                gpu=one,
                n_gpus=gpus,
                context=context,
                sequences=sequences,
                fp8_kv=kv_cache_dtype == "fp8",
            )
            name = recipe or (deployment.format or "bf16").removeprefix("compressed-tensors-")
            made_by = _convert_command(path, recipe, deployment.directory)
            verdicts.append(structs.replace(judge(asked), recipe=recipe, name=name, convert=made_by))
    advised = advised_verdict(verdicts)
    return Fit(
        path=str(path),
        layout=layout,
        model=model,
        max_context=next(iter(deployments.values())).max_context,
        context=context,
        sequences=sequences,
        kv_cache_dtype=kv_cache_dtype,
        fits=advised.fits,
        fit=advised,
        verdicts=tuple(verdicts),
        advice=in_words(verdicts, advised),
        warnings=list(notes),
    )


def fit_plan(
    plan: Plan, recipe: Recipe | None, *, gpu: str, gpus: int, context: int | None, max_context: int
) -> FitVerdict:
    """Whether `gpus` GPUs hold what `plan` writes with `recipe`, and `context` tokens (None: 8,192).

    `max_context`: tokens that the model is made for. Raises UsageError for a GPU that is not known.
    """
    return judge(
        Deployment(
            plan.geometry,
            Weights.from_tensors((tensor.name, tensor.nbytes) for tensor in plan.tensors),
            storage_format({matrix.scheme.kind for matrix in plan.matrices if matrix.scheme}),
            find_gpu(gpu),
            n_gpus=gpus,
            context=context,
            group=parted_group(recipe) if recipe else None,
            max_context=max_context,
        )
    )


def _convert_command(path: Path, recipe: str | None, target: str) -> str:
    """The command that writes what a recipe's verdict is about; empty for `path` as it is."""
    if recipe is None:
        return ""
    option = "" if recipe == "bf16" else f" --recipe {recipe}"
    return f"llama4-convert convert {shlex.quote(str(path))} {target}{option}"


def _meta_deployments(path: Path) -> tuple[str, dict[str | None, Deployment], Sequence[str]]:
    """(the model in words, recipe -> the deployment of what it writes, notes) for a directory in Meta's layout."""
    plan = make_plan(bind_meta(MetaCheckpoint.open(path)), TransformersLayout())
    variant, _ = infer_variant(plan.geometry, plan.base_evidence, path)
    weights = Weights.from_tensors((tensor.name, tensor.nbytes) for tensor in plan.tensors)
    base = Deployment(
        plan.geometry,
        weights,
        None,
        find_gpu(DEFAULT_GPU),
        max_context=max_position_embeddings(variant, plan.geometry),
        unquantized=weights,
    )
    deployments: dict[str | None, Deployment] = {
        recipe: replace(deployment, directory=f"llama4-{recipe}") for recipe, deployment in recipe_deployments(base)
    }
    return f"{variant}, {parameters(plan.parameters)}", deployments, plan.warnings


def _directory_deployment(path: Path) -> tuple[str, dict[str | None, Deployment], Sequence[str]]:
    """(the format, {None: the deployment}, notes) for a directory in Transformers' layout."""
    checkpoint = TransformersCheckpoint.open(path)
    check_complete(checkpoint)
    try:
        config = Llama4Config.from_json(checkpoint.config)
        check_runnable(config)
    except ConfigError as error:
        raise BadInput(f"{path}: config.json: {error}") from error
    text: Any = checkpoint.config.get("text_config") or checkpoint.config
    longest = text.get("max_position_embeddings")
    format, group = _stored_format(checkpoint)
    deployment = Deployment(
        config.to_geometry(),
        Weights.from_tensors((name, tensor.nbytes) for name, tensor in checkpoint.tensors.items()),
        format,
        find_gpu(DEFAULT_GPU),
        group=group,
        max_context=longest if type(longest) is int and longest > 0 else 131_072,
        directory=str(path),
    )
    return format or "bf16", {None: deployment}, checkpoint.notes


def _stored_format(checkpoint: TransformersCheckpoint) -> tuple[str | None, int | None]:
    """(format, inputs that share a scale if tensor parallelism must not part them). Raises UsageError for another format."""
    body = checkpoint.config.get("quantization_config")
    if body is None:
        return None, None
    method = body.get("quant_method") if isinstance(body, Mapping) else None
    tensors = checkpoint.tensors
    if method == "bitsandbytes" and any(".quant_state.bitsandbytes__nf4" in name for name in tensors):
        return storage_format({"nf4"}), None
    kinds: set[str] = set()
    group = 0
    scales = {name.removesuffix(".weight_scale"): t for name, t in tensors.items() if name.endswith(".weight_scale")}
    for module, scale in scales.items() if method == "compressed-tensors" else ():
        packed, plain = tensors.get(f"{module}.weight_packed"), tensors.get(f"{module}.weight")
        if packed is not None:
            kinds.add("int4")
            group = max(group, _inputs_of_scale(packed, scale, 8))
        elif plain is not None and plain.dtype == "F8_E4M3":
            kinds.add("fp8")
            if len(scale.shape) == 2 and scale.shape[1] > 1:
                group = max(group, _inputs_of_scale(plain, scale, 1))
    if not kinds:
        raise UsageError(
            f"{checkpoint.path} is quantized in a way that fit does not know ({method!r:.40}):"
            " it knows compressed-tensors (int4, FP8) and bitsandbytes (NF4)"
        )
    return storage_format(kinds), group or None


def _inputs_of_scale(weight: StoredTensor, scale: StoredTensor, codes_a_word: int) -> int:
    """Inputs that share a scale: `weight` [n, k / codes_a_word], `scale` [n, k / inputs]; 0 for other shapes."""
    if len(weight.shape) != 2 or len(scale.shape) != 2 or not scale.shape[1]:
        return 0
    return -(-weight.shape[1] * codes_a_word // scale.shape[1])
