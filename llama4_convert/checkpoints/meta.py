"""A directory in Meta's original layout: params.json, tokenizer.model and one consolidated.NN.pth a rank.

Quantized originals have a file of scales a rank beside them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama4.geometry import Geometry, GeometryError
from llama4_convert.checkpoints.layouts import RANK_FILE, directory_names, no_checkpoint
from llama4_convert.checkpoints.manifest import NAME
from llama4_convert.checkpoints.meta_quantized import DequantizedView, with_scales
from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.checkpoints.tensors import Record, StoredTensor
from llama4_convert.checkpoints.wrapped_names import unwrapped
from llama4_convert.errors import BadInput
from llama4_convert.files import parse_object, read_small
from mappings import load_table


@dataclass(frozen=True)
class MetaCheckpoint:
    """An opened directory. Its ranks have the same keys and dtypes; which shapes they must have, the plan checks."""

    path: Path
    params: Mapping[str, Any]
    geometry: Geometry  # as params.json states it; open sizes are None
    ranks: tuple[PthIndex, ...]  # quantized experts are shown as bf16: see `meta_quantized`
    scales: tuple[PthIndex, ...]  # of quantized experts, one a rank, or none
    small_files: Mapping[str, bytes]  # params.json, and tokenizer.model where there is one
    notes: tuple[str, ...] = ()  # what a user should know of how the files are read

    @property
    def archives(self) -> tuple[PthIndex, ...]:
        """Every file of tensors, the ranks first: what a run opens, in the order in which a plan numbers them."""
        return self.ranks + self.scales

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self.ranks[0].tensors) | frozenset(self.ranks[0].others)

    def tensor(self, rank: int, key: str) -> StoredTensor:
        return self.ranks[rank].tensors[key]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> its shape in rank 0."""
        return {key: tensor.shape for key, tensor in self.ranks[0].tensors.items()}

    def records(self) -> Iterator[tuple[int, Record]]:
        """(number of the archive, record) of every storage record."""
        for number, index in enumerate(self.archives):
            for record in index.records:
                yield number, record

    @property
    def quantized(self) -> dict[str, DequantizedView]:
        """Key -> the view of rank 0, for the keys that hold codes."""
        tensors = self.ranks[0].tensors.items()
        return {key: tensor.record for key, tensor in tensors if isinstance(tensor.record, DequantizedView)}

    @property
    def unused_scales(self) -> dict[str, str]:
        """Keys of the files of scales that no tensor needs, and why."""
        used = {record.key for record in self.quantized.values()}
        return {key: "scales of a tensor that is not quantized" for i in self.scales for key in i.tensors.keys() - used}

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 a file: of the small files' bytes, and of the record names, sizes and CRCs of every archive.

        Identifies the content without reading the tensors, and independently of where the files lie.
        """
        small = {name: hashlib.sha256(data).hexdigest() for name, data in self.small_files.items()}
        return small | {index.path.name: index.fingerprint for index in self.archives}

    @staticmethod
    def open(path: Path) -> MetaCheckpoint:
        """Read the index of every rank file. Raises UsageError, BadInput or EnvironmentFailed."""
        files = rank_files(path)
        params, small = _read_params(path)
        tokenizer = path / "tokenizer.model"
        if os.path.lexists(tokenizer):
            small["tokenizer.model"] = read_small(tokenizer)
        try:
            geometry = Geometry.from_params(params)
        except GeometryError as error:
            raise BadInput(f"params.json: {error}") from error
        indices = tuple(PthIndex.read(file) for file in files)
        for index in indices[1:]:
            _check_agreement(indices[0], index)
        names, notes = unwrapped([*indices[0].tensors], load_table().meta_names.fullmatch, path.name)
        if notes:
            indices = tuple(
                replace(i, tensors={names[key]: tensor for key, tensor in i.tensors.items()}) for i in indices
            )
        ranks, scales = with_scales(path, indices)
        return MetaCheckpoint(path, params, geometry, ranks, scales, small, (*indices[0].notes, *notes))


def rank_files(path: Path) -> list[Path]:
    """The rank files in rank order. Raises UsageError, or BadInput if there are none, or one is missing between others."""
    found = {int(m[1]): path / name for name in sorted(directory_names(path)) if (m := RANK_FILE.fullmatch(name))}
    if not found:
        raise no_checkpoint(path)
    gap = next((rank for rank in range(max(found) + 1) if rank not in found), None)
    if gap is not None:
        raise BadInput(f"{path} lacks consolidated.{gap:02d}.pth: fetch it, every rank holds a part of every matrix")
    return [found[rank] for rank in range(len(found))]


def _read_params(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """params.json parsed, and {its name: its bytes}. Raises BadInput or EnvironmentFailed."""
    file = path / "params.json"
    if not os.path.lexists(file):
        if (path / NAME).exists():
            raise BadInput(f"{path} is an unfinished export: run its command again, it goes on where it stopped")
        raise BadInput(f"{path} has no params.json: it comes with the checkpoint, fetch it")
    data = read_small(file)
    return parse_object(data, file.name), {file.name: data}


def _check_agreement(first: PthIndex, other: PthIndex) -> None:
    a, b = {*first.tensors, *first.others}, {*other.tensors, *other.others}
    for key in sorted(a ^ b):
        has, lacks = (first, other) if key in a else (other, first)
        raise BadInput(f"the ranks disagree: {has.path.name} has {key}, {lacks.path.name} has not")
    for key in first.tensors.keys() & other.tensors.keys():
        if first.tensors[key].dtype != other.tensors[key].dtype:
            raise BadInput(
                f"the ranks disagree: {key} is {first.tensors[key].dtype} in {first.path.name}"
                f" and {other.tensors[key].dtype} in {other.path.name}"
            )
