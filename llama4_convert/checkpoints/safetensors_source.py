"""A Transformers directory as a source of tensors, in the form in which the rank files of a Meta checkpoint are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints.pth import ITEM_SIZES, Record, StoredTensor, contiguous
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.errors import BadInput

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
