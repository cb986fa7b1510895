"""The plan: every output tensor with its file, byte range and the source slices that it is made of.

Pure and complete: made from the source's index alone, before a byte of tensor data is read. The dry run, the size estimate,
the progress bar, the resume and the run itself all read it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Protocol

from llama4.config import ConfigError, Llama4Config
from llama4.geometry import Geometry
from llama4_convert.adapters import Adapter
from llama4_convert.changes import ChangePiece, Changes, most_bytes
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.meta_quantized import QuantizedRecord
from llama4_convert.checkpoints.pth import ITEM_SIZES, PthIndex, Record, StoredTensor
from llama4_convert.checkpoints.safetensors_source import SafetensorsIndex, SafetensorsSource
from llama4_convert.composition import kind_of
from llama4_convert.errors import BadInput
from llama4_convert.holdings import Holding, Holdings, of_meta, of_transformers
from llama4_convert.matrices import Matrix, matrices
from mappings import Binding, Box, Copy, MappingError, ModelShape, Placement, copies, load_table
from quant.encoding import Encoder, Linear
from quant.recipe import Recipe, Scheme

FLOAT_DTYPES = ("BF16", "F16", "F32")
# A header that fills whole pages keeps the tensors behind it aligned for direct I/O and for mmap.
_PAGE = 4096


@dataclass(frozen=True)
class Piece:
    """A strided copy of part of one source tensor into an output tensor; offsets count from the record's start.

    `held` and `target`: where the logical tensor that they have in common lies in either. The copy is made of these; that of
    scales has the places of their codes.
    """

    rank: int
    key: str
    source: StoredTensor
    copy: Copy
    held: Placement
    target: Placement

    @staticmethod
    def of(held: Holding, target: Placement) -> Piece | None:
        """What of `target` is held there; None if that is nothing."""
        copy = copies(target, held.placement)
        if copy is None:
            return None
        shifted = replace(copy, source_offset=copy.source_offset + held.stored.offset)
        return Piece(held.file, held.key, held.stored, shifted, held.placement, target)

    def narrowed(self, box: Box) -> Piece | None:
        """The same for `box` of the logical tensor, which must lie inside of the target's; None if nothing of it is here."""
        return Piece.of(Holding(self.rank, self.key, self.source, self.held), self.target.within(box))

    @property
    def numel(self) -> int:
        return prod(self.copy.shape)

    @property
    def is_sequential(self) -> bool:
        """Whether the copy reads one contiguous range of the source, front to back."""
        shape, strides = self.copy.shape, self.copy.source_strides
        return strides[-1] == 1 and (len(shape) == 1 or (len(shape) == 2 and strides[0] == shape[1]))


@dataclass(frozen=True)
class PlannedMatrix:
    """A matrix that a recipe stores in its own way: gathered whole, encoded, and written as several tensors."""

    matrix: Matrix
    scheme: Scheme | None  # None: linearized and otherwise as it is
    encoder: Encoder
    gathered: PlannedTensor
    keeps_bits: bool = False  # the source has it in this scheme: its codes are gathered, and no error is made


@dataclass(frozen=True)
class Part:
    """One of the tensors that a matrix is encoded into: which of the encoder's parts, or the bytes where they are known."""

    matrix: PlannedMatrix
    index: int
    constant: bytes | None = None


@dataclass(frozen=True)
class ExpertScales:
    """Of a tensor of experts' codes in Meta's layout: the key of its scales, which are made with it and written behind it."""

    key: str
    experts: int
    label: str  # what the manifest calls the error of this rank's experts


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor. `offset` is the position of its first byte in the file; `pieces` cover it exactly once.

    Of the parts of an encoded matrix the first that is no constant has the matrix's pieces, and the others none. Nor has a tensor
    of scales that are made with the codes of another file. `changes` are an adapter's, made to what the pieces bring; of an
    encoded matrix what is gathered has them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    pieces: tuple[Piece, ...]
    part: Part | None = None
    changes: tuple[ChangePiece, ...] = ()
    scales: ExpertScales | None = None  # if it is quantized expert by expert

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_SIZES[self.dtype]

    @property
    def source_dtype(self) -> str:
        return self.pieces[0].source.dtype


