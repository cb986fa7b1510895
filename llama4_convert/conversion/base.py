"""The model that a fine-tune was made from, in either layout: `--config-from` and `--vision-from` name it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints.digests import Digest
from llama4_convert.checkpoints.layouts import directory_names, is_meta
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.conversion.bound_request import BoundRequest, bound_request
from llama4_convert.conversion.from_meta import from_meta
from llama4_convert.conversion.request import Request
from llama4_convert.conversion.small_files import kept_files, source_digests
from llama4_convert.errors import BadInput
from llama4_convert.files import json_object, read_small
from llama4_convert.metadata.config_repair import GENERATION, Repair, repair_generation
from llama4_convert.planning.binding import VISION_PREFIX, BoundSource, bind_transformers

_CONFIG = "config.json"


@dataclass(frozen=True)
class Base:
    """A base model; `config` and `files` of one in Meta's layout are those of its conversion."""

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, bytes]  # small files beside config.json

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the files that a repair reads."""
        read = {_CONFIG: json.dumps(self.config, sort_keys=True).encode(), GENERATION: self.files.get(GENERATION)}
        return {name: hashlib.sha256(data).hexdigest() for name, data in read.items() if data is not None}

    def repair_generation(self, files: dict[str, bytes]) -> list[Repair]:
        """Repair generation_config.json among a fine-tune's `files`, in place."""
        repaired, repairs = repair_generation(files.get(GENERATION), self.files.get(GENERATION))
        if repaired is not None:
            files[GENERATION] = repaired
        return repairs


@dataclass(frozen=True)
class WholeBase(Base):
    """A base model with its weights, among them a vision tower."""

    bound: BoundSource
    sha256: Mapping[str, str]  # as the manifest identifies it
    expected_digests: Mapping[Path, Digest] = field(default_factory=dict)  # of the files that hold the vision tower
    warnings: Sequence[str] = ()


def open_base_config(path: Path) -> Base:
    """The configuration of a base; in Transformers' layout no weights need be there.

    Raises UsageError, BadInput or EnvironmentFailed.
    """
    if _CONFIG not in directory_names(path) and is_meta(path):
        files = _converted(path).job.contents()
        return Base(path, json.loads(files[_CONFIG]), files)
    config, generation = json_object(path / _CONFIG), path / GENERATION
    return Base(path, config, {GENERATION: read_small(generation)} if generation.is_file() else {})


def open_base(path: Path) -> WholeBase:
    """A base with a vision tower. Raises UsageError, BadInput or EnvironmentFailed."""
    if is_meta(path):
        made = _converted(path)
        files = {**made.job.contents(), **(made.job.tokenizer.files() if made.job.tokenizer else {})}
        source = made.source
        base = WholeBase(path, json.loads(files[_CONFIG]), files, source.bound, source.checkpoint.fingerprint())
    else:
        checkpoint = TransformersCheckpoint.open_llama4(path)
        bound = bind_transformers(checkpoint)
        vision = (parts for name, parts in bound.locations.items() if name.startswith(VISION_PREFIX))
        read = sorted({part.file for parts in vision for part in parts})
        digests, warnings = source_digests(replace(checkpoint, files=tuple(checkpoint.files[n] for n in read)))
        files, sha256 = kept_files(path), checkpoint.fingerprint()
        base = WholeBase(path, checkpoint.config, files, bound, sha256, digests, warnings)
    if base.bound.geometry.vision is None:
        raise BadInput(
            f"{path} has no vision tower: give the model that the fine-tune was made from, not its text part"
        )
    return base


def _converted(path: Path) -> BoundRequest:
    """The conversion of a base in Meta's layout, planned."""
    request = Request(path)
    return bound_request(request, from_meta(request))
