"""`export`: from a Transformers directory, or from Meta's at another rank count, to Meta's layout.

The tables read the other way: each rank's tensors are boxes of logical tensors, gathered from wherever the source stores them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from msgspec import UNSET

from llama4.config import Llama4Config
from llama4.config_fields import ConfigError
from llama4.geometry import Geometry, GeometryError
from llama4_convert.checkpoints.digests import Digest
from llama4_convert.checkpoints.layouts import is_meta
from llama4_convert.checkpoints.manifest import MAX_RANKS, Manifest
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.conversion.bound_request import check_used, load_recipe, manifest, origin, recipe_options
from llama4_convert.conversion.results import Export
from llama4_convert.conversion.small_files import source_digests
from llama4_convert.conversion.summaries import dropped, export_quantization, written_files
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import notices, read_small
from llama4_convert.metadata.params import contradictions, params_json, without_vision
from llama4_convert.metadata.tokenizer import TokenIds, tokenizer_model
from llama4_convert.metadata.variant import recorded_variant
from llama4_convert.planning.binding import bind_meta, bind_transformers
from llama4_convert.planning.plan import Plan
from llama4_convert.planning.planner import MetaLayout, make_plan
from llama4_convert.progress import Callbacks, Progress, Start, Warn
from llama4_convert.streaming.bounds import DEFAULT_MEMORY_BYTES, Bounds
from llama4_convert.streaming.execution import run
from llama4_convert.streaming.job import Job
from llama4_convert.streaming.output_directory import output_directory
from mappings import Binding
from quant.recipe import Recipe

_DEFAULT_RANKS = 8  # Scout's and Maverick's
_TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class ExportRequest:
    """The options of an export. `ranks` None: as many as the source was made from, or 8."""

    source: Path
    ranks: int | None = None
    allow_rank_mismatch: bool = False
    recipe: str | None = None  # one of the format meta: a built-in one's name, or the path of a TOML file

    def __post_init__(self) -> None:
        if self.ranks is not None and not 1 <= self.ranks <= MAX_RANKS:
            raise UsageError(f"ranks must be from 1 to {MAX_RANKS}, not {self.ranks}")


@dataclass(frozen=True)
class BoundExport:
    """An export bound to its source."""

    source: MetaCheckpoint | TransformersCheckpoint
    job: Job
    ranks: int
    parameters: int
    recipe: Recipe | None


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    max_memory: int = DEFAULT_MEMORY_BYTES,
    overwrite: bool = False,
    warn: Warn = lambda text: None,
    start: Start = lambda total, done: None,
    progress: Progress = lambda n: None,
    **options: Any,
) -> Export:
    """Write the checkpoint at `source`, in either layout, to `target` in Meta's: rank files, params.json, tokenizer.model.

    `options` are the fields of `ExportRequest`; the rest is as for `convert`. Keys have the spelling that the source has, or that
    was recorded when it was converted, else the published one. Raises a ConvertError; the target then has no params.json.
    """
    request = ExportRequest(Path(source), **options)
    bounds = Bounds(max_memory, None, overwrite)
    with output_directory(Path(target), [request.source]) as output:
        bound = bind_export(request)
        finished = run(bound.job, output, bounds, Callbacks(warn, start, progress))
    plan = bound.job.plan
    return Export(
        status="already complete" if finished.was_complete else "converted",
        output=str(finished.output),
        ranks=bound.ranks,
        parameters=bound.parameters,
        output_bytes=plan.output_bytes,
        dropped=dropped(plan),
        files=written_files(finished.manifest),
        files_kept_from_earlier_run=finished.kept_weights,
        warnings=list(bound.job.warnings),
        nonfinite=finished.nonfinite,
        quantization=export_quantization(bound.recipe, plan, finished.manifest.errors) if bound.recipe else UNSET,
    )


def bind_export(request: ExportRequest) -> BoundExport:
    """Open the source, bind it to the tables, and plan the output. Raises UsageError, BadInput or EnvironmentFailed."""
    recipe = load_recipe(request.recipe, to_meta=True)
    record = Manifest.read(request.source) if request.source.is_dir() else None
    source: MetaCheckpoint | TransformersCheckpoint
    own_ranks: int | None = None
    own_keys: list[str] = []
    digests: dict[Path, Digest] = {}
    warnings: list[str] = []
    if is_meta(request.source):
        source = MetaCheckpoint.open(request.source)
        bound = bind_meta(source, allow_rank_mismatch=request.allow_rank_mismatch)
        own_ranks = len(source.ranks)
        own_keys = [key for key in source.ranks[0].tensors if key in bound.binding.meta]
    else:
        source = TransformersCheckpoint.open_llama4(request.source)
        if "quantization_config" in source.config:
            raise UsageError(f"{request.source} is quantized: export what it was made from")
        bound = bind_transformers(source)
        digests, warnings = source_digests(source)
    recorded_ranks = record.source.get("ranks") if record else None
    ranks = request.ranks or own_ranks or recorded_ranks or _DEFAULT_RANKS
    keys = spelling = _spelling(bound.binding, record, own_keys)
    if ranks not in (own_ranks, recorded_ranks):
        keys, more = _loadable(bound.binding, spelling, ranks)
        warnings += more
    plan = make_plan(bound, MetaLayout(keys, spelling, ranks, recipe))
    params, more = _params(source)
    warnings += [*plan.warnings, *more]
    if recipe:
        check_used(recipe, plan)
    small_files = {**notices(request.source), **_tokenizer(request.source, plan.geometry.vocab_size or 0)}
    if _TOKENIZER not in small_files:
        warnings.append("the source has no tokenizer: copy tokenizer.model from the model's page")
    to_convert = request.source / "tokenizer.json"
    options = {"layout": "meta", "ranks": ranks, **recipe_options(recipe)}
    job = Job(
        plan=plan,
        source_files=bound.files,
        manifest=manifest(_origin(source, record, plan), options, plan),
        small_files=small_files,
        marker_content=params,
        expected_digests=digests,
        tokenizer_bytes=to_convert.stat().st_size if own_ranks is None and to_convert.is_file() else 0,
        warnings=warnings,
    )
    parameters = sum(prod(logical.sizes.values()) for logical in bound.binding.logical.values())
    return BoundExport(source, job, ranks, parameters, recipe)


def _spelling(binding: Binding, record: Manifest | None, own: Sequence[str]) -> list[str]:
    """The keys to write: those that the source's manifest recorded, else the source's `own`, else the published ones."""
    recorded = [key for key in (record.meta_keys if record else ()) if key in binding.meta]
    stored = [tensor for key in recorded for tensor in binding.meta[key].tensors.values()]
    if len(set(stored)) == len(stored) == len(binding.logical):
        chosen = set(recorded)
    else:
        chosen = set(own) or {binding.spellings(tensor)[0] for tensor in binding.logical}
    return [key for key in (own if chosen == set(own) else binding.meta) if key in chosen]


def _loadable(binding: Binding, keys: list[str], ranks: int) -> tuple[list[str], list[str]]:
    """The keys that Meta's loader can split on so many ranks (`wqkv` only where they divide a head's width), and warnings."""
    width = binding.shape.sizes["Q"] // binding.shape.units["Q"]
    joined = [key for key in keys if key.endswith(".attention.wqkv.weight")]
    if width % ranks == 0 or not joined:
        return keys, []
    warning = (
        f"attention.wqkv.weight is written as wq, wk and wv: Meta's loader cannot split it on {ranks} ranks"
        f" where a head is {width} wide"
    )
    apart = {key: [binding.spellings(t)[-1] for t in binding.meta[key].tensors.values()] for key in joined}
    return [one for key in keys for one in apart.get(key, [key])], [warning]


def _params(source: MetaCheckpoint | TransformersCheckpoint) -> tuple[bytes, list[str]]:
    """params.json: the source's own where config.json says the same or is not there, else made of config.json; and warnings."""
    if isinstance(source, MetaCheckpoint):
        return source.small_files["params.json"], []
    config, path = Llama4Config.from_json(source.config), source.path / "original" / "params.json"
    if not path.is_file():
        return params_json(config), []
    data = read_small(path)
    try:
        params = json.loads(data)
        if config.vision_config is None and without_vision(params) != params:
            params = without_vision(params)
            data = (json.dumps(params, indent=2) + "\n").encode()
        g, c = Geometry.from_params(params), config.text_config
        g = g.completed(c.vocab_size, c.num_local_experts, c.intermediate_size, c.intermediate_size_mlp)
        found = next(contradictions(Llama4Config.from_geometry(g), config), None)
    except (ValueError, AttributeError, TypeError, RecursionError, GeometryError, ConfigError) as error:
        raise BadInput(f"original/params.json: {error}: remove it, and it is made of config.json") from error
    if found is None:
        return data, []
    warning = f"original/params.json is not what config.json says ({found.field}): params.json is made of config.json"
    return params_json(config), [warning]


