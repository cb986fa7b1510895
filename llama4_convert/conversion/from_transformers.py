"""A Transformers directory as the source of a conversion: quantized, with an adapter merged, or with its config.json repaired.

Fine-tunes come in this layout. Everything but the weights is the source's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama4.config_fields import DEFAULT_CONTEXT
from llama4_convert.checkpoints.digests import Digest, expected_digests
from llama4_convert.checkpoints.manifest import Manifest
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.conversion.base_config import BaseConfig
from llama4_convert.conversion.bound_request import (
    BoundRequest,
    adapter_source,
    recipe_options,
)
from llama4_convert.conversion.quantization import quantization_config
from llama4_convert.conversion.request import Request, check_recipe, load_adapter, load_recipe
from llama4_convert.conversion.small_files import kept_files
from llama4_convert.errors import UsageError
from llama4_convert.files import read_small
from llama4_convert.metadata import config
from llama4_convert.metadata.config_repair import GENERATION, Repair, repair_generation
from llama4_convert.planning.binding import bind_transformers
from llama4_convert.planning.planner import TransformersLayout, make_plan
from llama4_convert.streaming.job import Job
from llama4_convert.version import TOOL

# Small files that decide what is written, beside the weights.
_DECIDING = ("config.json", "tokenizer.json", "tokenizer.model", "original/params.json")
_META_ONLY = {
    "variant": "--variant",
    "dtype": "--dtype",
    "text_only": "--text-only",
    "max_position_embeddings": "--max-position-embeddings",
    "allow_rank_mismatch": "--allow-rank-mismatch",
}


def from_transformers(request: Request) -> BoundRequest:
    """A conversion of a Transformers directory. Raises UsageError, BadInput or EnvironmentFailed."""
    source = open_directory(request)
    if request.recipe is None and request.adapter is None and request.config_from is None:
        raise UsageError(
            f"{request.source} is in Transformers' layout already: add --recipe to quantize it, --adapter to merge one,"
            " or --config-from to repair its config.json"
        )
    small_files = kept_files(request.source)
    base, repaired = None, None
    if request.config_from is not None:
        base = BaseConfig.open(Path(request.config_from))
        source, repaired = base.repaired(source)
        generation, more = repair_generation(small_files.get(GENERATION), base.generation)
        if generation is not None:
            small_files[GENERATION] = generation
        repaired += more
    recipe, adapter = load_recipe(request.recipe), load_adapter(request.adapter)
    layout = TransformersLayout(
        shard_size=request.shard_size,
        recipe=recipe,
        device=request.device,
        adapter=adapter,
        whole_matrices=False,  # as this tool has always cut such directories
    )
    plan = make_plan(bind_transformers(source), layout)
    if recipe:
        check_recipe(recipe, plan)
    body = dict(source.config)
    if recipe:
        body["quantization_config"] = quantization_config(recipe, plan)
    params = request.source / "original" / "params.json"
    if params.is_file():
        small_files["original/params.json"] = read_small(params)
    origin: dict[str, Any] = {"layout": "transformers", "sha256": source.fingerprint(), **adapter_source(adapter)}
    if base:
        origin["config_from"] = base.fingerprint()
    options = {"shard_size": request.shard_size, **recipe_options(recipe, request.allow_nonfinite)}
    digests, warnings = source_digests(source)
    job = Job(
        plan=plan,
        source_files=source.archives,
        manifest=Manifest(TOOL, json.loads(json.dumps(origin)), options, [], {}),
        small_files={"config.json": config.to_json(body), **small_files},
        marker_content=plan.index(),
        config=body,
        allow_nonfinite=request.allow_nonfinite,
        expected_digests=digests,
        warnings=[*warnings, *repair_warnings(repaired or (), base.path.name if base else "")],
    )
    text: Any = source.config.get("text_config") or source.config
    context = int(text.get("max_position_embeddings") or DEFAULT_CONTEXT)
    reason = "all files but the weights are the source's"
    ranks = len(source.archives)
    return BoundRequest(request, source, job, ranks, "as the source", reason, context, recipe, adapter, repaired)


def open_directory(request: Request) -> TransformersCheckpoint:
    """The request's source. Raises UsageError for options that are only for Meta's layout."""
    for name, option in _META_ONLY.items():
        if getattr(request, name):
            raise UsageError(f"{option} is for Meta's layout: a Transformers directory keeps what it says")
    source = TransformersCheckpoint.open_llama4(request.source)
    if "quantization_config" in source.config:
        raise UsageError(f"{request.source} is quantized already: take what it was made from")
    return source


def source_digests(source: TransformersCheckpoint) -> tuple[dict[Path, Digest], list[str]]:
    """Digests that a manifest or a download states for the files that decide the output; a warning where some lack one."""
    others = (source.path / name for name in _DECIDING)
    weights = [index.path for index in source.files]
    found = expected_digests([*weights, *(path for path in others if path.is_file())])
    left = len([path for path in weights if path not in found])
    if not left:
        return found, []
    some = f"{left} of {len(source.files)} files" if left < len(source.files) else "its files"
    return found, [f"the source has no checksums: nothing says what {some} should be, and they are taken as they are"]


def repair_warnings(repaired: Sequence[Repair], base: str) -> list[str]:
    """A sentence for each repaired field; `base` is the name of the model that the values come from."""
    return [one.sentence(base) for one in repaired]
