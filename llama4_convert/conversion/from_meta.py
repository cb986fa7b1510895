"""Meta's directory as the source of a conversion: the plan, and the small files made of params.json and tokenizer.model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llama4.geometry import Geometry
from llama4_convert.checkpoints.manifest import Manifest
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.tensors import SAFETENSORS_NAMES
from llama4_convert.conversion.bound_request import (
    BoundRequest,
    adapter_source,
    recipe_options,
)
from llama4_convert.conversion.quantization import quantization_config
from llama4_convert.conversion.request import Request, check_recipe, load_adapter, load_recipe
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import notices
from llama4_convert.metadata.config import ModelConfigs
from llama4_convert.metadata.tokenizer import TokenIds, TokenizerSource
from llama4_convert.metadata.variant import infer_variant, max_position_embeddings
from llama4_convert.planning.binding import bind_meta
from llama4_convert.planning.planner import TransformersLayout, make_plan
from llama4_convert.streaming.job import Job
from llama4_convert.version import TOOL


def from_meta(request: Request) -> BoundRequest:
    """A conversion of Meta's directory. Raises UsageError, BadInput or EnvironmentFailed."""
    if request.config_from is not None:
        raise UsageError(f"{request.source} has a params.json: --config-from repairs a Transformers directory")
    recipe, adapter = load_recipe(request.recipe), load_adapter(request.adapter)
    source = MetaCheckpoint.open(request.source)
    layout = TransformersLayout(
        dtype=SAFETENSORS_NAMES[request.dtype] if request.dtype else None,
        shard_size=request.shard_size,
        recipe=recipe,
        device=request.device,
        adapter=adapter,
    )
    bound = bind_meta(source, text_only=request.text_only, allow_rank_mismatch=request.allow_rank_mismatch)
    plan = make_plan(bound, layout)
    if recipe:
        check_recipe(recipe, plan)
    geometry = plan.geometry
    variant, reason = infer_variant(geometry, plan.base_evidence, request.source)
    if request.variant:
        variant, reason = request.variant, "you said so"
    context = request.max_position_embeddings or max_position_embeddings(variant, geometry)
    tokenizer = source.small_files.get("tokenizer.model")
    ids = _token_ids(tokenizer, geometry)
    quantization = quantization_config(recipe, plan) if recipe else None
    options: dict[str, Any] = {
        "dtype": request.dtype,
        "max_position_embeddings": context,
        "shard_size": request.shard_size,
        "text_only": request.text_only,
        "variant": variant,
        **recipe_options(recipe, request.allow_nonfinite),
    }
    origin = {"layout": "meta", "ranks": len(source.ranks), "sha256": source.fingerprint(), **adapter_source(adapter)}
    job = Job(
        plan=plan,
        source_files=source.archives,
        manifest=Manifest(TOOL, origin, options, list(plan.meta_keys), dict(plan.dropped)),
        small_files={"original/params.json": source.small_files["params.json"], **notices(source.path)},
        configs=ModelConfigs(geometry, ids, variant, plan.main_dtype, context, quantization),
        marker_content=plan.index(),
        tokenizer=TokenizerSource(tokenizer, variant, geometry.vision is not None, context)
        if tokenizer is not None
        else None,
        dtype=request.dtype,
        allow_nonfinite=request.allow_nonfinite,
        tokenizer_bytes=len(tokenizer or b""),
        warnings=[*plan.warnings, *_vocabulary_warnings(tokenizer is not None, ids, geometry)],
    )
    return BoundRequest(request, source, job, len(source.ranks), variant, reason, context, recipe, adapter)


def _token_ids(tokenizer: bytes | None, geometry: Geometry) -> TokenIds | None:
    """Ids of the special tokens by tokenizer.model, or by the vocabulary's size without one; None if it is too small."""
    rows = geometry.vocab_size or 0
    ids = TokenIds.from_tokenizer(tokenizer, rows)
    if ids and ids.vocab_size > rows:
        raise BadInput(
            f"tokenizer.model has {ids.vocab_size:,} tokens with the special ones,"
            f" tok_embeddings.weight only {rows:,} rows: one of the two is another model's"
        )
    return ids


def _vocabulary_warnings(has_tokenizer: bool, ids: TokenIds | None, geometry: Geometry) -> Iterator[str]:
    rows = geometry.vocab_size or 0
    if not has_tokenizer and ids:
        yield (
            "the source has no tokenizer.model: no tokenizer is written, copy tokenizer.json from the model's page;"
            f" token ids in config.json are those of a vocabulary of {rows:,}"
        )
    elif not has_tokenizer:
        yield (
            "the source has no tokenizer.model and its vocabulary is too small for Meta's special tokens:"
            " no tokenizer is written, and config.json names no token ids"
        )
    elif ids and ids.vocab_size < rows:
        yield f"the vocabulary has {rows - ids.vocab_size} more rows than tokenizer.model has tokens"
