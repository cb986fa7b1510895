"""`--config-from`: a fine-tune keeps its tensors and gets back what its config.json has lost, from what it was made from."""

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
from llama4_convert.conversion.from_meta import MetaJob
from llama4_convert.conversion.request import Request
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import json_object, read_small
from llama4_convert.metadata.config_repair import GENERATION, TEXT_PREFIX, Repair, repair, vision_keys

_CONFIG = "config.json"


@dataclass(frozen=True)
class BaseConfig:
    """What a base says of itself, in either layout. Of a Transformers directory no weights are needed."""

    path: Path
    body: Mapping[str, Any]  # its config.json, or what a conversion would write
    generation: bytes | None

    @staticmethod
    def open(path: Path) -> BaseConfig:
        """Raises UsageError, BadInput or EnvironmentFailed."""
        if is_meta(path):
            contents = MetaJob(Request(path)).contents()
            made = {name: contents[name]()[name] for name in (_CONFIG, GENERATION)}
            return BaseConfig(path, json.loads(made[_CONFIG]), made[GENERATION])
        if not (path / _CONFIG).is_file():
            raise UsageError(f"{path} has neither params.json (Meta's layout) nor config.json (Transformers')")
        generation = path / GENERATION
        return BaseConfig(path, json_object(path / _CONFIG), read_small(generation) if generation.is_file() else None)

    def repaired(self, source: TransformersCheckpoint) -> tuple[TransformersCheckpoint, list[Repair]]:
        """`source` with a repaired configuration; as a text model's, if its tensors are. Raises BadInput."""
        tensors = source.tensors
        try:
            body, told = repair(source.config, self.body, tensors)
        except (ConfigError, BadInput) as error:
            raise BadInput(f"{source.path}, with --config-from {self.path}: {error}") from error
        return replace(source if vision_keys(tensors) else source.without_prefix(TEXT_PREFIX), config=body), told

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of what is read of it."""
        made = {_CONFIG: json.dumps(self.body, sort_keys=True).encode(), GENERATION: self.generation}
        return {name: hashlib.sha256(data).hexdigest() for name, data in made.items() if data is not None}
