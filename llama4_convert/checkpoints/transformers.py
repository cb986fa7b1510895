"""The index of a directory in Transformers' layout: config.json and the headers of its safetensors files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints.safetensors_header import SafeTensor, read_header
from llama4_convert.checkpoints.tensors import ITEM_SIZES, Record, StoredTensor, contiguous
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import is_file_name, json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TransformersCheckpoint:
    path: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, SafeTensor]

    @staticmethod
    def open(path: Path) -> TransformersCheckpoint:
        """Read config.json, the index and every header. Raises UsageError, BadInput or EnvironmentFailed."""
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} has neither params.json (Meta's layout) nor config.json (Transformers')")
        config = json_object(path / "config.json")
        if (path / INDEX).exists():
            weight_map = json_object(path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise BadInput(f"{INDEX} has no weight_map: convert again, or download it again")
            names = sorted({str(name) for name in weight_map.values()})
        elif (path / SINGLE).exists():
            weight_map, names = None, [SINGLE]
        else:
            raise BadInput(f"{path} has no {INDEX}: the conversion is unfinished, run it again")
        for name in names:
            if not is_file_name(name):
                raise BadInput(f"{INDEX} names a file that is not in the directory: {name!r:.80}")
        tensors: dict[str, SafeTensor] = {}
        for name in names:
            for key, tensor in read_header(path / name).items():
                if weight_map is not None and weight_map.get(key) != name:
                    raise BadInput(f"{INDEX} does not say that {key} is in {name}, where it is")
                tensors[key] = tensor
        absent = sorted((weight_map or {}).keys() - tensors.keys())
        if absent:
            raise BadInput(f"{INDEX} promises {absent[0]} in {(weight_map or {})[absent[0]]}, which lacks it")
        return TransformersCheckpoint(path, config, tuple(path / name for name in names), tensors)


_SAMPLE = 4096  # bytes


@dataclass(frozen=True)
class SafetensorsIndex:
    """One file: its tensors, each in a record of its own. safetensors has no checksums, so a record has none either."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    records: tuple[Record, ...]


@dataclass(frozen=True)
class SafetensorsSource:
    path: Path
    config: Mapping[str, Any]
    ranks: tuple[SafetensorsIndex, ...]

    @staticmethod
    def open(path: Path) -> SafetensorsSource:
        """Read config.json, the index and every header. Raises UsageError, BadInput or EnvironmentFailed."""
        checkpoint = TransformersCheckpoint.open(path)
        kind = checkpoint.config.get("model_type")
        if kind not in (None, "llama4", "llama4_text"):
            raise BadInput(f"config.json: model_type is {kind!r:.40}: this is no Llama 4")
        files = []
        for file in checkpoint.files:
            tensors = {
                key: StoredTensor(t.dtype, t.shape, contiguous(t.shape), 0, Record(key, t.offset, t.nbytes, None))
                for key, t in checkpoint.tensors.items()
                if t.file == file and t.dtype in ITEM_SIZES
            }
            files.append(SafetensorsIndex(file, tensors, tuple(t.record for t in tensors.values())))
        return SafetensorsSource(path, checkpoint.config, tuple(files))

    @property
    def archives(self) -> tuple[SafetensorsIndex, ...]:
        """Every file of tensors: what a run opens."""
        return self.ranks

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return {key: tensor for index in self.ranks for key, tensor in index.tensors.items()}

    def without_prefix(self, prefix: str) -> SafetensorsSource:
        """The same with shorter keys."""
        ranks = tuple(
            replace(index, tensors={key.removeprefix(prefix): tensor for key, tensor in index.tensors.items()})
            for index in self.ranks
        )
        return replace(self, ranks=ranks)

    @property
    def files(self) -> list[Path]:
        return [index.path for index in self.ranks]

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 a file: of config.json, and of what each weights file says of itself and three samples of each tensor.

        Not of all weights: reading hundreds of GB to recognize them would double the work. A manifest of ours in the source
        has their digests and is taken in.
        """
        found = {}
        for name in ("config.json", "llama4-convert.json"):
            if (self.path / name).is_file():
                found[name] = hashlib.sha256((self.path / name).read_bytes()).hexdigest()
        for index in self.ranks:
            told = [(k, t.dtype, t.shape, t.record) for k, t in index.tensors.items()]
            digest = hashlib.sha256(repr((index.path.stat().st_size, told)).encode())
            with open(index.path, "rb") as file:
                for record in index.records:
                    for start in (0, record.size // 2, max(0, record.size - _SAMPLE)):
                        file.seek(record.offset + start)
                        digest.update(file.read(min(_SAMPLE, record.size - start)))
            found[index.path.name] = digest.hexdigest()
        return found
