"""A request bound to its source: what the source contributes to its conversion, and the job that follows from both.

`from_meta`, `from_transformers` and `with_vision` make a `ConversionSource` each, of which `bound_request` makes the job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints.digests import Digest
from llama4_convert.checkpoints.manifest import Manifest
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.tensors import SAFETENSORS_NAMES
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.conversion.request import Request
from llama4_convert.errors import UsageError
from llama4_convert.metadata.config_repair import Repair
from llama4_convert.metadata.tokenizer import TokenizerSource
from llama4_convert.planning.adapter import Adapter
from llama4_convert.planning.binding import BoundSource
from llama4_convert.planning.plan import Plan
from llama4_convert.planning.planner import TransformersLayout, make_plan
from llama4_convert.streaming.job import Job
from llama4_convert.version import TOOL
from quant.config import Module, compressed_tensors_config
from quant.recipe import Recipe, RecipeError, load


@dataclass(frozen=True, kw_only=True)
class ConversionSource:
    """What a source contributes to its conversion; the request and the plan decide the rest."""

    checkpoint: MetaCheckpoint | TransformersCheckpoint
    bound: BoundSource
    config: Callable[[str], Mapping[str, Any]]  # the dtype of most tensors -> config.json, without quantization_config
    small_files: Mapping[str, bytes]  # the other small files, by name in the output
    variant: str = "as the source"
    variant_reason: str
    max_position_embeddings: int
    bases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # option -> fingerprint of the base it names
    options: Mapping[str, Any] = field(default_factory=dict)  # for the manifest, beside those of every conversion
    expected_digests: Mapping[Path, Digest] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    tokenizer: TokenizerSource | None = None
    repaired: Sequence[Repair] | None = None  # fields of small files; None without --config-from and --vision-from
    whole_matrices: bool = True  # see `TransformersLayout`


@dataclass(frozen=True)
class BoundRequest:
    """What a conversion is, before a byte of tensor data is read: `job` runs, the other fields go into results."""

    request: Request
    source: ConversionSource
    job: Job
    recipe: Recipe | None
    adapter: Adapter | None

    @property
    def ranks(self) -> int:
        """The number of the source's files of weights, those of Meta's scales not counted."""
        checkpoint = self.source.checkpoint
        return len(checkpoint.ranks) if isinstance(checkpoint, MetaCheckpoint) else len(self.job.source_files)


def bound_request(request: Request, source: ConversionSource) -> BoundRequest:
    """Plan the output of `request` for its opened source. Raises UsageError, BadInput or EnvironmentFailed."""
    recipe = load_recipe(request.recipe)
    adapter = Adapter.open(Path(request.adapter)) if request.adapter is not None else None
    layout = TransformersLayout(
        dtype=SAFETENSORS_NAMES[request.dtype] if request.dtype else None,
        shard_size=request.shard_size,
        recipe=recipe,
        device=request.device,
        adapter=adapter,
        whole_matrices=source.whole_matrices,
    )
    plan = make_plan(source.bound, layout)
    if recipe:
        _check_named(recipe, plan)
        check_used(recipe, plan)
    beside = {**source.bases, **({"adapter": dict(adapter.fingerprint)} if adapter else {})}
    options = {"shard_size": request.shard_size, **source.options, **recipe_options(recipe, request.allow_nonfinite)}

    def config() -> dict[str, Any]:
        quantization = {"quantization_config": _quantization_config(recipe, plan)} if recipe else {}
        return {**source.config(plan.main_dtype), **quantization}

    job = Job(
        plan=plan,
        source_files=source.bound.files,
        manifest=manifest({**origin(source.checkpoint), **beside}, options, plan),
        config=config,
        small_files=source.small_files,
        marker_content=plan.index(),
        tokenizer=source.tokenizer,
        dtype=request.dtype,
        allow_nonfinite=request.allow_nonfinite,
        expected_digests=source.expected_digests,
        tokenizer_bytes=len(source.tokenizer.model) if source.tokenizer else 0,
        warnings=[*plan.warnings, *source.warnings, *(adapter.warnings(plan) if adapter else ())],
    )
    return BoundRequest(request, source, job, recipe, adapter)


def load_recipe(name: str | None, *, to_meta: bool = False) -> Recipe | None:
    """The recipe of a name or a path, for the layout that is written; None without a name. Raises UsageError."""
    if name is None:
        return None
    try:
        recipe = load(name)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    if (recipe.format == "meta") != to_meta:
        layout, command = ("Transformers'", "convert") if to_meta else ("Meta's", "export")
        raise UsageError(f"recipe {recipe.name} writes {layout} layout: give it to {command}")
    return recipe


def _check_named(recipe: Recipe, plan: Plan) -> None:
    """Raises UsageError for a recipe that names layers or experts which the model lacks."""
    try:
        recipe.check(plan.geometry.n_layers, plan.geometry.n_experts or 0)
    except RecipeError as error:
        raise UsageError(str(error)) from error


def check_used(recipe: Recipe, plan: Plan) -> None:
    """Raises UsageError for a recipe that quantizes nothing of the model."""
    if not any(encoded.scheme for encoded in plan.matrices) and not any(file.made_with for file in plan.files):
        raise UsageError(f"recipe {recipe.name} quantizes nothing of this model: leave it out")


def recipe_options(recipe: Recipe | None, allow_nonfinite: bool = False) -> dict[str, Any]:
    """The options of a recipe that decide bytes, for the manifest."""
    if recipe is None:
        return {}
    allowed = {"allow_nonfinite": True} if allow_nonfinite else {}
    return {"recipe": recipe.to_json(), **allowed}


def origin(checkpoint: MetaCheckpoint | TransformersCheckpoint) -> dict[str, Any]:
    """The source as the manifest identifies it."""
    if isinstance(checkpoint, MetaCheckpoint):
        return {"layout": "meta", "ranks": len(checkpoint.ranks), "sha256": checkpoint.fingerprint()}
    return {"layout": "transformers", "sha256": checkpoint.fingerprint()}


def manifest(origin: dict[str, Any], options: dict[str, Any], plan: Plan) -> Manifest:
    """The manifest of an output of which nothing is written yet."""
    return Manifest(TOOL, origin, options, list(plan.meta_keys), dict(plan.dropped))


def _quantization_config(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What the recipe does with every linear layer, in the words of its format: compressed-tensors or bitsandbytes."""
    # Linear layers that the recipe leaves alone are not encoded, but the configuration must name them as left alone.
    modules = [Module(m.module, m.family, m.layer, m.expert, scheme) for m, scheme in plan.linear_layers]
    if recipe.format == "compressed-tensors":
        return compressed_tensors_config(modules)
    from quant.formats.bitsandbytes import bitsandbytes_config

    return bitsandbytes_config(modules)
