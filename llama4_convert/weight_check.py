"""The streamed bit comparison: every tensor of two checkpoints, each through its own layout's binding.

What differs by a single bit is found with certainty, whatever logits make of it; how it is wrong is `diagnosis`'s to say.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar

import numpy as np

from llama4.config import Llama4Config
from llama4.weights import BindingError, Bits, LogicalTensor, ShapeError, parameter_shapes
from llama4.weights_transformers import expert_of_fused, transformers_key
from llama4_convert.checkpoints.quantized import QuantizedReader
from llama4_convert.diagnosis.altered import floats
from llama4_convert.diagnosis.diagnoser import Diagnoser
from llama4_convert.diagnosis.rearranged import as_matrix, listed
from llama4_convert.diagnosis.sides import FLOATS, SLICED, cast, slices
from llama4_convert.diagnosis.sketches import Sketches, sketch, sketch_of_rows
from llama4_convert.reference import Checkpoint

_Seen = TypeVar("_Seen")


@dataclass(frozen=True)
class WeightFault:
    """One logical tensor of the candidate that is not the reference's."""

    name: str
    tensor: str  # the Transformers key, fused form
    cause: str
    kind: str | None = None  # the cause in a word; None where no hypothesis fits
    is_missing: bool = False

    @property
    def layer(self) -> int | None:
        """The layer of the text model, or of the vision tower if the name begins so."""
        found = re.search(r"layers\.(\d+)\.", self.name)
        return int(found[1]) if found else None

    @property
    def module(self) -> str:
        """The name without the layer: "feed_forward.experts.3.gate"."""
        return re.sub(r"layers\.\d+\.", "", self.name)

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "module": self.module,
            "tensor": self.tensor,
            "cause": self.cause,
            "kind": self.kind,
        }


# No scheme of ours errs so much on any weights that are trained: docs/validate.md. A wrong tensor errs by 1 to 2.
_LARGEST_LOSS = {"int4": 0.2, "fp8": 0.005, "nf4": 0.1}
# Nor does any in one output: a group of 128 int4 codes errs by no more than 128 * (1 / 15) ** 2 of its largest weight's square.
_LARGEST_ROW_LOSS = 0.6


@dataclass(frozen=True)
class MatrixLoss:
    """What quantizing a matrix cost: squared error of what the runtime computes with over the squared weights."""

    key: str
    kind: str
    relative_mse: float


@dataclass
class Compared:
    """How far a comparison has come: tensors in model order, what is wrong with some of them, what quantizing cost others."""

    done: int = 0
    wrong: dict[str, str] = field(default_factory=dict)
    losses: list[MatrixLoss] = field(default_factory=list)


# Bytes that a number takes while it is compared, measured: raw on both sides; of a quantized matrix as float32, and errors.
_BYTES_PLAIN, _BYTES_QUANTIZED = 8, 22


