"""The two layouts that a plan can write: a Transformers directory, and Meta's rank files. Each makes its files from a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from llama4_convert.planning.adapter import Adapter
from llama4_convert.planning.binding import BoundSource
from llama4_convert.planning.encoded import is_quantized, output_tensors, planned_codes, planned_tensor
from llama4_convert.planning.file_formats import pth
from llama4_convert.planning.plan import PlannedFile
from llama4_convert.planning.record_order import checked_while_reading
from llama4_convert.planning.shards import neighbours, shards
from mappings import Binding, MappingError
from quant.recipe import Recipe


class OutputLayout(Protocol):
    """How a source becomes the files of an output."""

    @property
    def recipe(self) -> Recipe | None: ...

    def files(self, source: BoundSource) -> tuple[PlannedFile, ...]:
        """Every output file. Raises MappingError where the source cannot fill them."""
        ...

    def meta_keys(self, source: BoundSource) -> Sequence[str]:
        """The keys of Meta's layout that the manifest records: their spelling makes the way back exact."""
        ...


@dataclass(frozen=True)
class TransformersLayout:
    """Safetensors files with Transformers' names.

    `dtype` ("BF16", "F16", "F32") casts every tensor; None keeps each as it is. `shard_size` bounds a file in bytes; only a
    tensor, or tensors that share a source record, larger than that exceed it. `recipe` quantizes, on `device`; `adapter` is
    merged before.
    `whole_matrices` keeps all parts of an encoded matrix in one file.
    """

    dtype: str | None = None
    shard_size: float = inf
    recipe: Recipe | None = None
    device: str = "cpu"
    adapter: Adapter | None = None
    whole_matrices: bool = True

    def files(self, source: BoundSource) -> tuple[PlannedFile, ...]:
        changes = self.adapter.changes(source.binding) if self.adapter else {}
        tensors = output_tensors(source.binding, source.locations, changes, self.dtype, self.recipe, self.device)
        if not self.whole_matrices:
            return shards([[tensor] for tensor in tensors], self.shard_size)
        streamed = checked_while_reading(source, (piece for tensor in tensors for piece in tensor.pieces))
        return shards(neighbours(tensors, streamed), self.shard_size)

    def meta_keys(self, source: BoundSource) -> Sequence[str]:
        return source.meta_keys


@dataclass(frozen=True)
class MetaLayout:
    """`consolidated.NN.pth`, one a rank, with `keys` in this order; a recipe of the format meta adds a file of scales a rank.

    `spelling` are the keys to record, where the output cannot have the keys that the model came with on so many ranks.
    """

    keys: Sequence[str]
    spelling: Sequence[str]
    ranks: int
    recipe: Recipe | None = None

    def files(self, source: BoundSource) -> tuple[PlannedFile, ...]:
        binding, files = source.binding, []
        if why := _why_not_cut(binding, self.keys, self.ranks):
            possible = [str(n) for n in range(1, 17) if not _why_not_cut(binding, self.keys, n)]
            raise MappingError(f"{why}: take {' or '.join(possible)} ranks")
        for rank in range(self.ranks):
            name = f"consolidated.{rank:02d}.pth"
            tensors, scales = [], []
            for key in self.keys:
                targets = binding.meta_placements(key, self.ranks, rank)
                tensor = planned_tensor(key, binding.meta_shape(key, self.ranks), targets, source.locations)
                if self.recipe and is_quantized(self.recipe, key, binding.shape.n_layers):
                    tensor, its_scales = planned_codes(tensor, binding.shape.sizes["E"], name)
                    scales.append(its_scales)
                tensors.append(tensor)
            replicas = frozenset(key for key in self.keys if rank and binding.is_replicated(key))
            files.append(PlannedFile.of(name, pth, tensors, replicas))
            if scales:
                files.append(PlannedFile.of(f"fp8_scales_{rank}.pt", pth, scales, made_with=name))
        return tuple(files)

    def meta_keys(self, source: BoundSource) -> Sequence[str]:
        return sorted(self.spelling)


def _why_not_cut(binding: Binding, keys: Sequence[str], ranks: int) -> str:
    """Why so many ranks cannot share the model; empty if they can."""
    try:
        for key in keys:
            binding.meta_shape(key, ranks)
    except MappingError as error:
        return str(error)
    return ""
