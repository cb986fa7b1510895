"""`--vision-from`: a text-only fine-tune becomes a whole model again, with the vision tower of what it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llama4.config import Llama4Config
from llama4.config_fields import ConfigError
from llama4_convert.checkpoints import is_meta
from llama4_convert.checkpoints.manifest import Manifest
from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.checkpoints.tensors import TORCH_NAMES
from llama4_convert.checkpoints.transformers import SafetensorsIndex, TransformersCheckpoint
from llama4_convert.conversion.from_meta import MetaJob
from llama4_convert.conversion.from_transformers import open_directory, promises, small_files
from llama4_convert.conversion.job import ConversionJob, each_alone
from llama4_convert.conversion.quantization import quantization_config
from llama4_convert.conversion.request import Request, check_recipe, load_adapter, load_recipe
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
    text_of,
    vision_keys,
)
from llama4_convert.planning.binding import bind_directory, bind_source, check_replicas, check_tensors, shape_of_config
from llama4_convert.planning.encoded import linear_layers, output_tensors
from llama4_convert.planning.locations import Holding, Holdings, of_meta, of_transformers
from llama4_convert.planning.plan import Plan, gathered
from llama4_convert.planning.record_order import streamed_records
from llama4_convert.planning.shards import files_of, groups_of
from llama4_convert.streaming.job import Contents
from llama4_convert.version import TOOL
from mappings import MappingError, load_table

_VISION = "vision."  # how its logical tensors begin
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Base:
    """The model that a fine-tune was made from, in either layout, as far as it is needed."""

    path: Path
    config: Llama4Config
    body: Mapping[str, Any]  # its config.json, or what a conversion would write
    archives: Sequence[PthIndex | SafetensorsIndex]
    vision: Holdings
    compare: Sequence[tuple[str, int]]  # see `Plan`
    fingerprint: Mapping[str, str]
    files: Callable[[], Mapping[str, bytes]]  # those beside its weights

    @staticmethod
    def open(path: Path) -> Base:
        """Raises UsageError, BadInput or EnvironmentFailed."""
        try:
            base = _of_meta(path) if is_meta(path) else _of_transformers(path)
        except (MappingError, ConfigError) as error:
            raise BadInput(f"{path}: {error}") from error
        if base.config.vision_config is None:
            raise BadInput(
                f"{path} has no vision tower: give the model that the fine-tune was made from, not its text part"
            )
        return base


def _of_meta(path: Path) -> Base:
    job = MetaJob(Request(path))  # what it would become, for the files around the weights
    source = job.source
    binding, _ = bind_source(source.geometry, source)
    spelling = {name: key for name, key in binding.claim(source.keys).spelling.items() if name.startswith(_VISION)}
    check_tensors(binding, source)
    _, compare = check_replicas(binding, source, allow=False)
    contents = job.contents()

    def files() -> dict[str, bytes]:
        return {name: data for make in contents.values() for name, data in make().items()}

    body = json.loads(contents["config.json"]()["config.json"])
    used = set(spelling.values())
    return Base(
        path,
        Llama4Config.from_json(body),
        body,
        source.ranks,
        of_meta(binding, source, spelling),
        [(key, rank) for key, rank in compare if key in used],
        source.fingerprint(),
        files,
    )


def _of_transformers(path: Path) -> Base:
    source = TransformersCheckpoint.open_llama4(path)
    found, binding = bind_directory(source)
    holdings = of_transformers(binding, source)
    vision = {name: held for name, held in holdings.items() if name.startswith(_VISION)}
    return Base(path, found, source.config, source.files, vision, (), source.fingerprint(), lambda: small_files(path))


@dataclass(frozen=True)
class _Files:
    """What a run opens: the base's files first, since copies that ranks hold are compared with rank 0's."""

    archives: Sequence[PthIndex | SafetensorsIndex]


class VisionJob(ConversionJob):
    """A text-only Transformers directory with the vision tower of another checkpoint."""

    repaired: list[Repair]

    def __init__(self, request: Request) -> None:
        assert request.vision_from is not None
        super().__init__(request)
        if is_meta(request.source):
            raise UsageError(f"{request.source} is no Transformers directory: --vision-from is for text-only ones")
        self.text = _text_of(open_directory(request))
        self.base = base = Base.open(Path(request.vision_from))
        self.recipe = load_recipe(request.recipe) if request.recipe else None
        self.adapter = load_adapter(request.adapter)
        tensors = self.text.tensors
        try:
            found, expected = text_of(self.text.config), text_of(base.body)
            if apart := other_model(expected, tensors):
                raise BadInput(f"{request.source} is no fine-tune of {base.path}: {apart}")
            self.text_config, self.repaired = repair_text(found, expected, tensors)
        except ConfigError as error:
            raise BadInput(f"{request.source}: config.json: {error}") from error
        self.text = replace(self.text, config=self.text_config)
        self.source = _Files((*base.archives, *self.text.files))
        self.plan = self._plan()
        if self.recipe:
            check_recipe(self.recipe, self.plan)
        self.variant, self.variant_reason = "as the source", f"the text model is {request.source.name}'s"
        self.max_position_embeddings = int(self.text_config.get("max_position_embeddings") or 131072)
        self.promised, self.warnings = promises(self.text)
        if isinstance(base.archives[0], SafetensorsIndex):
            read = sorted({held.file for several in base.vision.values() for held in several})
            files = tuple(index for i in read if isinstance(index := base.archives[i], SafetensorsIndex))
            more, warnings = promises(TransformersCheckpoint(base.path, base.body, files))
            self.promised, self.warnings = {**self.promised, **more}, [*dict.fromkeys([*self.warnings, *warnings])]
        self._files = self._made_files()
        self.warnings += [one.sentence(base.path.name) for one in self.repaired]

    def _plan(self) -> Plan:
        try:
            text, text_binding = bind_directory(self.text)
            full = replace(self.base.config, text_config=text.text_config)
            binding = load_table().bind(shape_of_config(full))
            n = len(self.base.archives)
            holdings: dict[str, Sequence[Holding]] = dict(self.base.vision)
            for name, several in of_transformers(text_binding, self.text).items():
                holdings[name] = [replace(held, file=held.file + n) for held in several]
            changes = self.adapter.changes(binding) if self.adapter else {}
            tensors = output_tensors(binding, holdings, changes, None, self.recipe, self.request.device)
        except (MappingError, ConfigError) as error:
            raise BadInput(f"{self.request.source}: {error}") from error
        # Only a base in Meta's layout has checksums.
        records = {
            (piece.rank, piece.source.record.name): piece.source.record
            for tensor in tensors
            for piece in tensor.pieces
            if piece.source.record.crc is not None
        }
        streamed = streamed_records([tensor.pieces for tensor in tensors], self.source) & records.keys()
        files = files_of(groups_of(tensors, streamed), self.request.shard_size)
        reads = [gathered(read).pieces for file in files for read in file.reads()]
        streamed = streamed_records(reads, self.source) & records.keys()
        return Plan(
            geometry=full.to_geometry(),
            text_only=False,
            files=files,
            meta_keys=(),
            dropped={},
            base_evidence=(),
            streamed=streamed,
            unread=tuple((key[0], record) for key, record in sorted(records.items()) if key not in streamed),
            compare=tuple(self.base.compare),
            warnings=(),
            linear_layers=linear_layers(binding, self.recipe),
        )

    def _made_files(self) -> dict[str, bytes]:
        """The fine-tune's own small files; of the base's what is for pictures, and what the fine-tune lacks."""
        ours, theirs = small_files(self.request.source), self._base_files
        made = dict(ours)
        made |= {name: theirs[name] for name in _PROCESSOR if name in theirs}
        if not any(name in ours for name in ("tokenizer.json", "tokenizer.model")):
            taken = {name: theirs[name] for name in _TOKENIZER if name in theirs}
            made |= taken
            self._tell("tokenizer.json", taken)
        if _template(ours) is None and (template := _template(theirs)) is not None:
            made[_TEMPLATE] = template
            self._tell("chat_template", made)
        generation, told = repair_generation(ours.get(GENERATION), theirs.get(GENERATION))
        if generation is not None:
            made[GENERATION] = generation
        self.repaired += told
        made |= {name: data for name, data in theirs.items() if is_notice(name)}
        return made

    @cached_property
    def _base_files(self) -> Mapping[str, bytes]:
        return self.base.files()

    def _tell(self, field: str, taken: Mapping[str, bytes]) -> None:
        if taken:
            self.repaired.append(Repair(field, None, "the base's"))

    @cached_property
    def config(self) -> dict[str, Any]:
        name = "dtype" if "dtype" in self.base.body else "torch_dtype"
        dtype = TORCH_NAMES[self.plan.main_dtype]
        inner = {k: v for k, v in self.text_config.items() if k not in ("architectures", "dtype", "torch_dtype")}
        body = {
            **self.base.body,
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            name: dtype,
            "text_config": {**inner, "model_type": "llama4_text", name: dtype},
        }
        if self.recipe:
            body["quantization_config"] = quantization_config(self.recipe, self.plan)
        return body

    def contents(self) -> Contents:
        made = {"config.json": config.to_json(self.config), **self._files}
        return each_alone(made)

    def manifest(self) -> Manifest:
        options: dict[str, Any] = {"shard_size": self.request.shard_size, **self._recipe_options()}
        source = {"layout": "transformers", "sha256": self.text.fingerprint(), **self._adapter_source()}
        source["vision_from"] = dict(self.base.fingerprint)
        return Manifest(TOOL, source, options, [], {})


def _text_of(source: TransformersCheckpoint) -> TransformersCheckpoint:
    """The same with the keys of a text model. Raises UsageError if it is more than that."""
    if vision := vision_keys(source.tensors):
        raise UsageError(
            f"{source.path} has a vision tower of its own ({vision[0]}): --vision-from is for text-only models;"
            " --config-from repairs the config.json of any"
        )
    return source.without_prefix(TEXT_PREFIX)


def _template_inside(files: Mapping[str, bytes]) -> str | None:
    """The chat template in tokenizer_config.json, where Transformers 4 had it."""
    try:
        body = json.loads(files.get("tokenizer_config.json", b"{}"))
    except (ValueError, RecursionError):
        return None
    template = body.get("chat_template") if isinstance(body, dict) else None
    return template if isinstance(template, str) else None


def _template(files: Mapping[str, bytes]) -> bytes | None:
    inside = _template_inside(files)
    return files.get(_TEMPLATE) or (inside.encode() if inside else None)