def compare_weights(
    reference: Checkpoint,
    candidate: Checkpoint,
    config: Llama4Config,
    advance: Callable[[int], None],
    *,
    memory: int = 2 << 30,
    begun: Compared | None = None,
    note: Callable[[Compared], None] = lambda compared: None,
) -> Iterator[WeightFault | MatrixLoss]:
    """The loss of every quantized matrix, then the faults of `candidate`, in model order; `config` says what there must be.

    What is quantized cannot be equal: it is a fault only beyond what its scheme can lose. `advance` is told the bytes of the
    reference as they are read; what is wrong is read a second time, to say how. As many tensors are looked at at a time as
    there are cores, and as `memory` bytes hold. `note` is told how far it has come, and `begun` goes on from there.
    """
    has_vision = config.vision_config is not None
    theirs = {tensor.name: tensor for tensor in candidate.logical_tensors(config, lenient=True)}
    ours = {tensor.name: tensor for tensor in reference.logical_tensors(config)}
    quantized = candidate.lossy_beside(reference)
    reader = candidate.readers[0] if quantized or not reference.quantized else None
    reader = reader if isinstance(reader, QuantizedReader) else None
    sketches, compared = Sketches(), begun or Compared()

    def look(tensor: LogicalTensor) -> tuple[int, MatrixLoss | None, str | None]:
        found = theirs[tensor.name]
        kind = quantized.get(found.keys[0]) if found.keys else None
        read: list[int] = []
        loss = None
        try:
            if kind is None:
                cause = _compare(tensor, found, config, read.append, sketches)
            else:
                error, cause = _loss(tensor, found, kind, reader, read.append, sketches)
                loss = MatrixLoss(found.keys[0], kind, error)
        except ShapeError as error:
            cause = str(error)
        except BindingError as error:
            if found.keys:
                raise
            cause = str(error)
        return sum(read), loss, cause

    tensors = list(ours.values())
    before, left = tensors[: compared.done], tensors[compared.done :]
    workers = _workers(config, bool(quantized), memory)
    for name, (nbytes, loss, cause) in _in_order(look, left, workers):
        advance(nbytes)
        compared.done += 1
        if loss:
            compared.losses.append(loss)
        if cause:
            compared.wrong[name] = cause
        note(compared)
    yield from compared.losses
    wrong = compared.wrong
    for tensor in before if wrong else ():  # what an earlier run has seen may stand in another's place
        if tensor.name not in SLICED:
            _sketch(tensor, tensor.load(None), sketches)
    diagnoser = Diagnoser(ours, theirs, wrong, config, sketches, reader, _LARGEST_LOSS, candidate.readers[0].shape)
    unexpected = unexpected_tensors(candidate, config)
    for name, cause in wrong.items():
        key = transformers_key(name, has_vision)
        if not theirs[name].keys:
            elsewhere = _under_another_name(ours[name], config, candidate, unexpected)
            yield WeightFault(name, key, f"{cause}{elsewhere}", "missing", is_missing=True)
            continue
        try:
            diagnosis = diagnoser.of(name)
        except BindingError:  # of a fused tensor that has no such expert
            yield WeightFault(name, key, f"{cause}: experts are missing", "missing")
            continue
        if diagnosis is None:
            yield WeightFault(name, key, cause)
        elif diagnosis.kind == "dtype":
            yield WeightFault(name, key, cause, "dtype")
        else:
            yield WeightFault(name, key, f"{diagnosis.cause}; {cause.rpartition('; ')[2]}", diagnosis.kind)


def _workers(config: Llama4Config, is_quantized: bool, memory: int) -> int:
    largest = max(prod(shape) for name, shape in parameter_shapes(config).items() if name not in SLICED)
    fitting = memory // max(1, largest * (_BYTES_QUANTIZED if is_quantized else _BYTES_PLAIN))
    return max(1, min(os.cpu_count() or 1, fitting))


def _in_order(
    look: Callable[[LogicalTensor], _Seen], tensors: list[LogicalTensor], workers: int
) -> Iterator[tuple[str, _Seen]]:
    """`look` at each in threads (reading and numpy let go of the interpreter); what it says, in their order."""
    with ThreadPoolExecutor(workers) as threads:
        begun = deque[tuple[str, Future[_Seen]]]()
        for tensor in tensors:
            begun.append((tensor.name, threads.submit(look, tensor)))
            if len(begun) > workers:
                name, seen = begun.popleft()
                yield name, seen.result()
        for name, seen in begun:
            yield name, seen.result()


def unexpected_tensors(candidate: Checkpoint, config: Llama4Config) -> list[str]:
    """Keys of a Transformers directory that hold no tensor of the model."""
    if candidate.layout != "transformers":
        return []
    used = {key for tensor in candidate.logical_tensors(config, lenient=True) for key in tensor.keys}
    return sorted(set(candidate.readers[0].keys()) - used)


def _under_another_name(
    ours: LogicalTensor, config: Llama4Config, candidate: Checkpoint, unexpected: Collection[str]
) -> str:
    """For a tensor that is missing: which of the unexpected ones it may be."""
    if not unexpected:
        return ""
    reader = candidate.readers[0]
    shape = parameter_shapes(config)[ours.name]
    expert = re.fullmatch(r".+\.experts\.(\d+)\.(gate|up|down)", ours.name)
    fitting = []
    for key in unexpected:
        found = reader.shape(key)
        if found != shape:
            doubled = (1 if expert is None or expert[2] == "down" else 2) * shape[0]
            if expert is None or found != (config.text_config.num_local_experts, shape[1], doubled):
                continue
        fitting.append(key)
    for key in fitting if ours.name not in SLICED else ():
        bits = (
            expert_of_fused(reader, key, int(expert[1]), expert[2], None)
            if expert and len(reader.shape(key)) == 3
            else reader.read(key)
        )
        if reader.dtype(key) in FLOATS and np.array_equal(cast(ours.load(None), ours.dtype, reader.dtype(key)), bits):
            return f": it is there under the name {key}"
    return f": maybe it is there under the name {' or '.join(fitting[:3])}" if fitting else ""