class Envelope(Protocol):
    """What a file format puts around the tensors, front to back: `begin` and `finish` stand before and behind each."""

    has_checksums: bool  # whether `finish` wants the CRC-32 of the tensor's bytes; else it is given 0

    def head(self) -> bytes: ...

    def begin(self) -> bytes: ...

    def finish(self, crc: int) -> bytes: ...

    def tail(self) -> bytes: ...


@dataclass(frozen=True)
class Header:
    """The envelope of safetensors: everything stands before the tensors."""

    header: bytes
    has_checksums = False

    def head(self) -> bytes:
        return self.header

    def begin(self) -> bytes:
        return b""

    def finish(self, crc: int) -> bytes:
        return b""

    def tail(self) -> bytes:
        return b""


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file: its header (length prefix included), then the tensors in order."""

    name: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]
    replicas: frozenset[str] = frozenset()  # tensors that an earlier file holds as well, and that are counted there
    made_with: str | None = None  # the file before it, in whose making the content of this one is found

    @property
    def size(self) -> int:
        return len(self.header) + sum(t.nbytes for t in self.tensors)

    def envelope(self) -> Envelope:
        return Header(self.header)

    @property
    def work(self) -> int:
        """Bytes that are read for it, which is what progress counts: of an encoded matrix all of it, whatever it becomes."""
        return sum(gathered(read).nbytes for read in self.reads())

    def reads(self) -> Iterator[PlannedTensor | PlannedMatrix]:
        """What a run reads for it, in this order: an encoded matrix whole, when its first part is written."""
        seen: set[str] = set()
        for tensor in self.tensors:
            if tensor.part is None:
                yield tensor
            elif tensor.part.constant is None and tensor.part.matrix.matrix.module not in seen:
                seen.add(tensor.part.matrix.matrix.module)
                yield tensor.part.matrix


def gathered(read: PlannedTensor | PlannedMatrix) -> PlannedTensor:
    """What is read, as a tensor with all its pieces."""
    return read.gathered if isinstance(read, PlannedMatrix) else read


@dataclass(frozen=True)
class Plan:
    geometry: Geometry
    text_only: bool
    files: tuple[PlannedFile, ...]
    meta_keys: tuple[str, ...]  # the source keys used, in the source's spelling
    dropped: Mapping[str, str]  # source key -> why
    base_evidence: tuple[str, ...]  # keys that only base models carry
    streamed: frozenset[tuple[int, str]]  # (rank, record name) read front to back by one file: checked on the way
    unread: tuple[tuple[int, Record], ...]  # records to check beforehand: replicas, dropped, or not read front to back
    compare: tuple[tuple[str, int], ...]  # (key, rank): copies to hold against rank 0's, where CRCs cannot tell
    warnings: tuple[str, ...]
    linear_layers: tuple[
        tuple[Matrix, Scheme | None], ...
    ] = ()  # with a recipe: what it says of every one it could name

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def matrices(self) -> list[PlannedMatrix]:
        """Those that a recipe encodes, each once, in the order of the files."""
        found = {t.part.matrix.matrix.module: t.part.matrix for t in self.tensors if t.part}
        return list(found.values())

    @property
    def changed(self) -> list[PlannedTensor]:
        """What an adapter changes, as it is gathered."""
        found = {id(read): gathered(read) for file in self.files for read in file.reads()}
        return [tensor for tensor in found.values() if tensor.changes]

    @property
    def change_bytes(self) -> int:
        """The most that an adapter's values take in memory at once."""
        return max((most_bytes(tensor.changes) for tensor in self.changed), default=0)

    @property
    def output_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def parameters(self) -> int:
        return sum(self.parameters_by_kind().values())

    def parameters_by_kind(self) -> Mapping[str, int]:
        """Numbers of the model, whatever they are stored as, by the kinds of `composition`."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            if tensor.part is None:
                counts[kind_of(tensor.name)] += tensor.numel
        for planned in self.matrices:
            counts[kind_of(planned.matrix.key)] += planned.matrix.n * planned.matrix.k
        return counts

    @property
    def main_dtype(self) -> str:
        """The dtype of most bytes."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            if tensor.part is None:
                counts[tensor.dtype] += tensor.nbytes
        return counts.most_common(1)[0][0]

    def index(self) -> bytes:
        """The content of model.safetensors.index.json."""
        weight_map = {t.name: file.name for file in self.files for t in file.tensors}
        total = sum(t.nbytes for t in self.tensors)
        body = {"metadata": {"total_parameters": self.parameters, "total_size": total}, "weight_map": weight_map}
        return (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()


def make_plan(
    source: MetaCheckpoint,
    *,
    text_only: bool = False,
    dtype: str | None = None,
    shard_size: int = 5_000_000_000,
    allow_rank_mismatch: bool = False,
    recipe: Recipe | None = None,
    device: str = "cpu",
    adapter: Adapter | None = None,
) -> Plan:
    """Plan the conversion of `source` to Transformers' layout; with a `recipe`, quantized as that says, on `device`.

    `dtype` ("BF16", "F16", "F32") casts every tensor, None keeps each as it is. `shard_size` bounds an output file in bytes;
    only a tensor, or tensors that share a source record, larger than that exceed it. Raises BadInput where names, shapes or
    ranks do not fit together, naming the key.
    """
    geometry = replace(source.geometry, vision=None) if text_only else source.geometry
    try:
        binding, geometry = bind_source(geometry, source)
        claims = binding.claim(source.keys, text_only=text_only)
        check_tensors(binding, source)
        warnings, compare = check_replicas(binding, source, allow_rank_mismatch)
        changes = adapter.changes(binding) if adapter else {}
        tensors = output_tensors(binding, of_meta(binding, source, claims.spelling), changes, dtype, recipe, device)
    except MappingError as error:
        raise BadInput(f"{source.path.name}: {error}") from error
    streamed = streamed_records([tensor.pieces for tensor in tensors], source)
    skipped = {key for key, rule in claims.dropped.items() if rule.when == "text_only"}
    files = files_of(groups_of(tensors, streamed), shard_size)
    streamed = streamed_records([gathered(read).pieces for file in files for read in file.reads()], source)
    return Plan(
        geometry=geometry,
        text_only=text_only,
        files=files,
        meta_keys=tuple(sorted(set(claims.spelling.values()))),
        dropped={key: rule.why for key, rule in claims.dropped.items()} | source.unused_scales,
        base_evidence=tuple(key for key, rule in claims.dropped.items() if rule.only_in == "base"),
        streamed=streamed,
        unread=unread_records(source, streamed, skipped),
        compare=tuple(compare),
        warnings=tuple(warnings),
        linear_layers=linear_layers(binding, recipe),
    )


def plan_directory(
    source: SafetensorsSource,
    recipe: Recipe | None,
    shard_size: int = 5_000_000_000,
    device: str = "cpu",
    adapter: Adapter | None = None,
) -> Plan:
    """Plan to write a Transformers directory anew, experts fused or linearized: with an adapter merged, quantized, or both.

    Raises BadInput where names and shapes do not fit config.json, naming the key.
    """
    try:
        config, binding = bind_directory(source)
        changes = adapter.changes(binding) if adapter else {}
        tensors = output_tensors(binding, of_transformers(binding, source), changes, None, recipe, device)
    except (MappingError, ConfigError) as error:
        raise BadInput(f"{source.path}: {error}") from error
    return Plan(
        geometry=config.to_geometry(),
        text_only=config.vision_config is None,
        files=files_of([[tensor] for tensor in tensors], shard_size),
        meta_keys=(),
        dropped={},
        base_evidence=(),
        streamed=frozenset(),
        unread=(),
        compare=(),
        warnings=(),
        linear_layers=linear_layers(binding, recipe),
    )


def bind_directory(source: SafetensorsSource) -> tuple[Llama4Config, Binding]:
    """The table bound to a Transformers directory. Raises ConfigError, and MappingError for a tensor that is no float."""
    config = Llama4Config.from_json(source.config)
    for index in source.ranks:
        for key, stored in index.tensors.items():
            if stored.dtype not in FLOAT_DTYPES:
                raise MappingError(f"{key} is {stored.dtype}: take a directory in bf16, fp16 or fp32")
    return config, load_table().bind(shape_of_config(config))


def linear_layers(binding: Binding, recipe: Recipe | None) -> tuple[tuple[Matrix, Scheme | None], ...]:
    """Every matrix that a recipe could name, and what it says of it. None without one."""
    if recipe is None:
        return ()
    return tuple(
        (matrix, recipe.scheme(matrix.family, matrix.layer, binding.shape.n_layers, matrix.expert))
        for key in binding.transformers
        for matrix in matrices(binding, key)
    )


def bind_source(geometry: Geometry, source: MetaCheckpoint) -> tuple[Binding, Geometry]:
    """The table bound to the source; sizes that params.json leaves open are read off the tensors."""
    ranks = len(source.ranks)
    shapes = source.shapes()
    table = load_table()

    def bind(g: Geometry) -> Binding:
        return table.bind(model_shape(g))

    if None in (geometry.vocab_size, geometry.n_experts, geometry.expert_dim, geometry.dense_dim):
        draft = bind(geometry)
        vocab, experts, width, dense = (draft.solve(axis, shapes, ranks) for axis in ("V", "E", "F", "G"))
        if (vocab or geometry.vocab_size) is None or (experts is None and geometry.n_experts is None):
            what = "tok_embeddings.weight" if vocab is None else "a router (feed_forward.router_DE)"
            raise MappingError(f"neither params.json nor a tensor tells the size: there is no {what}")
        geometry = geometry.completed(vocab or 0, experts or 0, width or 0, dense or 0)
        if geometry.n_experts and geometry.top_k > geometry.n_experts:
            raise MappingError(f"params.json has a top_k of {geometry.top_k}, the router {geometry.n_experts} experts")
    return bind(geometry), geometry


def shape_of_config(config: Llama4Config) -> ModelShape:
    """The same for a Transformers directory."""
    c, v = config.text_config, config.vision_config
    sizes = {"D": c.hidden_size, "Q": c.num_attention_heads * c.head_dim, "K": c.num_key_value_heads * c.head_dim}
    sizes |= {"V": c.vocab_size, "E": c.num_local_experts, "F": c.intermediate_size, "G": c.intermediate_size_mlp}
    units = {"Q": c.num_attention_heads, "K": c.num_key_value_heads}
    if v:
        sizes |= {"P": 3 * v.patch_size**2, "N": v.patches_a_side**2 + 1, "C": v.hidden_size, "H": v.hidden_size}
        sizes |= {"M": v.intermediate_size, "S": v.shuffled_size, "A": v.vision_output_dim, "O": v.vision_output_dim}
        units["H"] = v.num_attention_heads
    layers = v.num_hidden_layers if v else None
    return ModelShape(sizes, units, c.num_hidden_layers, frozenset(c.moe_layers), layers)


def model_shape(g: Geometry) -> ModelShape:
    """The sizes that the tables' axes have in this geometry (the letters are explained in the tables)."""
    sizes = {"D": g.dim, "Q": g.n_heads * g.head_dim, "K": g.n_kv_heads * g.head_dim}
    open_sizes = {"V": g.vocab_size, "E": g.n_experts, "F": g.expert_dim, "G": g.dense_dim}
    sizes |= {axis: size for axis, size in open_sizes.items() if size is not None}
    units = {"Q": g.n_heads, "K": g.n_kv_heads}
    if v := g.vision:
        sizes |= {"P": v.patch_dim, "N": v.n_patches + 1, "C": v.dim, "H": v.dim, "M": v.mlp_dim}
        sizes |= {"S": v.shuffled_dim, "A": v.output_dim, "O": v.output_dim}
        units["H"] = v.n_heads
    return ModelShape(sizes, units, g.n_layers, frozenset(g.moe_layers), v.n_layers if v else None)


def check_tensors(binding: Binding, source: MetaCheckpoint) -> None:
    """Every rank's shapes and dtypes against the geometry."""
    ranks = len(source.ranks)
    for rank, index in enumerate(source.ranks):
        for key, tensor in index.tensors.items():
            if key not in binding.meta:
                continue
            expected = binding.meta_shape(key, ranks)
            if tensor.shape != expected:
                raise MappingError(_shape_message(binding, key, tensor.shape, expected, source, rank))
            if tensor.dtype not in FLOAT_DTYPES:
                raise MappingError(
                    f"{key} is {tensor.dtype}: only bf16, fp16 and fp32 checkpoints can be converted"
                    " (Meta's quantized originals need their scales)"
                )
        for key in index.others:
            if key in binding.meta:
                raise MappingError(f"{key} in {index.path.name} is no tensor")


def _shape_message(
    binding: Binding, key: str, found: Sequence[int], expected: Sequence[int], source: MetaCheckpoint, rank: int
) -> str:
    ranks, where = len(source.ranks), source.ranks[rank].path.name
    text = f"{key} in {where} has shape {list(found)}, but params.json with {ranks} rank(s) makes it {list(expected)}"
    for other in (n for n in range(1, 129) if n != ranks and not binding.is_replicated(key)):
        try:
            fits = all(binding.meta_shape(k, other) == s for k, s in source.shapes().items() if k in binding.meta)
        except MappingError:
            continue
        if fits:
            missing = (
                f"consolidated.{ranks:02d}.pth and later are missing" if other > ranks else "some files are not its"
            )
            return f"{text}: these are files of a checkpoint with {other} ranks, {missing}"
    return text


def check_replicas(binding: Binding, source: MetaCheckpoint, allow: bool) -> tuple[list[str], list[tuple[str, int]]]:
    """Replicated tensors must be equal on all ranks; where each fills a record, the zip CRCs tell without reading.

    Returns warnings, and the (key, rank) that remain to be compared by value with rank 0's.
    """
    warnings, remaining = [], []
    for key, first in source.ranks[0].tensors.items():
        if key not in binding.meta or not binding.is_replicated(key):
            continue
        for rank, index in enumerate(source.ranks[1:], 1):
            other = index.tensors[key]
            if not (first.is_whole_record and other.is_whole_record):
                remaining.append((key, rank))
            elif first.record.crc != other.record.crc:
                if not allow:
                    raise MappingError(mismatch(key, source.ranks[0].path.name, index.path.name))
                warnings.append(
                    f"{key} differs between {source.ranks[0].path.name} and {index.path.name}: the first is taken"
                )
                break
    return warnings, [] if allow else remaining


def mismatch(key: str, first: str, other: str) -> str:
    return (
        f"the ranks disagree: {key} differs between {first} and {other}: download them again"
        " (--allow-rank-mismatch takes the first)"
    )


def planned_tensor(
    name: str,
    shape: tuple[int, ...],
    targets: Sequence[Placement],
    holdings: Holdings,
    dtype: str | None = None,
    changes: Changes = MappingProxyType({}),
) -> PlannedTensor:
    """An output tensor with all pieces of it that the source holds. Raises MappingError where these do not make it up.

    `dtype` casts; None keeps the source's.
    """
    pieces: list[Piece] = []
    changed: list[ChangePiece] = []
    for target in targets:
        for held in holdings[target.tensor]:
            piece = Piece.of(held, target)
            if piece is not None:
                pieces.append(piece)
        for change, placement in changes.get(target.tensor, ()):
            # Of many experts one is wanted, which the first axis tells at once.
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
    _check_conserved(tensor)
    return tensor


def output_tensors(
    binding: Binding, holdings: Holdings, changes: Changes, dtype: str | None, recipe: Recipe | None, device: str
) -> list[PlannedTensor]:
    """Every tensor of a Transformers directory, made of what is held; as the recipe says, where it says something."""
    linear = {held.key for several in holdings.values() for held in several}
    tensors: list[PlannedTensor] = []
    for name in binding.transformers:
        to_encode = list(_to_encode(binding, name, recipe, linear)) if recipe else []
        for matrix, scheme in to_encode:
            # Schemes quantize bf16, which is what checkpoints are published in.
            to = "BF16" if scheme else dtype
            gathered = planned_tensor(matrix.key, matrix.shape, [matrix.target], holdings, to, changes)
            kept = scheme is not None and not gathered.changes and _keeps_bits(matrix, scheme, gathered)
            tensors += _with_bits_kept(matrix, scheme, gathered) if kept else _encoded(matrix, scheme, device, gathered)
        if not to_encode:
            shape = binding.transformers_shape(name)
            targets = binding.transformers_placements(name)
            tensors.append(planned_tensor(name, shape, targets, holdings, dtype, changes))
    return tensors


def _to_encode(
    binding: Binding, key: str, recipe: Recipe, linear: Collection[str]
) -> Iterator[tuple[Matrix, Scheme | None]]:
    """The matrices of a Transformers tensor that are stored in another way, and how; None: linearized, no more.

    Experts always: runtimes that read some of them quantized expect none fused.
    """
    for matrix in matrices(binding, key, linear):
        scheme = recipe.scheme(matrix.family, matrix.layer, binding.shape.n_layers, matrix.expert)
        if scheme or matrix.expert is not None:
            yield matrix, scheme


def _encoded(matrix: Matrix, scheme: Scheme | None, device: str, gathered: PlannedTensor) -> Iterator[PlannedTensor]:
    """The tensors that a matrix becomes. Raises MappingError if its size does not fit the scheme."""
    from quant.encoders import encoder_for

    encoder = encoder_for(scheme, device) if scheme else Linear(gathered.dtype)
    planned = PlannedMatrix(matrix, scheme, encoder, gathered)
    try:
        outputs = encoder.outputs(matrix.n, matrix.k)
    except ValueError as error:
        raise MappingError(f"{matrix.module} ({matrix.n} x {matrix.k}): {error}") from error
    index = 0
    for output in outputs:
        name = f"{matrix.module}.{output.suffix}"
        if output.constant is not None:
            yield PlannedTensor(name, output.dtype, output.shape, 0, (), Part(planned, 0, output.constant))
            continue
        pieces = gathered.pieces if index == 0 else ()
        yield PlannedTensor(name, output.dtype, output.shape, 0, pieces, Part(planned, index))
        index += 1


def _keeps_bits(matrix: Matrix, scheme: Scheme, gathered: PlannedTensor) -> bool:
    """Whether the source holds codes that the scheme can keep: FP8 with one scale for all inputs of an output.

    The down projections of several ranks have a scale for each rank's share of the inputs.
    """
    is_fp8 = scheme.kind == "fp8" and scheme.granularity == "channel"
    records = [piece.source.record for piece in gathered.pieces]
    return is_fp8 and all(
        isinstance(record, QuantizedRecord) and record.kind == "fp8" and record.k == matrix.k for record in records
    )


def _with_bits_kept(matrix: Matrix, scheme: Scheme | None, gathered: PlannedTensor) -> Iterator[PlannedTensor]:
    """Codes and scales as the source has them: the scales in float32, which holds Meta's and is what runtimes widen to."""
    codes, scales = [], []
    for piece in gathered.pieces:
        record = piece.source.record
        assert isinstance(record, QuantizedRecord)
        assert matrix.expert is not None
        codes.append(replace(piece, source=record.codes))
        at, column = record.scales.offset + matrix.expert * record.n, piece.copy.target_offset
        copy = Copy((record.n,), at, (1,), column, (1,))
        scales.append(Piece(record.scales_archive, record.key, record.scales, copy, piece.held, piece.target))
    dtype = codes[0].source.dtype
    linear = PlannedMatrix(matrix, scheme, Linear(dtype), replace(gathered, dtype=dtype, pieces=tuple(codes)), True)
    name = f"{matrix.module}.weight"
    yield PlannedTensor(name, dtype, (matrix.n, matrix.k), 0, linear.gathered.pieces, Part(linear, 0))
    yield PlannedTensor(f"{name}_scale", "F32", (matrix.n, 1), 0, tuple(scales))


def _check_conserved(tensor: PlannedTensor) -> None:
    """Elements in equal elements out: the last line of defence against a table that loses or repeats a slice."""
    moved = sum(piece.numel for piece in tensor.pieces)
    if moved != tensor.numel:
        raise MappingError(f"{tensor.name}: {moved:,} elements for {tensor.numel:,}: the table does not cover it")


class SourceFiles(Protocol):
    """What a source is read from: its ranks, or its shards."""

    @property
    def ranks(self) -> Sequence[PthIndex | SafetensorsIndex]: ...


def streamed_records(order: Iterable[tuple[Piece, ...]], source: SourceFiles) -> frozenset[tuple[int, str]]:
    """The records that are read once, whole and front to back, in this order, so that their CRC can be checked on the way."""
    users: Counter[tuple[int, str]] = Counter()
    for rank, index in enumerate(source.ranks):
        users.update((rank, tensor.record.name) for tensor in index.tensors.values())
    reads: dict[tuple[int, str], list[Piece]] = defaultdict(list)
    for pieces in order:
        for piece in pieces:
            reads[piece.rank, piece.source.record.name].append(piece)

    def in_order(pieces: list[Piece]) -> bool:
        position = 0
        for piece in pieces:
            if not piece.is_sequential or piece.copy.source_offset != position:
                return False
            position += piece.numel
        return position * pieces[0].source.itemsize == pieces[0].source.record.size

    return frozenset(
        record
        for record, pieces in reads.items()
        if users[record] == 1
        and pieces[0].source.is_whole_record
        and all(piece.source is pieces[0].source for piece in pieces)  # else it is read as codes and as numbers
        and in_order(pieces)
    )


def unread_records(
    source: MetaCheckpoint, streamed: frozenset[tuple[int, str]], skipped: set[str]
) -> tuple[tuple[int, Record], ...]:
    left_out = {
        (rank, index.tensors[key].record.name)
        for rank, index in enumerate(source.ranks)
        for key in skipped
        if key in index.tensors
    }
    return tuple(
        (rank, record)
        for rank, record in source.records()
        if (rank, record.name) not in streamed and (rank, record.name) not in left_out
    )


def groups_of(tensors: Sequence[PlannedTensor], streamed: frozenset[tuple[int, str]]) -> list[list[PlannedTensor]]:
    """What stays in one file: the parts of a matrix, and neighbours that read the same record."""
    groups: list[list[PlannedTensor]] = []
    seen: set[tuple[int, str]] = set()
    for tensor in tensors:
        records = {(p.rank, p.source.record.name) for p in tensor.pieces} & streamed
        last = groups[-1][-1].part if groups else None
        if groups and (records & seen or (tensor.part and last and tensor.part.matrix is last.matrix)):
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
            seen = set()
        seen |= records
    return groups


def files_of(groups: Sequence[list[PlannedTensor]], shard_size: int) -> tuple[PlannedFile, ...]:
    contents: list[list[PlannedTensor]] = []
    room = 0
    for group in groups:
        size = sum(t.nbytes for t in group)
        if not contents or size > room:
            contents.append([])
            room = shard_size
        contents[-1].extend(group)
        room -= size
    return tuple(
        _file(f"model-{i:05d}-of-{len(contents):05d}.safetensors", tensors) for i, tensors in enumerate(contents, 1)
    )


def _in_file_order(tensors: list[PlannedTensor]) -> list[PlannedTensor]:
    """Readers view a tensor's bytes in place, so its offset must be a multiple of its item size: widest first.

    But the parts of a matrix stay together where their sizes allow it: what comes later waits in memory until then.
    """

    def place(tensor: PlannedTensor) -> int:
        width = ITEM_SIZES[tensor.dtype]
        streams = tensor.part is not None and tensor.part.constant is None and not tensor.nbytes % 4 and width <= 4
        return 2 if streams else {8: 0, 4: 1, 2: 3, 1: 4}[width]

    return sorted(tensors, key=place)


def _file(name: str, tensors: list[PlannedTensor]) -> PlannedFile:
    tensors = _in_file_order(tensors)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-(8 + len(body)) % _PAGE)
    header = len(body).to_bytes(8, "little") + body
    placed, position = [], len(header)
    for tensor in tensors:
        placed.append(replace(tensor, offset=position))
        position += tensor.nbytes
    return PlannedFile(name, header, tuple(placed))
