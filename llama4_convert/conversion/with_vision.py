"""`--vision-from`: a text-only fine-tune becomes a whole model again, with the vision tower of the model it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama4.config import Llama4Config
from llama4.config_fields import ConfigError
from llama4_convert.checkpoints.layouts import is_meta
from llama4_convert.checkpoints.tensors import TORCH_NAMES
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.conversion.base import Base, open_base
from llama4_convert.conversion.bound_request import ConversionSource
from llama4_convert.conversion.from_transformers import open_directory, stated_context
from llama4_convert.conversion.request import Request
from llama4_convert.conversion.small_files import kept_files, source_digests
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import is_notice
from llama4_convert.metadata.config_repair import (
    PAD,
    TEXT_PREFIX,
    Repair,
    other_model,
    repair_text,
    text_fields,
    vision_keys,
)
from llama4_convert.planning.binding import bind_transformers, with_vision_of

_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
_TEMPLATE = "chat_template.jinja"


def with_vision(request: Request) -> ConversionSource:
    """The source of a request that joins a text-only Transformers directory and the tower of another model.

    Raises UsageError, BadInput or EnvironmentFailed.
    """
    assert request.vision_from is not None
    if is_meta(request.source):
        raise UsageError(f"{request.source} is no Transformers directory: --vision-from is for text-only ones")
    text = _text_model(open_directory(request))
    base = open_base(Path(request.vision_from))
    text, repaired = _repaired_text(request, text, base)
    whole = replace(Llama4Config.from_json(base.config), text_config=Llama4Config.from_json(text.config).text_config)
    bound = with_vision_of(base.bound, bind_transformers(text), whole)
    digests, warnings = source_digests(text)
    small_files, more = _small_files(kept_files(request.source), base)
    repaired += more
    return ConversionSource(
        checkpoint=text,
        bound=bound,
        config=lambda dtype: _config(base.config, text.config, TORCH_NAMES[dtype]),
        small_files=small_files,
        variant_reason=f"the text model is {request.source.name}'s",
        max_position_embeddings=stated_context(text.config),
        bases={"vision_from": base.sha256},
        expected_digests={**digests, **base.expected_digests},
        warnings=[*dict.fromkeys([*warnings, *base.warnings]), *(one.sentence(base.path.name) for one in repaired)],
        repaired=repaired,
    )


def _text_model(source: TransformersCheckpoint) -> TransformersCheckpoint:
    """`source` with the keys of a text model. Raises UsageError if it has a vision tower."""
    if vision := vision_keys(source.tensors):
        raise UsageError(
            f"{source.path} has a vision tower of its own ({vision[0]}): --vision-from is for text-only models;"
            " --config-from repairs the config.json of any"
        )
    return source.without_prefix(TEXT_PREFIX)


def _repaired_text(
    request: Request, text: TransformersCheckpoint, base: Base
) -> tuple[TransformersCheckpoint, list[Repair]]:
    """The text model with its configuration repaired by the base's. Raises BadInput if it is no fine-tune of the base."""
    try:
        found, expected = text_fields(text.config), text_fields(base.config)
        if difference := other_model(expected, text.tensors):
            raise BadInput(f"{request.source} is no fine-tune of {base.path}: {difference}")
        body, repaired = repair_text(found, expected, text.tensors)
    except ConfigError as error:
        raise BadInput(f"{request.source}: config.json: {error}") from error
    return replace(text, config=body), repaired


def _small_files(ours: Mapping[str, bytes], base: Base) -> tuple[dict[str, bytes], list[Repair]]:
    """The fine-tune's own small files; from the base the processor, the licences, and what the fine-tune lacks."""
    made, theirs, repaired = dict(ours), base.files, []
    made |= {name: theirs[name] for name in _PROCESSOR if name in theirs}
    if not any(name in ours for name in ("tokenizer.json", "tokenizer.model")):
        taken = {name: theirs[name] for name in _TOKENIZER if name in theirs}
        made |= taken
        if taken:
            repaired.append(Repair("tokenizer.json", None, "the base's"))
    if _template(ours) is None and (template := _template(theirs)) is not None:
        made[_TEMPLATE] = template
        repaired.append(Repair("chat_template", None, "the base's"))
    repaired += base.repair_generation(made)
    made |= {name: data for name, data in theirs.items() if is_notice(name)}
    return made, repaired


def _template(files: Mapping[str, bytes]) -> bytes | None:
    """The chat template: a file of its own, or inside tokenizer_config.json, where Transformers 4 has it."""
    if template := files.get(_TEMPLATE):
        return template
    try:
        body = json.loads(files.get("tokenizer_config.json", b"{}"))
    except (ValueError, RecursionError):
        return None
    inside = body.get("chat_template") if isinstance(body, dict) else None
    return inside.encode() if isinstance(inside, str) and inside else None


def _config(base: Mapping[str, Any], text: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The base's config.json around the fine-tune's text model; `dtype` by torch's name."""
    name = "dtype" if "dtype" in base else "torch_dtype"
    inner = {k: v for k, v in text.items() if k not in ("architectures", "dtype", "torch_dtype")}
    return {
        **base,
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        name: dtype,
        PAD: inner.get(PAD),
        "text_config": {**inner, "model_type": "llama4_text", name: dtype},
    }
