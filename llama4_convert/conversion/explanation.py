"""What `explain` returns: the keys of its `--json`, in its order. Ranges and strides count bytes, from the start of a file."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class Place(Struct, frozen=True, kw_only=True):
    """Where a tensor lies; all null for a tensor that is not there any more."""

    file: str | None
    """the file"""
    bytes: list[int] | None
    """its first byte in the file, and the one behind its last"""
    dtype: str | None
    """as safetensors spells it"""
    shape: list[int] | None
    """its dimensions"""


class LogicalBox(Struct, frozen=True, kw_only=True):
    """A box of a logical tensor."""

    tensor: str
    """the logical tensor, by the tables"""
    box: dict[str, list[int]]
    """by axis: the first index, and the one behind the last"""


class Row(Struct, frozen=True, kw_only=True):
    """The part of the tables that is about a tensor."""

    table: str
    """the TOML file"""
    tensors: dict[str, str]
    """logical tensors and their axes"""
    sharded: list[str]
    """axes along which ranks share them"""
    meta: dict[str, str]
    """keys of Meta's layout and their patterns"""
    transformers: dict[str, str]
    """keys of Transformers' layout and their patterns"""


class PieceTarget(Struct, frozen=True, kw_only=True):
    """The target of a copy: a tensor of an output file, or a matrix that is encoded next."""

    matrix: str | UnsetType = UNSET
    """the matrix that is gathered"""
    file: str | UnsetType = UNSET
    """the output file"""
    tensor: str | UnsetType = UNSET
    """the output tensor"""
    dtype: str
    """of the target"""
    whole_shape: list[int]
    """of the whole target"""
    bytes: list[int]
    """range in the file, or in the matrix"""
    strides: list[int]
    """bytes from one element to the next, by dimension"""


class CopiedPiece(Struct, frozen=True, kw_only=True):
    """One strided copy: who reads `bytes` of `file` and takes `shape` at `strides` has what is copied."""

    file: str
    """the source file"""
    tensor: str
    """the source key"""
    bytes: list[int]
    """range in the file"""
    dtype: str
    """of the source"""
    shape: list[int]
    """elements that are copied, by dimension"""
    strides: list[int]
    """bytes from one element to the next, by dimension"""
    source_box: LogicalBox
    """what is copied of the logical tensor"""
    op: str
    """how it is read"""
    into: PieceTarget
    """where it goes"""


class Destination(Struct, frozen=True, kw_only=True):
    """An output tensor that a source tensor goes into."""

    tensor: str
    """its key"""
    file: str | None
    """the file; null if it is nowhere any more"""
    bytes: list[int] | None
    """`[first, end]` in the file, the end not included; null for an entry that is no tensor"""
    dtype: str | None
    """as safetensors spells it"""
    shape: list[int] | None
    """its dimensions"""
    op: list[str]
    """the steps that make it"""
    pieces: list[CopiedPiece]
    """the copies"""


class Origin(Struct, frozen=True, kw_only=True):
    """What a tensor of a converted directory was made of, by its manifest."""

    tool: str
    """that made the directory"""
    layout: str | None
    """of the source: meta or transformers"""
    recipe: str | None
    """that quantized"""
    dtype: str | None
    """that was asked for"""
    tensors: list[str]
    """source keys"""
    files: list[str]
    """rank files"""
    row: Row | None
    """of the tables"""
    op: list[str]
    """the steps"""


class TensorLine(Struct, frozen=True, kw_only=True):
    """A tensor, of several that a name or a pattern means."""

    tensor: str
    """its key"""
    role: Literal["output", "input"]
    """written, or read"""
    file: str | None
    """the file; null if it is nowhere any more"""
    bytes: list[int] | None
    """`[first, end]` in the file, the end not included; null for an entry that is no tensor"""
    dtype: str | None
    """as safetensors spells it"""
    shape: list[int] | None
    """its dimensions"""
    dropped: str | None
    """why it is not converted; null if it is"""


class Explanation(Struct, frozen=True, kw_only=True):
    """What becomes of a tensor, or what makes it."""

    path: str
    """PATH"""
    command: str | None
    """the command whose plan is explained; null for a quantized directory, of which nothing is made"""
    warnings: list[str]
    """of the plan"""
    tensor: str
    """the full name"""
    matches: list[TensorLine] | UnsetType = UNSET
    """only where TENSOR means several: each of them, and none of the fields below"""
    role: Literal["output", "input"] | UnsetType = UNSET
    """`output` or `input`; a name of both is explained as the output"""
    file: str | UnsetType | None = UNSET
    """where it is or will be; null if it is nowhere any more. With several ranks the first rank's"""
    bytes: list[int] | UnsetType | None = UNSET
    """`[first, end]` in the file, the end not included; null for an entry that is no tensor"""
    dtype: str | UnsetType | None = UNSET
    """as safetensors spells it"""
    shape: list[int] | UnsetType | None = UNSET
    """of the stored tensor"""
    dropped: str | UnsetType | None = UNSET
    """why an input goes nowhere; else null"""
    other_ranks: list[Place] | UnsetType = UNSET
    """the same key in the other rank files"""
    replicated: bool | UnsetType = UNSET
    """whether all ranks hold the same (Meta's keys)"""
    part: LogicalBox | UnsetType | None = UNSET
    """the box of a logical tensor, if a name of the reference means only that; else null"""
    came_from: Origin | UnsetType | None = UNSET
    """of a directory with a manifest: what the tensor was made of; else null"""
    op: list[str] | UnsetType = UNSET
    """the steps that make an output, in words"""
    row: Row | UnsetType | None = UNSET
    """of the table"""
    made_of: list[CopiedPiece] | UnsetType = UNSET
    """the copies that make an output; a matrix that is quantized is gathered first"""
    goes_to: list[Destination] | UnsetType = UNSET
    """of an input: the outputs that are made of it"""
