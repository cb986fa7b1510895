"""The plan as data: files, the tensors in them with their byte ranges, and the pieces of source tensors that each is made of.

`planning` makes it; the dry run, the size estimate, the progress bar, the resume and the run itself read it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

from llama4.geometry import Geometry
from llama4_convert.checkpoints.families import family_of
from llama4_convert.checkpoints.tensors import ITEM_SIZES, Record, StoredTensor
from llama4_convert.planning.changes import ChangePiece, most_bytes
from llama4_convert.planning.locations import Holding
from mappings import Box, Copy, Placement, copies
from mappings.matrices import Matrix
from quant.encoding import Encoder
from quant.recipe import Scheme

RecordKey = tuple[int, str]  # rank, record name


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
    def record_key(self) -> RecordKey:
        return self.rank, self.source.record.name

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
    streamed: frozenset[RecordKey]  # read front to back by one file: checked on the way
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
                counts[family_of(tensor.name)] += tensor.numel
        for planned in self.matrices:
            counts[family_of(planned.matrix.key)] += planned.matrix.n * planned.matrix.k
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
