"""The index of a directory in Transformers' layout: config.json and the headers of its safetensors files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from msgspec import Struct

from llama4_convert.checkpoints.manifest import INDEX
from llama4_convert.checkpoints.safetensors_header import read_header
from llama4_convert.checkpoints.tensors import Record, StoredTensor
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import is_file_name, json_object
from quant.typed import InvalidField, decode

SINGLE = "model.safetensors"
_SAMPLE_BYTES = 4096


class _WeightIndex(Struct):
    """model.safetensors.index.json; other fields are of no interest."""

    weight_map: dict[str, str]
    """key -> the name of the file that holds the tensor"""


@dataclass(frozen=True)
class SafetensorsIndex:
    """One file: its tensors, each in a record of its own. safetensors has no checksums, so a record has none either."""

    path: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(tensor.record for tensor in self.tensors.values())

    @staticmethod
    def read(path: Path) -> SafetensorsIndex:
        """Raises BadInput or EnvironmentFailed."""
        return SafetensorsIndex(path, read_header(path))


@dataclass(frozen=True)
class TransformersCheckpoint:
    """An opened directory. Every tensor of its files is one that the index promises, and the other way round."""

    path: Path
    config: Mapping[str, Any]  # config.json
    files: tuple[SafetensorsIndex, ...]

    @staticmethod
    def open(path: Path) -> TransformersCheckpoint:
        """Read config.json, the index and every header. Raises UsageError, BadInput or EnvironmentFailed."""
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} has neither params.json (Meta's layout) nor config.json (Transformers')")
        config, weight_map = json_object(path / "config.json"), None
        if config.get("quantization_config", {}) is None:  # as Transformers reads it: not quantized
            del config["quantization_config"]
        if (path / INDEX).exists():
            try:
                weight_map = decode(json_object(path / INDEX), _WeightIndex, INDEX).weight_map
            except InvalidField as error:
                raise BadInput(f"{error}: convert again, or download it again") from error
            names = sorted(set(weight_map.values()))
        elif (path / SINGLE).exists():
            names = [SINGLE]
        else:
            raise BadInput(f"{path} has no {INDEX}: the conversion is unfinished, run it again")
        for name in names:
            if not is_file_name(name):
                raise BadInput(f"{INDEX} names a file that is not in the directory: {name!r:.80}")
        files = tuple(SafetensorsIndex.read(path / name) for name in names)
        if weight_map is not None:
            _check_index(weight_map, files)
        return TransformersCheckpoint(path, config, files)

    @staticmethod
    def open_llama4(path: Path) -> TransformersCheckpoint:
        """As `open`; raises BadInput, too, where config.json names another kind of model."""
        checkpoint = TransformersCheckpoint.open(path)
        kind = checkpoint.config.get("model_type")
        if kind not in (None, "llama4", "llama4_text"):
            raise BadInput(f"config.json: model_type is {kind!r:.40}: this is no Llama 4")
        return checkpoint

    @property
    def archives(self) -> tuple[SafetensorsIndex, ...]:
        """Every file of tensors: what a run opens."""
        return self.files

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {key: tensor for index in self.files for key, tensor in index.tensors.items()}

    @cached_property
    def paths(self) -> Mapping[str, Path]:
        """Key -> the file that holds the tensor."""
        return {key: index.path for index in self.files for key in index.tensors}

    def without_prefix(self, prefix: str) -> TransformersCheckpoint:
        """The same with shorter keys."""
        shortened = (
            {key.removeprefix(prefix): tensor for key, tensor in index.tensors.items()} for index in self.files
        )
        files = tuple(SafetensorsIndex(i.path, tensors) for i, tensors in zip(self.files, shortened, strict=True))
        return replace(self, files=files)

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 a file: of config.json, and of what each weights file says of itself and three samples of each tensor.

        Not of all weights: reading hundreds of GB to recognize them would double the work. A manifest of ours in the source
        has their digests and is taken in.
        """
        found = {}
        for name in ("config.json", "llama4-convert.json"):
            if (self.path / name).is_file():
                found[name] = hashlib.sha256((self.path / name).read_bytes()).hexdigest()
        for index in self.files:
            listed = [(k, t.dtype, t.shape, t.record) for k, t in index.tensors.items()]
            digest = hashlib.sha256(repr((index.path.stat().st_size, listed)).encode())
            with open(index.path, "rb") as file:
                for record in index.records:
                    for start in (0, record.size // 2, max(0, record.size - _SAMPLE_BYTES)):
                        file.seek(record.offset + start)
                        digest.update(file.read(min(_SAMPLE_BYTES, record.size - start)))
            found[index.path.name] = digest.hexdigest()
        return found


def _check_index(weight_map: Mapping[str, str], files: tuple[SafetensorsIndex, ...]) -> None:
    present = {key for index in files for key in index.tensors}
    for index in files:
        for key in index.tensors:
            if weight_map.get(key) != index.path.name:
                raise BadInput(f"{INDEX} does not say that {key} is in {index.path.name}, where it is")
    for key in sorted(weight_map.keys() - present):
        raise BadInput(f"{INDEX} promises {key} in {weight_map[key]}, which lacks it")
