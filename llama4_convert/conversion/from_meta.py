"""Meta's directory as the source of a conversion: its small files are made of params.json and tokenizer.model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llama4.geometry import Geometry
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.conversion.bound_request import ConversionSource
from llama4_convert.conversion.request import Request
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import notices
from llama4_convert.metadata.config import generation_config, model_config, processor_configs, to_json
from llama4_convert.metadata.config_repair import GENERATION
from llama4_convert.metadata.tokenizer import TokenIds, TokenizerSource
from llama4_convert.metadata.variant import infer_variant, max_position_embeddings
from llama4_convert.planning.binding import bind_meta


def from_meta(request: Request) -> ConversionSource:
    """The source of a request that names Meta's directory. Raises UsageError, BadInput or EnvironmentFailed."""
    if request.config_from is not None:
        raise UsageError(f"{request.source} has a params.json: --config-from repairs a Transformers directory")
    checkpoint = MetaCheckpoint.open(request.source)
    bound = bind_meta(checkpoint, text_only=request.text_only, allow_rank_mismatch=request.allow_rank_mismatch)
    geometry = bound.geometry
    variant, reason = infer_variant(geometry, bound.base_evidence, request.source)
    if request.variant:
        variant, reason = request.variant, "you said so"
    context = request.max_position_embeddings or max_position_embeddings(variant, geometry)
    model = checkpoint.small_files.get("tokenizer.model")
    ids = _token_ids(model, geometry)

    def config(dtype: str) -> dict[str, Any]:
        return model_config(geometry, ids, variant=variant, dtype=dtype, max_position_embeddings=context)

    made = {GENERATION: generation_config(ids, variant)}
    made |= processor_configs(geometry.vision) if geometry.vision else {}
    return ConversionSource(
        checkpoint=checkpoint,
        bound=bound,
        config=config,
        small_files={
            **{name: to_json(body) for name, body in made.items()},
            "original/params.json": checkpoint.small_files["params.json"],
            **notices(checkpoint.path),
        },
        variant=variant,
        variant_reason=reason,
        max_position_embeddings=context,
        options={
            "dtype": request.dtype,
            "max_position_embeddings": context,
            "text_only": request.text_only,
            "variant": variant,
        },
        warnings=list(_vocabulary_warnings(model is not None, ids, geometry)),
        tokenizer=TokenizerSource(model, variant, geometry.vision is not None, context) if model is not None else None,
    )


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
