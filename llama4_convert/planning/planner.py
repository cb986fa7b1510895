"""Makes a plan from a bound source and a layout to write: for all commands, and without reading a byte of tensor data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.errors import BadInput
from llama4_convert.planning.adapter import Adapter
from llama4_convert.planning.binding import BoundSource
from llama4_convert.planning.encoded import is_quantized, linear_layers, output_tensors, planned_codes, planned_tensor
from llama4_convert.planning.file_formats import Safetensors, pth
from llama4_convert.planning.plan import Plan, PlannedFile, PlannedTensor, RecordKey
from llama4_convert.planning.record_order import checked_while_reading
from mappings import Binding, MappingError
from quant.recipe import Recipe


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
        if self.whole_matrices:
            streamed = checked_while_reading(source, (piece for tensor in tensors for piece in tensor.pieces))
            groups = _neighbours(tensors, streamed)
        else:
            groups = [[tensor] for tensor in tensors]
        return _shards(groups, self.shard_size)


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


def make_plan(source: BoundSource, layout: TransformersLayout | MetaLayout) -> Plan:
    """Plan to write `source` in a layout. Raises BadInput where the source cannot fill it, naming the key."""
    try:
        files = layout.files(source)
    except MappingError as error:
        raise BadInput(f"{source.name}: {error}") from error
    in_order = checked_while_reading(source, (piece for file in files for piece in file.pieces()))
    meta_keys = sorted(layout.spelling) if isinstance(layout, MetaLayout) else source.meta_keys
    return Plan(
        geometry=source.geometry,
        files=files,
        checked_while_reading=in_order,
        checked_beforehand=tuple((n, record) for n, record in source.records if (n, record.name) not in in_order),
        compare=tuple(source.compare),
        meta_keys=tuple(meta_keys),
        dropped=source.dropped,
        base_evidence=tuple(source.base_evidence),
        warnings=tuple(source.warnings),
        linear_layers=tuple(linear_layers(source.binding, layout.recipe, source.binding.transformers)),
    )


def _neighbours(tensors: Sequence[PlannedTensor], streamed: frozenset[RecordKey]) -> list[list[PlannedTensor]]:
    """Groups that stay in one file: the parts of a matrix, and consecutive tensors that read the same `streamed` record."""
    groups: list[list[PlannedTensor]] = []
    seen: set[RecordKey] = set()
    for tensor in tensors:
        records = {piece.record_key for piece in tensor.pieces} & streamed
        last = groups[-1][-1].part if groups else None
        if groups and (records & seen or (tensor.part and last and tensor.part.matrix is last.matrix)):
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
            seen = set()
        seen |= records
    return groups


def _shards(groups: Sequence[list[PlannedTensor]], shard_size: float) -> tuple[PlannedFile, ...]:
    """Files of at most `shard_size` bytes of tensor data, but for a group that is larger; names as save_pretrained's."""
    contents: list[list[PlannedTensor]] = []
    space = 0.0
    for group in groups:
        size = sum(t.nbytes for t in group)
        if not contents or size > space:
            contents.append([])
            space = shard_size
        contents[-1].extend(group)
        space -= size
    return tuple(
        PlannedFile.of(f"model-{i:05d}-of-{len(contents):05d}.safetensors", Safetensors, sorted(tensors, key=_order))
        for i, tensors in enumerate(contents, 1)
    )


def _order(tensor: PlannedTensor) -> int:
    """Its order in a file. Readers map a tensor's bytes in place, at a multiple of its item size: the widest come first.

    The parts of a matrix stay together where their sizes allow it: a part that is written later waits in memory until then.
    """
    width = ITEM_SIZES[tensor.dtype]
    streams = tensor.part is not None and tensor.part.constant is None and not tensor.nbytes % 4 and width <= 4
    return 2 if streams else {8: 0, 4: 1, 2: 3, 1: 4}[width]


def _why_not_cut(binding: Binding, keys: Sequence[str], ranks: int) -> str:
    """Why so many ranks cannot share the model; empty if they can."""
    try:
        for key in keys:
            binding.meta_shape(key, ranks)
    except MappingError as error:
        return str(error)
    return ""
