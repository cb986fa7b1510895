"""The plan as data: output files, the tensors in them with their byte ranges, and the source slices that each is copied from.

`planner.make_plan` makes it. The dry run, the size estimate, the progress bar, the resumption and the run itself read it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Protocol

from llama4.geometry import Geometry
from llama4_convert.checkpoints.families import family_of
from llama4_convert.checkpoints.tensors import ITEM_SIZES, Record, StoredTensor
from llama4_convert.planning.binding import StoredPart
from llama4_convert.planning.changes import ChangePiece, most_bytes
from mappings import Box, Copy, Placement, copies
from mappings.matrices import Matrix
from quant.encoding import Encoder
from quant.recipe import Scheme

RecordKey = tuple[int, str]  # number of the source file, name of the record in it


@dataclass(frozen=True)
class Piece:
    """A strided copy of a part of one source tensor into an output tensor.

    `copy` counts elements: offsets in the source from the start of the record, offsets in the target from the tensor's first
    element. `held` and `target` are the places of the same logical tensor in the source and in the output; the copy is what they
    have in common. A piece of scales has the placements of its codes.
    """

    file: int  # number of the source file
    key: str
    source: StoredTensor
    copy: Copy
    held: Placement
    target: Placement

    @staticmethod
    def between(part: StoredPart, target: Placement) -> Piece | None:
        """The copy from a stored part into `target`; None if they have no element in common."""
        copy = copies(target, part.placement)
        if copy is None:
            return None
        shifted = replace(copy, source_offset=copy.source_offset + part.stored.offset)
        return Piece(part.file, part.key, part.stored, shifted, part.placement, target)

    def narrowed(self, box: Box) -> Piece | None:
        """The part of the copy inside `box`, which must lie in the target's box; None if the source has nothing of it."""
        return Piece.between(StoredPart(self.file, self.key, self.source, self.held), self.target.within(box))

    @property
    def numel(self) -> int:
        return prod(self.copy.shape)

    @property
    def record_key(self) -> RecordKey:
        return self.file, self.source.record.name

    @property
    def is_sequential(self) -> bool:
        """Whether the copy reads one contiguous range of the source, front to back."""
        shape, strides = self.copy.shape, self.copy.source_strides
        return strides[-1] == 1 and (len(shape) == 1 or (len(shape) == 2 and strides[0] == shape[1]))


@dataclass(frozen=True)
class EncodedMatrix:
    """A matrix that a recipe stores in its own way: gathered whole, encoded, and written as several tensors."""

    matrix: Matrix
    scheme: Scheme | None  # None: written as a linear layer of its own, unquantized
    encoder: Encoder
    gathered: PlannedTensor  # the matrix before it is encoded
    keeps_bits: bool = False  # the source has codes of this scheme: they are gathered

    @property
    def is_quantized(self) -> bool:
        """Whether encoding rounds the numbers: else no error is made, and NaN and infinities stay."""
        return self.scheme is not None and not self.keeps_bits


@dataclass(frozen=True)
class EncodedPart:
    """One of the tensors that a matrix is encoded into: the encoder's part number `index`, or `constant` bytes."""

    matrix: EncodedMatrix
    index: int
    constant: bytes | None = None


@dataclass(frozen=True)
class ExpertScales:
    """The scales of a tensor of experts' codes in Meta's layout. They are made with the codes and written in the next file."""

    key: str
    experts: int
    label: str  # the manifest's name for the error of this rank's experts


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor. `offset` is the position of its first byte in the file.

    `pieces` cover the tensor exactly once. The parts of an encoded matrix share its pieces: the first part that is no constant
    has them, the other parts have none. Scales that are made with the codes of another file have no pieces either. `changes` are
    what an adapter adds to the pieces or puts in their place; an encoded matrix has its changes in `gathered`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    pieces: tuple[Piece, ...]
    part: EncodedPart | None = None
    changes: tuple[ChangePiece, ...] = ()
    scales: ExpertScales | None = None  # of a tensor that is quantized expert by expert

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
    """The bytes of a file format around the tensors. A run asks for them front to back, each once."""

    has_checksums: bool  # whether `finish` needs the CRC-32 of the tensor's bytes; else it is given 0

    def head(self) -> bytes: ...

    def begin(self) -> bytes:
        """The bytes before the next tensor."""
        ...

    def finish(self, crc: int) -> bytes:
        """The bytes after the tensor, whose bytes have the CRC-32 `crc`."""
        ...

    def tail(self) -> bytes: ...


