"""`export`: from a Transformers directory, or from Meta's at another rank count, to Meta's layout.

The same table read the other way: each rank's tensors are boxes of logical ones, gathered from wherever the source has them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from llama4.config import Llama4Config
from llama4.config_fields import ConfigError
from llama4.geometry import Geometry, GeometryError
from llama4_convert.checkpoints import is_meta
from llama4_convert.checkpoints.manifest import MOST_RANKS, Manifest
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.meta_quantized import CODES
from llama4_convert.checkpoints.pth_writer import PthArchive
from llama4_convert.checkpoints.state_dict_pickle import PthTensor
from llama4_convert.checkpoints.tensors import TORCH_NAMES
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.conversion.from_transformers import promises
from llama4_convert.conversion.job import each_alone
from llama4_convert.conversion.request import load_recipe
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import notices, read_small
from llama4_convert.metadata.params import contradictions, params_json, without_vision
from llama4_convert.metadata.tokenizer import TokenIds, tokenizer_model
from llama4_convert.metadata.variant import recorded_variant
from llama4_convert.planning.binding import bind_directory, bind_source, check_replicas, check_tensors
from llama4_convert.planning.encoded import is_quantized, planned_codes, planned_tensor
from llama4_convert.planning.locations import Holdings, of_meta, of_transformers
from llama4_convert.planning.plan import Plan, PlannedFile, PlannedTensor
from llama4_convert.planning.record_order import streamed_records, unread_records
from llama4_convert.progress import Progress, Start, Warn
from llama4_convert.streaming.bounds import DEFAULT_MEMORY, Bounds
from llama4_convert.streaming.execution import execute
from llama4_convert.streaming.job import Contents, Job
from llama4_convert.streaming.memory import peak_memory
from llama4_convert.version import TOOL
from mappings import Binding, MappingError
from quant.error import relative_mse, sqnr_db

_TORCH = {**TORCH_NAMES, CODES: "float8_e4m3fn"}
_DEFAULT_RANKS = 8  # Scout's and Maverick's


@dataclass(frozen=True)
class ExportRequest:
    """What is asked for. `ranks` None: as many as the source was made from, or 8."""

    source: Path
    ranks: int | None = None
    allow_rank_mismatch: bool = False
    recipe: str | None = None  # one of the format meta: a built-in one's name, or the path of a TOML file

    def __post_init__(self) -> None:
        if self.ranks is not None and not 1 <= self.ranks <= MOST_RANKS:
            raise UsageError(f"ranks must be from 1 to {MOST_RANKS}, not {self.ranks}")


@dataclass(frozen=True)
class RankFile(PlannedFile):
    """One consolidated.NN.pth. `total`: its size, of which the tensors are a part."""

    total: int = 0

    @property
    def size(self) -> int:
        return self.total

    def envelope(self) -> PthArchive:
        return _archive(self.name, self.tensors)


def _archive(name: str, tensors: tuple[PlannedTensor, ...]) -> PthArchive:
    return PthArchive(Path(name).stem, [PthTensor(t.name, _TORCH[t.dtype], t.shape) for t in tensors])


class ExportJob(Job):
    """An export bound to its source."""

    marker = "params.json"  # Meta's code reads it first, and so does ours
    weights = "consolidated.*.pth"

    def __init__(self, request: ExportRequest) -> None:
        self.request = request
        self.recipe = load_recipe(request.recipe, to_meta=True) if request.recipe else None
        self.warnings = []
        self.from_manifest = Manifest.read(request.source) if request.source.is_dir() else None
        if is_meta(request.source):
            self._of_meta(request)
        else:
            self._of_transformers(request)
        if self.recipe and not any(file.made_with for file in self.plan.files):
            raise UsageError(f"recipe {self.recipe.name} quantizes nothing of this model: leave it out")
        if self.tokenizer is None:
            self.warnings.append("the source has no tokenizer: copy tokenizer.model from the model's page")

    def _of_meta(self, request: ExportRequest) -> None:
        self.source = source = MetaCheckpoint.open(request.source)
        self.ranks = request.ranks or len(source.ranks)
        try:
            self.binding, geometry = bind_source(source.geometry, source)
            claims = self.binding.claim(source.keys)
            check_tensors(self.binding, source)
            warnings, compare = check_replicas(self.binding, source, request.allow_rank_mismatch)
            keys = self._spelling([key for key in source.ranks[0].tensors if key in self.binding.meta])
            files = self._files(of_meta(self.binding, source, claims.spelling), self._loadable(keys))
        except MappingError as error:
            raise BadInput(f"{source.path.name}: {error}") from error
        self.warnings += warnings
        streamed = streamed_records([t.pieces for file in files for t in file.tensors], source)
        self.plan = Plan(
            geometry=geometry,
            text_only=geometry.vision is None,
            files=files,
            meta_keys=tuple(sorted(keys)),
            dropped={key: rule.why for key, rule in claims.dropped.items()} | source.unused_scales,
            base_evidence=tuple(key for key, rule in claims.dropped.items() if rule.only_in == "base"),
            streamed=streamed,
            unread=unread_records(source, streamed, set()),
            compare=tuple(compare),
            warnings=tuple(warnings),
        )
        self.params = source.small_files["params.json"]

    def _of_transformers(self, request: ExportRequest) -> None:
        self.source = source = TransformersCheckpoint.open_llama4(request.source)
        self.promised, self.warnings = promises(source)
        if "quantization_config" in source.config:
            raise UsageError(f"{request.source} is quantized: export what it was made from")
        self.ranks = request.ranks or self.recorded_ranks or _DEFAULT_RANKS
        try:
            config, self.binding = bind_directory(source)
            holdings = of_transformers(self.binding, source)
            keys = self._spelling()
            files = self._files(holdings, self._loadable(keys))
        except (MappingError, ConfigError) as error:
            raise BadInput(f"{source.path}: {error}") from error
        self.plan = Plan(
            geometry=config.to_geometry(),
            text_only=config.vision_config is None,
            files=files,
            meta_keys=tuple(sorted(keys)),
            dropped={},
            base_evidence=(),
            streamed=frozenset(),
            unread=(),
            compare=(),
            warnings=(),
        )
        self.params = self._params(config)

    @property
    def recorded_ranks(self) -> int | None:
        """How many the source was made from, where its manifest tells."""
        return self.from_manifest.source.get("ranks") if self.from_manifest else None

    @property
    def known_variant(self) -> str | None:
        """What kind of model it is, where that is known: no tensor of an export tells it."""
        if self.plan.base_evidence:
            return "base"
        return recorded_variant(self.from_manifest) if self.from_manifest else None

    def _spelling(self, own: Sequence[str] = ()) -> list[str]:
        """The keys to write: those that the source's manifest recorded, else the source's `own`, else the published ones."""
        recorded = self.from_manifest.meta_keys if self.from_manifest else ()
        known = [key for key in recorded if key in self.binding.meta]
        held = [tensor for key in known for tensor in self.binding.meta[key].tensors.values()]
        if len(set(held)) == len(held) == len(self.binding.logical):
            chosen = set(known)
        else:
            chosen = set(own) or {self.binding.spellings(tensor)[0] for tensor in self.binding.logical}
        return [key for key in (own if chosen == set(own) else self.binding.meta) if key in chosen]

    def _loadable(self, keys: list[str]) -> list[str]:
        """The same where Meta's loader takes them on so many ranks: of `wqkv` it wants rows a head that are even."""
        width = self.binding.shape.sizes["Q"] // self.binding.shape.units["Q"]
        joined = [key for key in keys if key.endswith(".attention.wqkv.weight")]
        own = len(self.source.ranks) if isinstance(self.source, MetaCheckpoint) else None
        if width % self.ranks == 0 or not joined or self.ranks in (own, self.recorded_ranks):
            return keys
        self.warnings.append(
            f"attention.wqkv.weight is written as wq, wk and wv: Meta's loader cannot split it on {self.ranks} ranks"
            f" where a head is {width} wide"
        )
        apart = {
            key: [self.binding.spellings(t)[-1] for t in self.binding.meta[key].tensors.values()] for key in joined
        }
        return [one for key in keys for one in apart.get(key, [key])]

    def _params(self, config: Llama4Config) -> bytes:
        """The original's where it still says what config.json says, else made of that."""
        path = self.request.source / "original" / "params.json"
        if not path.is_file():
            return params_json(config)
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
            return data
        self.warnings.append(
            f"original/params.json is not what config.json says ({found.field}): params.json is made of config.json"
        )
        return params_json(config)

    def _files(self, holdings: Holdings, keys: list[str]) -> tuple[RankFile, ...]:
        """The files of all ranks. Raises MappingError if the model cannot be cut so."""
        binding, ranks = self.binding, self.ranks
        if why := _cannot_be_cut(binding, keys, ranks):
            possible = [str(n) for n in range(1, 17) if not _cannot_be_cut(binding, keys, n)]
            raise MappingError(f"{why}: take {' or '.join(possible)} ranks")
        files = []
        for rank in range(ranks):
            name = f"consolidated.{rank:02d}.pth"
            tensors, scales = [], []
            for key in keys:
                tensor = planned_tensor(
                    key, binding.meta_shape(key, ranks), binding.meta_placements(key, ranks, rank), holdings
                )
                if self.recipe and is_quantized(self.recipe, key, binding.shape.n_layers):
                    tensor, of_it = planned_codes(tensor, binding.shape.sizes["E"], name)
                    scales.append(of_it)
                tensors.append(tensor)
            replicas = frozenset(key for key in keys if rank and binding.is_replicated(key))
            files.append(_rank_file(name, tensors, replicas, None))
            if scales:
                files.append(_rank_file(f"fp8_scales_{rank}.pt", scales, frozenset(), name))
        return tuple(files)

    def contents(self) -> Contents:
        groups = each_alone(notices(self.request.source))
        if self.tokenizer:
            groups["tokenizer.model"] = lambda: {"tokenizer.model": self.tokenizer or b""}
        return groups

    @cached_property
    def tokenizer(self) -> bytes | None:
        """The content of tokenizer.model: the source's own, or made of tokenizer.json."""
        source, rows = self.request.source, self.plan.geometry.vocab_size or 0
        places = (source / "tokenizer.model", source / "original" / "tokenizer.model", source / "tokenizer.json")
        path = next((path for path in places if os.path.lexists(path)), None)
        if path is None:
            return None
        data = read_small(path)
        if path.suffix == ".json":
            data = tokenizer_model(data)
        ids = TokenIds.of(data, rows)  # which reads it
        if ids and ids.vocab_size > rows:
            raise BadInput(
                f"{path.name} has {ids.vocab_size:,} tokens, and there are {rows:,} embeddings: of another model?"
            )
        return data

    def closing(self, manifest: Manifest) -> dict[str, bytes]:
        return {}  # Meta's layout has no card

    def marker_content(self) -> bytes:
        return self.params

    def peak_memory(self, max_memory: int) -> int:
        own = self.request.source / "tokenizer.json"
        return peak_memory(
            max_memory, own.stat().st_size if own.is_file() and not is_meta(own.parent) else 0, self.plan
        )

    def manifest(self) -> Manifest:
        source: dict[str, Any] = {"layout": "transformers", "sha256": self.source.fingerprint()}
        if isinstance(self.source, MetaCheckpoint):
            source |= {"layout": "meta", "ranks": len(self.source.ranks)}
        elif self.recorded_ranks:
            source["ranks"] = self.recorded_ranks
        if self.known_variant:
            source["variant"] = self.known_variant
        options = {"layout": "meta", "ranks": self.ranks, **self._recipe_options()}
        return Manifest(
            TOOL, json.loads(json.dumps(source)), options, list(self.plan.meta_keys), dict(self.plan.dropped)
        )

    def quantization(self, errors: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
        assert self.recipe is not None
        codes = [tensor for tensor in self.plan.tensors if tensor.dtype == CODES]
        made = [tensor.scales.experts for tensor in codes if tensor.scales]
        relative = relative_mse(math.fsum(e for e, _ in errors.values()), math.fsum(p for _, p in errors.values()))
        return {
            "recipe": self.recipe.name,
            "matrices": sum(made),
            "kept_bits": (len(codes) - len(made)) * self.binding.shape.sizes["E"],
            "relative_mse": relative,
            "sqnr_db": sqnr_db(relative),
        }

    def told(self) -> dict[str, Any]:
        return {
            "ranks": self.ranks,
            "parameters": sum(prod(logical.sizes.values()) for logical in self.binding.logical.values()),
            "output_bytes": self.plan.output_bytes,
            "dropped": self._dropped(),
        }


def _rank_file(
    name: str, tensors: Sequence[PlannedTensor], replicas: frozenset[str], made_with: str | None
) -> RankFile:
    kept = tuple(tensors)
    return RankFile(name, b"", kept, replicas, made_with, _archive(name, kept).size)


def _cannot_be_cut(binding: Binding, keys: list[str], ranks: int) -> str:
    """Why so many ranks cannot share the model; empty if they can."""
    try:
        for key in keys:
            binding.meta_shape(key, ranks)
    except MappingError as error:
        return str(error)
    return ""


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    max_memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
    warn: Warn = lambda text: None,
    start: Start = lambda total, done: None,
    progress: Progress = lambda n: None,
    **options: Any,
) -> dict[str, Any]:
    """Write the checkpoint at `source`, in either layout, to `target` in Meta's: rank files, params.json, tokenizer.model.

    `options` are the fields of `ExportRequest`; the rest is as for `convert`. Keys have the spelling that the source has, or that
    was recorded when it was converted, else the published one. Raises a ConvertError; the target then has no params.json.
    """
    request = ExportRequest(Path(source), **options)
    bounds = Bounds(max_memory, None, overwrite)
    return execute(lambda: ExportJob(request), [Path(source)], Path(target), bounds, warn, start, progress)
