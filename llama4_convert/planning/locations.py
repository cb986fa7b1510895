"""Where a source stores the model's logical tensors: in which file, under which key, with which strides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.tensors import StoredTensor
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from mappings import Binding, MappingError, Placement
from mappings.matrices import linearized


@dataclass(frozen=True)
class StoredPart:
    """A stored tensor that holds a logical tensor, or a box of one, in the strides of `placement`.

    `file` numbers the source's files from 0: rank files, or safetensors files.
    """

    file: int
    key: str
    stored: StoredTensor
    placement: Placement


Locations = Mapping[str, Sequence[StoredPart]]  # by logical tensor


def locate_in_meta(binding: Binding, source: MetaCheckpoint, spelling: Mapping[str, str]) -> Locations:
    """Where rank files store each logical tensor. `spelling`: logical tensor -> the Meta key that stores it.

    Replicated tensors are located in the first rank.
    """
    ranks = len(source.ranks)
    found: dict[str, list[StoredPart]] = defaultdict(list)
    for key in dict.fromkeys(spelling.values()):
        for rank in range(1 if binding.is_replicated(key) else ranks):
            stored = source.tensor(rank, key)
            for placement in binding.meta_placements(key, ranks, rank, stored.strides):
                found[placement.tensor].append(StoredPart(rank, key, stored, placement))
    return found


def locate_in_transformers(binding: Binding, source: TransformersCheckpoint) -> Locations:
    """Where safetensors files store each logical tensor. Experts may be fused, or linear layers of their own.

    Raises MappingError for a key that is unknown, missing or of another shape than config.json makes it.
    """
    single = {m.key: m for key in binding.transformers for m in linearized(binding, key)}
    found: dict[str, list[StoredPart]] = defaultdict(list)
    for file, index in enumerate(source.files):
        for key, stored in index.tensors.items():
            expected: tuple[int, ...]
            if key in single:
                matrix = single[key]
                expected, placements = (matrix.n, matrix.k), [matrix.target]
            elif key in binding.transformers:
                expected, placements = binding.transformers_shape(key), binding.transformers_placements(key)
            else:
                raise MappingError(f"unknown key {key}: no Llama 4 of this config.json has it")
            if stored.shape != expected:
                raise MappingError(f"{key} has shape {list(stored.shape)}, but config.json makes it {list(expected)}")
            for placement in placements:
                found[placement.tensor].append(StoredPart(file, key, stored, placement))
    for name, logical in binding.logical.items():
        stored_elements = sum(prod(part.placement.box.size) for part in found[name])
        elements = prod(logical.sizes.values())
        if stored_elements != elements:
            keys = [key for key, stored in binding.transformers.items() if name in stored.tensors.values()]
            problem = "missing" if stored_elements < elements else "two keys hold"
            raise MappingError(f"{problem} {keys[0]}, or a part of it")
    return found
