"""A Transformers directory as the source of a conversion: its weights by a recipe, or with an adapter merged; all else as it is.

Fine-tunes come so.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints.digests import Digest, expected_digests
from llama4_convert.checkpoints.manifest import INDEX, NAME, Manifest
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.conversion.base_config import BaseConfig
from llama4_convert.conversion.job import ConversionJob, each_alone
from llama4_convert.conversion.quantization import quantization_config
from llama4_convert.conversion.request import Request, check_recipe, load_adapter, load_recipe
from llama4_convert.errors import UsageError
from llama4_convert.files import is_file_name, is_notice, read_small
from llama4_convert.metadata import config
from llama4_convert.metadata.config_repair import GENERATION, repair_generation
from llama4_convert.metadata.model_card import CARD, SOURCE_CARD
from llama4_convert.planning.planner import plan_directory
from llama4_convert.streaming.job import Contents
from llama4_convert.version import TOOL

_DECIDING = ("config.json", "tokenizer.json", "tokenizer.model", "original/params.json")
_KEPT = {".json", ".jinja", ".model", ".txt", ".md"}  # tokenizer, templates, other configurations: no code, no weights
_META_ONLY = {
    "variant": "--variant",
    "dtype": "--dtype",
    "text_only": "--text-only",
    "max_position_embeddings": "--max-position-embeddings",
    "allow_rank_mismatch": "--allow-rank-mismatch",
}


def promises(source: TransformersCheckpoint) -> tuple[dict[Path, Digest], list[str]]:
    """Of the files that decide what is written, what they must be; and a warning if that is not known of all weights."""
    others = (source.path / name for name in _DECIDING)
    weights = [index.path for index in source.files]
    found = expected_digests([*weights, *(path for path in others if path.is_file())])
    left = len([path for path in weights if path not in found])
    if not left:
        return found, []
    some = f"{left} of {len(source.files)} files" if left < len(source.files) else "its files"
    return found, [f"the source has no checksums: nothing says what {some} should be, and they are taken as they are"]


def open_directory(request: Request) -> TransformersCheckpoint:
    """The request's source. Raises UsageError for options that are not for it."""
    for name, option in _META_ONLY.items():
        if getattr(request, name):
            raise UsageError(f"{option} is for Meta's layout: a Transformers directory keeps what it says")
    source = TransformersCheckpoint.open_llama4(request.source)
    if "quantization_config" in source.config:
        raise UsageError(f"{request.source} is quantized already: take what it was made from")
    return source


def small_files(folder: Path) -> dict[str, bytes]:
    """What a directory holds beside its weights, its index and config.json.

    The card of what is made of it is ours. One that the directory brings is kept under another name, unless it is ours as
    well: it would tell of other files.
    """
    made: dict[str, bytes] = {}
    for path in sorted(folder.iterdir()):
        wanted = path.name not in {"config.json", INDEX, NAME} and (is_notice(path.name) or path.suffix in _KEPT)
        if wanted and is_file_name(path.name) and path.is_file():
            made[path.name] = read_small(path)
    if theirs := made.pop(CARD, None):
        before = Manifest.read(folder)
        entry = before.files.get(CARD) if before else None
        if entry is None or entry.sha256 != hashlib.sha256(theirs).hexdigest():
            name = SOURCE_CARD
            while name in made:
                name = f"{name.removesuffix('.md')}.source.md"
            made[name] = theirs
    return made


class TransformersJob(ConversionJob):
    """What is in Transformers' layout already, experts fused or linearized: quantized, an adapter merged into it, or repaired."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.source = source = open_directory(request)
        if request.recipe is None and request.adapter is None and request.config_from is None:
            raise UsageError(
                f"{request.source} is in Transformers' layout already: add --recipe to quantize it, --adapter to merge one,"
                " or --config-from to repair its config.json"
            )
        self.small_files = small_files(request.source)
        self.config_base = None
        if request.config_from is not None:
            self.config_base = base = BaseConfig.open(Path(request.config_from))
            self.source, repaired = base.repaired(source)
            generation, told = repair_generation(self.small_files.get(GENERATION), base.generation)
            if generation is not None:
                self.small_files[GENERATION] = generation
            self.repaired = [*repaired, *told]
        self.recipe = load_recipe(request.recipe) if request.recipe else None
        self.adapter = load_adapter(request.adapter)
        self.plan = plan_directory(self.source, self.recipe, request.shard_size, request.device, self.adapter)
        if self.recipe:
            check_recipe(self.recipe, self.plan)
        self.variant, self.variant_reason = "as the source", "all files but the weights are the source's"
        text: Any = self.source.config.get("text_config") or self.source.config
        self.max_position_embeddings = int(text.get("max_position_embeddings") or 131072)
        self.promised, self.warnings = promises(self.source)
        if self.config_base:
            self.warnings += [one.sentence(self.config_base.path.name) for one in self.repaired or ()]

    @cached_property
    def config(self) -> dict[str, Any]:
        body = dict(self.source.config)
        if self.recipe:
            body["quantization_config"] = quantization_config(self.recipe, self.plan)
        return body

    def contents(self) -> Contents:
        """The source's own small files, with config.json telling of the quantization."""
        made = {"config.json": config.to_json(self.config), **self.small_files}
        params = self.request.source / "original" / "params.json"
        if params.is_file():
            made["original/params.json"] = read_small(params)
        return each_alone(made)

    def manifest(self) -> Manifest:
        options: dict[str, Any] = {"shard_size": self.request.shard_size, **self._recipe_options()}
        source = {"layout": "transformers", "sha256": self.source.fingerprint(), **self._adapter_source()}
        if self.config_base:
            source["config_from"] = self.config_base.fingerprint()
        return Manifest(TOOL, json.loads(json.dumps(source)), options, [], {})
