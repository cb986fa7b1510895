"""Which tensors a matrix becomes under a recipe, and how they are planned: known in every byte before the matrix is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType

from llama4_convert.checkpoints.meta_quantized import CODES, DequantizedView
from llama4_convert.planning.binding import Locations
from llama4_convert.planning.changes import ChangePiece, Changes
from llama4_convert.planning.plan import EncodedMatrix, EncodedPart, ExpertScales, Piece, PlannedTensor
from mappings import Binding, Copy, MappingError, Placement, copies
from mappings.matrices import Matrix, matrices
from quant.encoding import Encoder, Linear
from quant.formats.meta import MetaInt4, MetaWords, scale_key
from quant.recipe import Recipe, Scheme


def is_quantized(recipe: Recipe, key: str, n_layers: int) -> bool:
    """Whether a recipe of the format meta makes codes of the tensor `key`."""
    found = re.match(r"layers\.(\d+)\.", key)
    return bool(found and scale_key(key) and recipe.scheme("routed_experts", int(found[1]), n_layers))


def planned_codes(tensor: PlannedTensor, experts: int, file: str) -> tuple[PlannedTensor, PlannedTensor]:
    """A rank's experts [E * K, N] as FP8 codes, and their scales [E, N]; `file` is the name of the rank's file.

    Where the source has codes with a scale for the same rows, codes and scales are copied; else they are made.
    """
    key, n = scale_key(tensor.name), tensor.shape[-1]
    assert key is not None
    scales = PlannedTensor(key, "F32", (experts, n), 0, ())
    k = tensor.numel // (experts * n)
    codes, pieces = [], []
    for piece in tensor.pieces:
        record = piece.source.record
        if not (isinstance(record, DequantizedView) and record.kind == "fp8" and record.k == k):
            return replace(tensor, dtype=CODES, scales=ExpertScales(key, experts, f"{file}: {key}")), scales
        codes.append(replace(piece, source=record.codes))
        first, at = piece.copy.source_offset % record.n, piece.copy.target_offset % n
        width = piece.numel // (experts * k)
        copy = Copy((experts, width), record.scales.offset + first, (record.n, 1), at, (n, 1))
        pieces.append(Piece(record.scales_archive, record.key, record.scales, copy, piece.held, piece.target))
    return replace(tensor, dtype=CODES, pieces=tuple(codes)), replace(scales, pieces=tuple(pieces))


def linear_layers(
    binding: Binding, recipe: Recipe | None, keys: Iterable[str], linear: Collection[str] = ()
) -> list[tuple[Matrix, Scheme | None]]:
    """The matrices of the tensors `keys` that a recipe could name, with the scheme that it gives to each; none without one.

    `linear`: keys under which the source has experts as linear layers.
    """
    if recipe is None:
        return []
    return [
        (matrix, recipe.scheme(matrix.family, matrix.layer, binding.shape.n_layers, matrix.expert))
        for key in keys
        for matrix in matrices(binding, key, linear)
    ]


def planned_tensor(
    name: str,
    shape: tuple[int, ...],
    targets: Sequence[Placement],
    locations: Locations,
    dtype: str | None = None,
    changes: Changes = MappingProxyType({}),
) -> PlannedTensor:
    """An output tensor with its pieces: the copies from every stored part that overlaps one of its `targets`.

    `dtype` casts; None keeps the source's dtype. Raises MappingError where the pieces do not cover the tensor exactly once.
    """
    pieces = [
        piece for target in targets for part in locations[target.tensor] if (piece := Piece.between(part, target))
    ]
    changed: list[ChangePiece] = []
    for target in targets:
        for change, placement in changes.get(target.tensor, ()):
            # Most changes belong to other experts, which their first axis shows without computing the copy.
            apart = placement.box.start[0] >= target.box.start[0] + target.box.size[0]
            if not apart and (change_copy := copies(target, placement)):
                changed.append(ChangePiece(change, change_copy))
    dtypes = {piece.source.dtype for piece in pieces}
    if len(dtypes) > 1:
        raise MappingError(
            f"{name} is made of {' and '.join(sorted({p.key for p in pieces}))}, which differ in dtype"
            f" ({', '.join(sorted(dtypes))})"
        )
    tensor = PlannedTensor(name, dtype or dtypes.pop(), shape, 0, tuple(pieces), changes=tuple(changed))
    # The last line of defence against a table that loses or repeats a slice.
    if (moved := sum(piece.numel for piece in pieces)) != tensor.numel:
        raise MappingError(f"{tensor.name}: {moved:,} elements for {tensor.numel:,}: the table does not cover it")
    return tensor


def output_tensors(
    binding: Binding, locations: Locations, changes: Changes, dtype: str | None, recipe: Recipe | None, device: str
) -> list[PlannedTensor]:
    """Every tensor of a Transformers directory in the order of the tables; matrices that the recipe names become its tensors."""
    linear = {part.key for parts in locations.values() for part in parts}
    tensors: list[PlannedTensor] = []
    for name in binding.transformers:
        # Experts always become linear layers: runtimes that read some experts quantized expect none fused.
        layers = linear_layers(binding, recipe, [name], linear)
        to_encode = [(matrix, scheme) for matrix, scheme in layers if scheme or matrix.expert is not None]
        for matrix, scheme in to_encode:
            # Schemes quantize bf16: checkpoints are published in it.
            to = "BF16" if scheme else dtype
            gathered = planned_tensor(matrix.key, matrix.shape, [matrix.target], locations, to, changes)
            if scheme and not gathered.changes and _keeps_bits(matrix, scheme, gathered):
                tensors += _with_bits_kept(matrix, scheme, gathered)
            else:
                tensors += _encoded(matrix, scheme, _encoder(scheme, device, gathered.dtype), gathered)
        if not to_encode:
            shape = binding.transformers_shape(name)
            targets = binding.transformers_placements(name)
            tensors.append(planned_tensor(name, shape, targets, locations, dtype, changes))
    return tensors


def _encoder(scheme: Scheme | None, device: str, dtype: str) -> Encoder:
    if scheme is None:
        return Linear(dtype)
    from quant.encoders import encoder_for

    return encoder_for(scheme, device)


def _encoded(
    matrix: Matrix, scheme: Scheme | None, encoder: Encoder, gathered: PlannedTensor, keeps_bits: bool = False
) -> Iterator[PlannedTensor]:
    """The tensors that a matrix is encoded into. Raises MappingError if its size does not fit the scheme."""
    encoded = EncodedMatrix(matrix, scheme, encoder, gathered, keeps_bits)
    try:
        outputs = encoder.outputs(matrix.n, matrix.k)
    except ValueError as error:
        raise MappingError(f"{matrix.module} ({matrix.n} x {matrix.k}): {error}") from error
    index = 0
    for output in outputs:
        name = f"{matrix.module}.{output.suffix}"
        if output.constant is not None:
            yield PlannedTensor(name, output.dtype, output.shape, 0, (), EncodedPart(encoded, 0, output.constant))
            continue
        pieces = gathered.pieces if index == 0 else ()
        yield PlannedTensor(name, output.dtype, output.shape, 0, pieces, EncodedPart(encoded, index))
        index += 1


def _keeps_bits(matrix: Matrix, scheme: Scheme, gathered: PlannedTensor) -> bool:
    """Whether the source has codes that the scheme can keep: Meta's int4, or FP8 with one scale for all inputs of an output.

    Down projections that are cut into several ranks have an FP8 scale for each rank's share of the inputs, so their codes cannot
    be kept. Groups of int4 lie inside a rank.
    """
    records = [piece.source.record for piece in gathered.pieces]
    views = [r for r in records if isinstance(r, DequantizedView) and r.kind == scheme.kind]
    if len(views) < len(records):
        return False
    if scheme.kind == "fp8":
        return scheme.granularity == "channel" and all(view.k == matrix.k for view in views)
    return scheme.group_size == MetaInt4.group_size


def _with_bits_kept(matrix: Matrix, scheme: Scheme, gathered: PlannedTensor) -> Iterator[PlannedTensor]:
    """The source's codes and scales, copied. Scales become float32, which holds Meta's exactly and is what runtimes widen to.

    On a rank's records, with K inputs and N outputs of one of E experts (`step`: inputs in a row of codes, 2 for int4):

        codes   [E * K/step, N]      rows e * K/step ...  ->  [K/step, N] of the gathered matrix, at (first input / step, column)
        scales  [E, groups, N]       or [E, N]            ->  [N, groups] of weight_scale, transposed

    K and N are the rank's share of the matrix: `first` and `column` are where the share begins.
    """
    codes, scales = [], []
    for piece in gathered.pieces:
        record = piece.source.record
        assert isinstance(record, DequantizedView)
        assert matrix.expert is not None
        k, n, scales_shape = record.k, record.n, record.format.scales_shape(record.k, record.n)
        first, column = divmod(piece.copy.target_offset, matrix.n)
        step, group = record.format.inputs_a_row, k * n // prod(scales_shape)
        start, to = matrix.expert * (k // step) * n, first // step * matrix.n + column
        copy = Copy((k // step, n), record.codes.offset + start, (n, 1), to, (matrix.n, 1))
        codes.append(replace(piece, source=record.codes, copy=copy))
        start, groups = record.scales.offset + matrix.expert * prod(scales_shape), matrix.k // group
        if groups == 1:
            copy = Copy((n,), start, (1,), column, (1,))
        else:
            copy = Copy((n, k // group), start, (1, n), column * groups + first // group, (groups, 1))
        scales.append(Piece(record.scales_archive, record.key, record.scales, copy, piece.held, piece.target))
    stored = replace(gathered, dtype=CODES, shape=(matrix.k // step, matrix.n), pieces=tuple(codes))
    encoder = Linear(CODES) if scheme.kind == "fp8" else MetaWords()
    yield from _encoded(matrix, scheme, encoder, stored, keeps_bits=True)
    yield PlannedTensor(f"{matrix.key}_scale", "F32", (matrix.n, groups), 0, tuple(scales))
