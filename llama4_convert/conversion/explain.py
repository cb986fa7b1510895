"""`explain`: which bytes of which files make an output tensor, and where an input tensor goes or why it is dropped.

Everything comes from the plan that `convert` or `export` would carry out; no tensor data is read. Ranges and strides count
bytes, and ranges are absolute: the `shape` at the `strides` in the `bytes` of `file` is exactly what the plan copies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import msgspec

from llama4.config import Llama4Config
from llama4.config_fields import ConfigError
from llama4_convert.checkpoints.layouts import is_meta
from llama4_convert.checkpoints.manifest import Manifest
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.tensors import ITEM_SIZES, StoredTensor, span
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.conversion.convert import bind
from llama4_convert.conversion.explanation import (
    CopiedPiece,
    Destination,
    Explanation,
    LogicalBox,
    PieceTarget,
    Place,
    TensorLine,
)
from llama4_convert.conversion.origin import origin
from llama4_convert.conversion.request import Request
from llama4_convert.conversion.steps import Move, layout_of, row, scheme_words, steps
from llama4_convert.conversion.tensor_names import Found, Names
from llama4_convert.conversion.to_meta import ExportRequest, bind_export
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.planning.binding import model_shape, shape_of_config
from llama4_convert.planning.plan import Piece, PlannedTensor
from llama4_convert.streaming.job import Job
from mappings import Box, MappingError, load_table

_NOWHERE = Place(file=None, bytes=None, dtype=None, shape=None)


def explain(path: str | os.PathLike[str], tensor: str, *, ranks: int | None = None, **options: Any) -> Explanation:
    """Explain what becomes of `tensor` in `path`, or what makes it. Reads no tensor data.

    For Meta's directory the outputs are what `convert` would write, with `ranks` what `export` would; for a Transformers
    directory what `export` would write, with `recipe` what `convert` would. `options` are the fields of `Request`. `tensor` is a
    stored key, a name of the reference, a module, or a shell-like pattern; where it means several tensors, `matches` lists them.
    Raises a ConvertError; UsageError where no tensor has that name.
    """
    subject = _subject(Path(path), ranks, options)
    found = subject.names.find(tensor)
    explanation = partial(Explanation, path=str(path), command=subject.command, warnings=subject.warnings)
    if len(found) > 1:
        return explanation(tensor=tensor, matches=[subject.line(one) for one in found])
    return explanation(**subject.explained(found[0]))


@dataclass(frozen=True)
class _Output:
    """A tensor to be written, and its file."""

    file: str
    tensor: PlannedTensor

    @property
    def place(self) -> Place:
        t = self.tensor
        return Place(file=self.file, bytes=[t.offset, t.offset + t.nbytes], dtype=t.dtype, shape=list(t.shape))


@dataclass(frozen=True)
class _Input:
    """A tensor of the source and its file; `stored` is None for an entry that is no tensor."""

    file: str
    stored: StoredTensor | None

    @property
    def place(self) -> Place:
        t = self.stored
        if t is None:
            return Place(file=self.file, bytes=None, dtype=None, shape=None)
        first = t.record.offset + t.offset * t.itemsize
        end = first + span(t.shape, t.strides) * t.itemsize
        return Place(file=self.file, bytes=[first, end], dtype=t.dtype, shape=list(t.shape))


def _subject(path: Path, ranks: int | None, options: Mapping[str, Any]) -> _Subject:
    request = Request(path, **options)
    if not is_meta(path) and ranks is None and request.recipe is None:
        source = TransformersCheckpoint.open_llama4(path)
        if "quantization_config" in source.config:  # no command converts it: only its origin is explained
            return _Subject(source, None, None)
    if ranks is None and (request.recipe or is_meta(path)):
        bound, command = bind(request), "convert"
        command += f" --recipe {request.recipe}" if request.recipe else ""
        return _Subject(bound.source.checkpoint, bound.job, command)
    theirs = {"source", "allow_rank_mismatch"}
    given = [f.name for f in fields(Request) if f.name not in theirs and getattr(request, f.name) != f.default]
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for `convert`; of {path}"
            f"{' with --ranks' if ranks else ''} this explains what `export` would write: leave it out"
        )
    export = bind_export(ExportRequest(path, ranks, request.allow_rank_mismatch))
    return _Subject(export.source, export.job, f"export --ranks {export.ranks}")


class _Subject:
    """A checkpoint, and the job that `command` would carry out on it (None: nothing is made of it)."""

    def __init__(self, source: MetaCheckpoint | TransformersCheckpoint, job: Job | None, command: str | None) -> None:
        self.source, self.plan, self.command = source, job.plan if job else None, command
        self.source_files = job.source_files if job else ()
        self.warnings = list(self.plan.warnings) if self.plan else []
        self.manifest = Manifest.read(source.path) if isinstance(source, TransformersCheckpoint) else None
        if isinstance(source, MetaCheckpoint):
            assert self.plan is not None
            self.config = Llama4Config.from_geometry(self.plan.geometry)
            self.binding = load_table().bind(model_shape(self.plan.geometry))
        else:
            try:
                self.config = Llama4Config.from_json(source.config)
            except ConfigError as error:
                raise BadInput(f"{source.path}: {error}") from error
            self.binding = load_table().bind(shape_of_config(self.config))
        self.ranks = len(source.ranks) if isinstance(source, MetaCheckpoint) else 1

    @cached_property
    def names(self) -> Names:
        return Names(self.outputs, self.inputs, self.binding, self.config)

    @cached_property
    def outputs(self) -> dict[str, list[_Output]]:
        """By name; in Meta's layout every rank file has one."""
        found: dict[str, list[_Output]] = {}
        for file in self.plan.files if self.plan else ():
            for tensor in file.tensors:
                found.setdefault(tensor.name, []).append(_Output(file.name, tensor))
        return found

    @cached_property
    def inputs(self) -> dict[str, list[_Input]]:
        """By name, of each rank; also the keys that were dropped when this directory was made, with no place."""
        found: dict[str, list[_Input]] = {}
        files = self.source.ranks if isinstance(self.source, MetaCheckpoint) else self.source.files
        for index in files:
            for name, stored in index.tensors.items():
                found.setdefault(name, []).append(_Input(index.path.name, stored))
            for name in getattr(index, "others", ()):
                found.setdefault(name, []).append(_Input(index.path.name, None))
        for name in self.manifest.dropped if self.manifest else ():
            found.setdefault(name, [])
        return found

    def line(self, found: Found) -> TensorLine:
        place = self._places(found)[0]
        return TensorLine(tensor=found.name, role=found.role, **_fields(place), dropped=self._dropped(found))

    def _places(self, found: Found) -> list[Place]:
        ends = self.outputs[found.name] if found.role == "output" else self.inputs[found.name]
        return [end.place for end in ends] or [_NOWHERE]

    def _dropped(self, found: Found) -> str | None:
        if found.role == "output":
            return None
        if self.plan and found.name in self.plan.dropped:
            return self.plan.dropped[found.name]
        if self.manifest and found.name in self.manifest.dropped:
            return f"{self.manifest.dropped[found.name]}; it was, when this directory was made"
        return None

    def explained(self, found: Found) -> dict[str, Any]:
        """The fields of an `Explanation` of one tensor."""
        line, came_from = self.line(found), None
        if self.manifest and found.role == "input" and line.dropped is None:
            try:
                came_from = origin(found.name, line.dtype or "", self.manifest, self.binding)
            except MappingError as error:
                raise BadInput(f"{self.source.path}: llama4-convert.json does not fit config.json: {error}") from error
        return {
            **_fields(line),
            "other_ranks": self._places(found)[1:],
            "replicated": found.name in self.binding.meta and self.binding.is_replicated(found.name),
            "part": self._box(*found.part) if found.part else None,
            "came_from": came_from,
            **(self._as_output(found) if found.role == "output" else self._as_input(found)),
        }

    def _as_output(self, found: Found) -> dict[str, Any]:
        outputs = self.outputs[found.name]
        pieces = [(output, piece) for output in outputs for piece in _pieces(output.tensor, found.part)]
        tensors = list(dict.fromkeys(piece.target.tensor for _, piece in pieces))
        keys = dict.fromkeys([*(piece.key for _, piece in pieces), found.name])
        return {
            "op": self._steps(outputs[0].tensor, [piece for output, piece in pieces if output is outputs[0]]),
            "row": row(self.binding, tensors, keys) if tensors else None,
            "made_of": [self._piece(output, piece) for output, piece in pieces],
            "goes_to": [],
        }

    def _as_input(self, found: Found) -> dict[str, Any]:
        goes_to = []
        tensors: dict[str, None] = {}
        for name, outputs in self.outputs.items():
            for output in outputs:
                pieces = [piece for piece in _pieces(output.tensor) if piece.key == found.name]
                if pieces:
                    tensors.update(dict.fromkeys(piece.target.tensor for piece in pieces))
                    op, copied = self._steps(output.tensor, pieces), [self._piece(output, piece) for piece in pieces]
                    goes_to.append(Destination(tensor=name, **_fields(output.place), op=op, pieces=copied))
        keys = [found.name, *dict.fromkeys(to.tensor for to in goes_to)]
        return {
            "op": [],
            "row": row(self.binding, list(tensors), keys) if tensors else None,
            "made_of": [],
            "goes_to": goes_to,
        }

    def _steps(self, tensor: PlannedTensor, pieces: list[Piece]) -> list[str]:
        """The steps in which these pieces make a tensor."""
        if tensor.part is not None and tensor.part.constant is not None:
            return ["write what the scheme and the size of the matrix say: no number of the source is in it"]
        layout = layout_of(self.binding, tensor.name) if tensor.part is None else None
        done = steps(self.binding, [Move(p.key, p.held, p.target) for p in pieces], layout, self.ranks)
        read, written = pieces[0].source.dtype, tensor.dtype
        if tensor.part is None:
            return done + ([f"cast {read} to {written}"] if read != written else [])
        encoded = tensor.part.matrix
        n, k = encoded.matrix.n, encoded.matrix.k
        done = [step for step in done if step != "copy as it is"]
        done += [f"cast {read} to {encoded.gathered.dtype}"] if read != encoded.gathered.dtype else []
        if encoded.scheme is None:
            return [*done, f"write as a linear layer of its own, [{n}, {k}]"]
        ending = tensor.name.removeprefix(f"{encoded.matrix.module}.")
        if encoded.keeps_bits:
            return [*done, f"keep the codes of [{n}, {k}] as they are, in the order of {ending}"]
        return [*done, f"quantize [{n}, {k}] as {scheme_words(encoded.scheme)}, of which this is {ending}"]

    def _box(self, tensor: str, box: Box) -> LogicalBox:
        axes = self.binding.logical_tensor(tensor).sizes
        ranges = zip(axes, box.start, box.size, strict=True)
        return LogicalBox(tensor=tensor, box={axis: [start, start + n] for axis, start, n in ranges})

    def _piece(self, output: _Output, piece: Piece) -> CopiedPiece:
        part = output.tensor.part
        whole = part.matrix.gathered if part else output.tensor  # every part of an encoded matrix is made of all of it
        common = piece.held.box.common(piece.target.box)
        assert common is not None
        copy, read, write = piece.copy, piece.source.itemsize, ITEM_SIZES[whole.dtype]
        first = piece.source.record.offset + copy.source_offset * read
        start = (0 if part else output.tensor.offset) + copy.target_offset * write
        named = {"matrix": part.matrix.matrix.module} if part else {"file": output.file, "tensor": whole.name}
        return CopiedPiece(
            file=self.source_files[piece.file].path.name,
            tensor=piece.key,
            bytes=[first, first + span(copy.shape, copy.source_strides) * read],
            dtype=piece.source.dtype,
            shape=list(copy.shape),
            strides=[s * read for s in copy.source_strides],
            source_box=self._box(piece.target.tensor, common),
            op=_run_words(piece),
            into=PieceTarget(
                **named,
                dtype=whole.dtype,
                whole_shape=list(whole.shape),
                bytes=[start, start + span(copy.shape, copy.target_strides) * write],
                strides=[s * write for s in copy.target_strides],
            ),
        )


def _fields(struct: msgspec.Struct) -> dict[str, Any]:
    return msgspec.structs.asdict(struct)


def _pieces(tensor: PlannedTensor, part: tuple[str, Box] | None = None) -> Iterator[Piece]:
    """The pieces of a tensor, or of its part of a logical tensor. An encoded part has all pieces of its matrix."""
    if tensor.part is not None:
        if tensor.part.constant is None:
            yield from tensor.part.matrix.gathered.pieces
        return
    for piece in tensor.pieces:
        if part is None:
            yield piece
        elif piece.target.tensor == part[0]:
            box = piece.target.box.common(part[1])
            inside = piece.narrowed(box) if box else None
            if inside:
                yield inside


def _run_words(piece: Piece) -> str:
    shape, strides, size = piece.copy.shape, piece.copy.source_strides, piece.source.itemsize
    if strides[-1] != 1 and shape[-1] != 1:
        return f"{piece.numel} numbers, one by one"
    runs = piece.numel // shape[-1]
    return f"{shape[-1] * size} bytes at once" if runs == 1 else f"{runs} runs of {shape[-1] * size} bytes"