FileFormat = Callable[[str, Sequence[PlannedTensor]], Envelope]  # (file name, tensors in order) -> a fresh envelope


@dataclass(frozen=True)
class PlannedFile:
    """An output file: a format's envelope around tensors in order. `size` counts the whole file, in bytes."""

    name: str
    format: FileFormat
    tensors: tuple[PlannedTensor, ...]
    size: int
    replicas: frozenset[str] = frozenset()  # tensors that an earlier file holds as well; their NaN are counted there
    made_with: str | None = None  # the file before it, whose writing also makes the tensors of this one

    @staticmethod
    def of(
        name: str,
        format: FileFormat,
        tensors: Sequence[PlannedTensor],
        replicas: frozenset[str] = frozenset(),
        made_with: str | None = None,
    ) -> PlannedFile:
        """The tensors placed in a file of a format, one behind the other."""
        envelope = format(name, tensors)
        position, placed = len(envelope.head()), []
        for tensor in tensors:
            position += len(envelope.begin())
            placed.append(replace(tensor, offset=position))
            position += tensor.nbytes + len(envelope.finish(0))
        return PlannedFile(name, format, tuple(placed), position + len(envelope.tail()), replicas, made_with)

    def envelope(self) -> Envelope:
        return self.format(self.name, self.tensors)

    @property
    def work(self) -> int:
        """Bytes that a run gathers for the file, which is what progress counts; an encoded matrix counts before encoding."""
        return sum(tensor.nbytes for tensor in self.gathered())

    def gathered(self) -> Iterator[PlannedTensor]:
        """The tensors that a run gathers, in this order. A matrix is gathered whole when its first part is written."""
        seen: set[str] = set()
        for tensor in self.tensors:
            if tensor.part is None:
                yield tensor
            elif tensor.part.constant is None and tensor.part.matrix.matrix.module not in seen:
                seen.add(tensor.part.matrix.matrix.module)
                yield tensor.part.matrix.gathered

    def pieces(self) -> Iterator[Piece]:
        """The pieces of all tensors that are gathered, in the order of a run."""
        for tensor in self.gathered():
            yield from tensor.pieces


@dataclass(frozen=True)
class Plan:
    """Everything that a run does, decided before it reads a tensor."""

    geometry: Geometry
    files: tuple[PlannedFile, ...]
    checked_while_reading: frozenset[RecordKey] = frozenset()  # read once, whole, front to back: the CRC follows
    checked_beforehand: tuple[tuple[int, Record], ...] = ()  # the other records with a CRC: (file number, record)
    compare: tuple[tuple[str, int], ...] = ()  # (key, file number): replicas to compare with file 0's by value
    meta_keys: tuple[
        str, ...
    ] = ()  # keys of Meta's layout that are read or written: their spelling makes the way back exact
    dropped: Mapping[str, str] = field(default_factory=dict)  # source key -> why
    base_evidence: tuple[str, ...] = ()  # source keys that only base models carry
    warnings: tuple[str, ...] = ()
    # With a recipe: every linear layer that it could name, and the scheme that it gives to it.
    linear_layers: tuple[tuple[Matrix, Scheme | None], ...] = ()

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def matrices(self) -> list[EncodedMatrix]:
        """The matrices that a recipe encodes, each once, in the order of the files."""
        found = {t.part.matrix.matrix.module: t.part.matrix for t in self.tensors if t.part}
        return list(found.values())

    @property
    def changed(self) -> list[PlannedTensor]:
        """The tensors, before encoding, that an adapter changes."""
        found = {id(tensor): tensor for file in self.files for tensor in file.gathered() if tensor.changes}
        return list(found.values())

    @property
    def change_bytes(self) -> int:
        """The most memory that an adapter's values take at once."""
        return max((most_bytes(tensor.changes) for tensor in self.changed), default=0)

    @property
    def output_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def parameters(self) -> int:
        return sum(self.parameters_by_kind().values())

    def parameters_by_kind(self) -> Mapping[str, int]:
        """Parameters of the model by family of tensors (`checkpoints.families`), however they are stored."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            if tensor.part is None:
                counts[family_of(tensor.name)] += tensor.numel
        for encoded in self.matrices:
            counts[family_of(encoded.matrix.key)] += encoded.matrix.n * encoded.matrix.k
        return counts

    @property
    def main_dtype(self) -> str:
        """The dtype of most bytes that no recipe encodes."""
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