def _tokenizer(source: Path, rows: int) -> dict[str, bytes]:
    """tokenizer.model by its name: the source's own, or made of tokenizer.json; empty if there is neither."""
    places = (source / _TOKENIZER, source / "original" / _TOKENIZER, source / "tokenizer.json")
    path = next((path for path in places if os.path.lexists(path)), None)
    if path is None:
        return {}
    data = read_small(path)
    if path.suffix == ".json":
        data = tokenizer_model(data)
    ids = TokenIds.from_tokenizer(data, rows)  # raises BadInput for a damaged tokenizer.model
    if ids and ids.vocab_size > rows:
        raise BadInput(
            f"{path.name} has {ids.vocab_size:,} tokens, and there are {rows:,} embeddings: of another model?"
        )
    return {_TOKENIZER: data}


def _origin(source: MetaCheckpoint | TransformersCheckpoint, record: Manifest | None, plan: Plan) -> dict[str, Any]:
    """The source as the manifest identifies it, with what only manifests tell: the first source's ranks, and the variant."""
    recorded_ranks = record.source.get("ranks") if record else None
    variant = "base" if plan.base_evidence else recorded_variant(record) if record else None
    found = {"ranks": recorded_ranks, "variant": variant, **origin(source)}
    return {name: value for name, value in found.items() if value}
