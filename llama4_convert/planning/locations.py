"""Where a source holds the model's logical tensors: in which file, under which key, in which strides."""

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
class Holding:
    """A stored tensor that holds a logical one, or a part of it. `file` counts the source's files: its ranks, or shards."""

    file: int
    key: str
    stored: StoredTensor
    placement: Placement


Holdings = Mapping[str, Sequence[Holding]]


def of_meta(binding: Binding, source: MetaCheckpoint, spelling: Mapping[str, str]) -> Holdings:
    """`spelling`: logical tensor -> the Meta key that holds it. What all ranks hold is taken from the first."""
    ranks = len(source.ranks)
    found: dict[str, list[Holding]] = defaultdict(list)
    for key in dict.fromkeys(spelling.values()):
        for rank in range(1 if binding.is_replicated(key) else ranks):
            stored = source.tensor(rank, key)
            for placement in binding.meta_placements(key, ranks, rank, stored.strides):
                found[placement.tensor].append(Holding(rank, key, stored, placement))
    return found


def of_transformers(binding: Binding, source: TransformersCheckpoint) -> Holdings:
    """Fused experts or linearized ones. Raises MappingError for a key that is unknown, missing or of another shape."""
    single = {m.key: m for key in binding.transformers for m in linearized(binding, key)}
    found: dict[str, list[Holding]] = defaultdict(list)
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
                found[placement.tensor].append(Holding(file, key, stored, placement))
    for name, logical in binding.logical.items():
        held = sum(prod(holding.placement.box.size) for holding in found[name])
        total = prod(logical.sizes.values())
        if held != total:
            keys = [key for key, stored in binding.transformers.items() if name in stored.tensors.values()]
            raise MappingError(f"{'missing' if held < total else 'two keys hold'} {keys[0]}, or a part of it")
    return found
