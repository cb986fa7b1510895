"""`--vision-from`: a text-only fine-tune becomes a whole model again, with the vision tower of the model it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama4.config import Llama4Config
from llama4.config_fields import DEFAULT_CONTEXT, ConfigError
from llama4_convert.checkpoints import is_meta
from llama4_convert.checkpoints.digests import Digest
from llama4_convert.checkpoints.manifest import Manifest
from llama4_convert.checkpoints.tensors import TORCH_NAMES
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.conversion.bound_request import (
    BoundRequest,
    adapter_source,
    recipe_options,
)
from llama4_convert.conversion.from_meta import from_meta
from llama4_convert.conversion.from_transformers import (
    open_directory,
    repair_warnings,
    source_digests,
)
from llama4_convert.conversion.quantization import quantization_config
from llama4_convert.conversion.request import Request, check_recipe, load_adapter, load_recipe
from llama4_convert.conversion.small_files import kept_files
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import is_notice
from llama4_convert.metadata import config
from llama4_convert.metadata.config_repair import (
    GENERATION,
    TEXT_PREFIX,
    Repair,
    other_model,
    repair_generation,
    repair_text,
    text_fields,
    vision_keys,
)
from llama4_convert.planning.binding import VISION_PREFIX, BoundSource, bind_meta, bind_transformers, with_vision_of
from llama4_convert.planning.planner import TransformersLayout, make_plan
from llama4_convert.streaming.job import Job
from llama4_convert.version import TOOL

_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Base:
    """The model that a fine-tune was made from, in either layout."""

    path: Path
    bound: BoundSource
    body: Mapping[str, Any]  # config.json; for Meta's layout that of its conversion
    fingerprint: Mapping[str, str]
    files: Mapping[str, bytes]  # the other small files; for Meta's layout those of its conversion
    expected_digests: Mapping[Path, Digest]
    warnings: list[str]

    @staticmethod
    def open(path: Path) -> Base:
        """Raises UsageError, BadInput or EnvironmentFailed."""
        base = _open_meta(path) if is_meta(path) else _open_transformers(path)
        if base.bound.geometry.vision is None:
            raise BadInput(
                f"{path} has no vision tower: give the model that the fine-tune was made from, not its text part"
            )
        return base


def _open_meta(path: Path) -> Base:
    converted = from_meta(Request(path))
    source, job = converted.source, converted.job
    assert not isinstance(source, TransformersCheckpoint)
    files = {**job.contents(), **(job.tokenizer.files() if job.tokenizer else {})}
    body = json.loads(files["config.json"])
    return Base(path, bind_meta(source), body, source.fingerprint(), files, {}, [])


def _open_transformers(path: Path) -> Base:
    source = TransformersCheckpoint.open_llama4(path)
    bound = bind_transformers(source)
    parts = [part for name, parts in bound.locations.items() if name.startswith(VISION_PREFIX) for part in parts]
    read = replace(source, files=tuple(source.files[number] for number in sorted({part.file for part in parts})))
    digests, warnings = source_digests(read)
    return Base(path, bound, source.config, source.fingerprint(), kept_files(path), digests, warnings)


def with_vision(request: Request) -> BoundRequest:
    """A conversion of a text-only Transformers directory with the tower of another model.

    Raises UsageError, BadInput or EnvironmentFailed.
    """
    assert request.vision_from is not None
    if is_meta(request.source):
        raise UsageError(f"{request.source} is no Transformers directory: --vision-from is for text-only ones")
    text = _text_model(open_directory(request))
    base = Base.open(Path(request.vision_from))
    recipe, adapter = load_recipe(request.recipe), load_adapter(request.adapter)
    text, repaired = _repaired_text(request, text, base)
    bound_text = bind_transformers(text)
    whole = replace(Llama4Config.from_json(base.body), text_config=Llama4Config.from_json(text.config).text_config)
    bound = with_vision_of(base.bound, bound_text, whole)
    layout = TransformersLayout(shard_size=request.shard_size, recipe=recipe, device=request.device, adapter=adapter)
    plan = make_plan(bound, layout)
    if recipe:
        check_recipe(recipe, plan)
    digests, warnings = source_digests(text)
    small_files, more = _small_files(kept_files(request.source), base.files)
    repaired += more
    body = _config(base.body, text.config, TORCH_NAMES[plan.main_dtype])
    if recipe:
        body["quantization_config"] = quantization_config(recipe, plan)
    origin: dict[str, Any] = {"layout": "transformers", "sha256": text.fingerprint(), **adapter_source(adapter)}
    origin["vision_from"] = dict(base.fingerprint)
    options = {"shard_size": request.shard_size, **recipe_options(recipe, request.allow_nonfinite)}
    job = Job(
        plan=plan,
        source_files=bound.files,
        manifest=Manifest(TOOL, origin, options, [], {}),
        small_files={"config.json": config.to_json(body), **small_files},
        marker_content=plan.index(),
        config=body,
        allow_nonfinite=request.allow_nonfinite,
        expected_digests={**digests, **base.expected_digests},
        warnings=[*dict.fromkeys([*warnings, *base.warnings]), *repair_warnings(repaired, base.path.name)],
    )
    context = int(text.config.get("max_position_embeddings") or DEFAULT_CONTEXT)
    reason = f"the text model is {request.source.name}'s"
    ranks = len(bound.files)
    return BoundRequest(request, text, job, ranks, "as the source", reason, context, recipe, adapter, repaired)


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
        found, expected = text_fields(text.config), text_fields(base.body)
        if difference := other_model(expected, text.tensors):
            raise BadInput(f"{request.source} is no fine-tune of {base.path}: {difference}")
        body, repaired = repair_text(found, expected, text.tensors)
    except ConfigError as error:
        raise BadInput(f"{request.source}: config.json: {error}") from error
    return replace(text, config=body), repaired


def _small_files(ours: Mapping[str, bytes], theirs: Mapping[str, bytes]) -> tuple[dict[str, bytes], list[Repair]]:
    """The fine-tune's own small files; from the base the processor, the licences, and what the fine-tune lacks."""
    made, repaired = dict(ours), []
    made |= {name: theirs[name] for name in _PROCESSOR if name in theirs}
    if not any(name in ours for name in ("tokenizer.json", "tokenizer.model")):
        taken = {name: theirs[name] for name in _TOKENIZER if name in theirs}
        made |= taken
        if taken:
            repaired.append(Repair("tokenizer.json", None, "the base's"))
    if _template(ours) is None and (template := _template(theirs)) is not None:
        made[_TEMPLATE] = template
        repaired.append(Repair("chat_template", None, "the base's"))
    generation, more = repair_generation(ours.get(GENERATION), theirs.get(GENERATION))
    if generation is not None:
        made[GENERATION] = generation
    made |= {name: data for name, data in theirs.items() if is_notice(name)}
    return made, [*repaired, *more]


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
        "text_config": {**inner, "model_type": "llama4_text", name: dtype},
    }
