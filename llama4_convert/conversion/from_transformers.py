"""A Transformers directory as the source of a conversion: quantized, with an adapter merged, or with its config.json repaired.

Fine-tunes come in this layout. Everything but the weights is the source's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama4.config_fields import DEFAULT_CONTEXT, ConfigError
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.conversion.base import Base, open_base_config
from llama4_convert.conversion.bound_request import ConversionSource
from llama4_convert.conversion.request import Request
from llama4_convert.conversion.small_files import kept_files, source_digests
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import read_small
from llama4_convert.metadata.config_repair import TEXT_PREFIX, Repair, repair, text_fields, vision_keys
from llama4_convert.planning.binding import bind_transformers

_PARAMS = "original/params.json"
_META_ONLY = ("variant", "dtype", "text_only", "max_position_embeddings", "allow_rank_mismatch")


def from_transformers(request: Request) -> ConversionSource:
    """The source of a request that names a Transformers directory. Raises UsageError, BadInput or EnvironmentFailed."""
    checkpoint = open_directory(request)
    if request.recipe is None and request.adapter is None and request.config_from is None:
        raise UsageError(
            f"{request.source} is in Transformers' layout already: add --recipe to quantize it, --adapter to merge one,"
            " or --config-from to repair its config.json"
        )
    small_files, bases = kept_files(request.source), {}
    repaired: list[Repair] | None = None
    sentences: list[str] = []
    if request.config_from is not None:
        base = open_base_config(Path(request.config_from))
        checkpoint, repaired = _repaired(checkpoint, base)
        repaired += base.repair_generation(small_files)
        bases["config_from"] = base.fingerprint()
        sentences = [one.sentence(base.path.name) for one in repaired]
    if (request.source / _PARAMS).is_file():
        small_files[_PARAMS] = read_small(request.source / _PARAMS)
    bound = bind_transformers(checkpoint)
    digests, warnings = source_digests(checkpoint)
    return ConversionSource(
        checkpoint=checkpoint,
        bound=bound,
        config=lambda dtype: checkpoint.config,
        small_files=small_files,
        variant_reason="all files but the weights are the source's",
        max_position_embeddings=stated_context(checkpoint.config),
        bases=bases,
        expected_digests=digests,
        warnings=[*warnings, *sentences],
        repaired=repaired,
        whole_matrices=False,  # as this tool has always cut such directories
    )


def open_directory(request: Request) -> TransformersCheckpoint:
    """The request's source. Raises UsageError for options that are only for Meta's layout."""
    for name in _META_ONLY:
        if getattr(request, name):
            option = name.replace("_", "-")
            raise UsageError(f"--{option} is for Meta's layout: a Transformers directory keeps what it says")
    checkpoint = TransformersCheckpoint.open_llama4(request.source)
    if "quantization_config" in checkpoint.config:
        raise UsageError(f"{request.source} is quantized already: take what it was made from")
    return checkpoint


def stated_context(config: Mapping[str, Any]) -> int:
    """Tokens of context, by config.json."""
    return int(text_fields(config).get("max_position_embeddings") or DEFAULT_CONTEXT)


def _repaired(checkpoint: TransformersCheckpoint, base: Base) -> tuple[TransformersCheckpoint, list[Repair]]:
    """The source with its config.json repaired: a text model's where no tensor is of a vision tower. Raises BadInput."""
    try:
        config, repairs = repair(checkpoint.config, base.config, checkpoint.tensors)
    except (ConfigError, BadInput) as error:
        raise BadInput(f"{checkpoint.path}, with --config-from {base.path}: {error}") from error
    is_whole = vision_keys(checkpoint.tensors)
    return replace(checkpoint if is_whole else checkpoint.without_prefix(TEXT_PREFIX), config=config), repairs
