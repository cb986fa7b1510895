"""`--config-from`: a fine-tune keeps its tensors; fields that its config.json has lost come from its base model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama4.config_fields import ConfigError
from llama4_convert.checkpoints import is_meta
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.conversion.from_meta import from_meta
from llama4_convert.conversion.request import Request
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import json_object, read_small
from llama4_convert.metadata.config_repair import GENERATION, TEXT_PREFIX, Repair, repair, vision_keys

_CONFIG = "config.json"


@dataclass(frozen=True)
class BaseConfig:
    """The configuration of a base model, in either layout. A base in Transformers' layout needs no weight files."""

    path: Path
    body: Mapping[str, Any]  # config.json; for Meta's layout that of its conversion
    generation: bytes | None  # generation_config.json

    @staticmethod
    def open(path: Path) -> BaseConfig:
        """Raises UsageError, BadInput or EnvironmentFailed."""
        if is_meta(path):
            made = from_meta(Request(path)).job.contents()
            return BaseConfig(path, json.loads(made[_CONFIG]), made[GENERATION])
        if not (path / _CONFIG).is_file():
            raise UsageError(f"{path} has neither params.json (Meta's layout) nor config.json (Transformers')")
        generation = path / GENERATION
        return BaseConfig(path, json_object(path / _CONFIG), read_small(generation) if generation.is_file() else None)

    def repaired(self, source: TransformersCheckpoint) -> tuple[TransformersCheckpoint, list[Repair]]:
        """`source` with a repaired configuration: that of a text model where no tensor is of a vision tower. Raises BadInput."""
        tensors = source.tensors
        try:
            body, repairs = repair(source.config, self.body, tensors)
        except (ConfigError, BadInput) as error:
            raise BadInput(f"{source.path}, with --config-from {self.path}: {error}") from error
        return replace(source if vision_keys(tensors) else source.without_prefix(TEXT_PREFIX), config=body), repairs

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the files that a repair reads."""
        read = {_CONFIG: json.dumps(self.body, sort_keys=True).encode(), GENERATION: self.generation}
        return {name: hashlib.sha256(data).hexdigest() for name, data in read.items() if data is not None}