def _compare(
    ours: LogicalTensor, found: LogicalTensor, config: Llama4Config, advance: Callable[[int], None], sketches: Sketches
) -> str | None:
    """How much of `found` is wrong, in words. Raises ShapeError, and BindingError if there is none."""
    differing, elements, largest = 0, 0, 0.0
    shape = parameter_shapes(config)[ours.name]
    if ours.name in SLICED:
        sketches.add(ours.name, (shape[0], shape[1]), sketch_of_rows(ours, (shape[0], shape[1])))
    for rows in slices(ours.name, shape[0]):
        a = ours.load(rows)
        advance(a.nbytes)
        if ours.name not in SLICED:
            _sketch(ours, a, sketches)
        b = found.load(rows)
        if a.shape != b.shape:
            if rows is not None and a.shape[1:] == b.shape[1:]:
                return f"it has {'fewer' if len(b) < len(a) else 'more'} rows than the reference's"
            return f"its shape is {list(b.shape)}, not {list(a.shape)}"
        elements += a.size
        if ours.dtype != found.dtype:
            if not {ours.dtype, found.dtype} <= FLOATS:
                return f"its dtype is {found.dtype}, not {ours.dtype}"
            a = cast(a, ours.dtype, found.dtype)
        unequal = a != b
        n = int(np.count_nonzero(unequal))
        if n:
            differing += n
            difference = _largest_difference(a[unequal], b[unequal], found.dtype)
            largest = largest if difference <= largest else difference  # NaN stays
    if not differing:
        return None
    return f"{differing:,} of {elements:,} elements differ, by up to {largest:.3g}"


def _loss(
    ours: LogicalTensor,
    found: LogicalTensor,
    kind: str,
    reader: QuantizedReader | None,
    advance: Callable[[int], None],
    sketches: Sketches,
) -> tuple[float, str | None]:
    """Relative squared error, and what is wrong with it. Raises ShapeError."""
    from llama4_convert.diagnosis.quantized_faults import suspicion

    a = ours.load(None)
    advance(a.nbytes)
    _sketch(ours, a, sketches)
    b = found.load(None)
    if a.shape != b.shape:
        raise ShapeError(f"its shape is {list(b.shape)}, not {list(a.shape)}")
    x, y = floats(a, ours.dtype), floats(b, found.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = y - x
        error, power = (np.einsum("nk,nk->n", z, z).astype(np.float64) for z in (difference, x))
    del difference
    whole, limit = float(power.sum()), _LARGEST_LOSS[kind]
    loss = float(error.sum()) / whole if whole else 0.0 if not error.any() else math.inf
    if not loss <= limit:
        return loss, f"a relative squared error of {loss:.3g}: {kind} makes no more than {limit:g}"
    rows = np.flatnonzero(error > _LARGEST_ROW_LOSS * power)
    if len(rows):
        return loss, f"a relative squared error of {float((error[rows] / power[rows]).max()):.3g} in row {listed(rows)}"
    if reader is None:  # Meta's own codes, whose parts are not looked into
        return loss, None
    few = suspicion(x, y, reader.quantized[found.keys[0]], reader.read_parts(found.keys[0]))
    return loss, f"{few.cause}; a relative squared error of {loss:.3g} on the whole" if few else None


def _sketch(tensor: LogicalTensor, bits: Bits, sketches: Sketches) -> None:
    x = as_matrix(bits)
    if tensor.dtype in FLOATS and x.size:
        sketches.add(tensor.name, (x.shape[0], x.shape[1]), sketch(x, tensor.dtype))


def _largest_difference(a: Bits, b: Bits, dtype: str) -> float:
    from llama4.loading import to_tensor

    difference = (to_tensor(a, dtype).double() - to_tensor(b, dtype).double()).abs()
    return float(difference.max())
