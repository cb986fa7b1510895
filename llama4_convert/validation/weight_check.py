"""The streamed bit comparison: every tensor of two checkpoints, each through its own layout's binding.

What differs by a single bit is found with certainty, whatever logits make of it; how it is wrong is `diagnosis`'s to say.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from llama4.config import Llama4Config
from llama4.weights import BindingError, LogicalTensor, ShapeError, parameter_shapes
from llama4.weights_transformers import expert_of_fused, transformers_key
from llama4_convert.checkpoints.quantized import DamagedMatrix, QuantizedReader
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.reference.checkpoint import Checkpoint
from llama4_convert.validation.diagnosis.diagnose import Diagnoser
from llama4_convert.validation.diagnosis.sketches import Sketches
from llama4_convert.validation.diagnosis.tensor_pairs import FLOATS, SLICED, TensorPairs, cast
from llama4_convert.validation.parity.memory import INTERPRETER
from llama4_convert.validation.parity.metrics import finite
from llama4_convert.validation.tensor_check import (
    LARGEST_LOSS,
    Outcome,
    compare_bits,
    compare_quantized,
    digest_of,
    take_sketch,
)


@dataclass(frozen=True)
class WeightFault:
    """One logical tensor of the candidate that is not the reference's."""

    name: str
    tensor: str  # the Transformers key, fused form
    cause: str
    kind: str | None = None  # the cause in a word; None where no hypothesis fits
    is_missing: bool = False
    max_abs_diff: float | None = (
        None  # NaN where either side has one; None where numbers cannot be held against each other
    )

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
    largest: dict[str, float] = field(default_factory=dict)  # difference of a number, of those that are wrong
    losses: list[MatrixLoss] = field(default_factory=list)


# Bytes that a number of a quantized matrix takes while it is compared, measured: as float32 on both sides, and errors.
_BYTES_QUANTIZED = 22


def compare_weights(
    reference: Checkpoint,
    candidate: Checkpoint,
    config: Llama4Config,
    advance: Callable[[int], None],
    *,
    memory: int = 2 << 30,
    begun: Compared | None = None,
    note: Callable[[Compared], None] = lambda compared: None,
    equal: MutableMapping[str, str] | None = None,
) -> Iterator[WeightFault | MatrixLoss]:
    """The loss of every quantized matrix, then the faults of `candidate`, in model order; `config` says what there must be.

    What is quantized cannot be equal: it is a fault only beyond what its scheme can lose. `advance` is told the bytes of the
    reference as they are read; what is wrong is read a second time, to say how. As many tensors are looked at at a time as
    there are cores, and as `memory` bytes hold; hypotheses that they do not hold are left out, and that is said. `note` is
    told how far it has come, and `begun` goes on from there. `equal` takes the digest of each tensor that is the reference's
    bit by bit; one that has its digest there already is held against that, and the reference's is not read.
    """
    ours = {tensor.name: tensor for tensor in reference.logical_tensors(config)}
    theirs = {tensor.name: tensor for tensor in candidate.logical_tensors(config, lenient=True)}
    lossy = candidate.lossy_beside(reference)
    reader = candidate.readers[0] if lossy or not reference.quantized else None
    pair = TensorPairs(
        ours,
        theirs,
        ours.keys(),
        config,
        candidate.is_multimodal,
        lossy,
        LARGEST_LOSS,
        reader if isinstance(reader, QuantizedReader) else None,
        candidate.readers[0].shape,
    )

    def elsewhere(name: str) -> str:
        return _under_another_name(ours[name], config, candidate, unexpected)

    unexpected = unexpected_tensors(reference, candidate, config)
    yield from compare_tensors(pair, advance, memory=memory, begun=begun, note=note, elsewhere=elsewhere, equal=equal)


def compare_tensors(
    pair: TensorPairs,
    advance: Callable[[int], None],
    *,
    memory: int = 2 << 30,
    begun: Compared | None = None,
    note: Callable[[Compared], None] = lambda compared: None,
    elsewhere: Callable[[str], str] = lambda name: "",
    equal: MutableMapping[str, str] | None = None,
) -> Iterator[WeightFault | MatrixLoss]:
    """As `compare_weights`, of tensors that are bound already. `elsewhere`: in words, where one that is missing may be."""
    ours, theirs = pair.ours, pair.theirs
    shapes = pair.shapes
    sketches, compared = Sketches(), begun or Compared()
    unread: set[str] = set()  # of the reference

    def look(tensor: LogicalTensor) -> Outcome:
        name, found = tensor.name, theirs[tensor.name]
        kind = pair.lossy.get(found.keys[0]) if found.keys else None
        try:
            if kind is not None:
                limit, both = pair.limits[kind], pair.both_quantized
                return compare_quantized(tensor, found, kind, limit, pair.reader, sketches, both)
            if equal is None:
                return compare_bits(tensor, found, shapes[name], sketches, pair.either_way)
            if name in equal and digest_of(found, shapes[name]) == equal[name]:
                unread.add(name)
                return Outcome()
            digest = hashlib.sha256()
            outcome = compare_bits(tensor, found, shapes[name], sketches, pair.either_way, digest)
            if outcome.cause is None:
                equal[name] = digest.hexdigest()
            return outcome
        except BindingError as error:
            if found.keys and not isinstance(error, ShapeError):
                raise
            return Outcome(str(error))

    tensors = [tensor for name, tensor in ours.items() if name in pair.names]
    before, left = tensors[: compared.done], tensors[compared.done :]
    workers = max(1, min(os.cpu_count() or 1, memory // memory_needed(pair)))
    for tensor, outcome in _in_order(look, left, workers):
        advance(prod(shapes[tensor.name]) * ITEM_SIZES[tensor.dtype])
        compared.done += 1
        if outcome.relative_mse is not None:
            key = theirs[tensor.name].keys[0]
            compared.losses.append(MatrixLoss(key, pair.lossy[key], outcome.relative_mse))
        if outcome.cause:
            compared.wrong[tensor.name] = outcome.cause
            if outcome.largest is not None:
                compared.largest[tensor.name] = outcome.largest
        note(compared)
    yield from compared.losses
    wrong = compared.wrong
    unseen = {tensor.name for tensor in before} | unread
    for tensor in tensors if wrong else ():  # what was not read in this run may stand in another's place
        if tensor.name in unseen:
            take_sketch(tensor, None if tensor.name in SLICED else tensor.load(None), shapes[tensor.name], sketches)
    diagnoser = Diagnoser(pair, wrong, sketches, memory)
    for name, cause in wrong.items():
        key, largest = transformers_key(name, pair.has_vision), compared.largest.get(name)
        if not theirs[name].keys:
            yield WeightFault(name, key, f"{cause}{elsewhere(name)}", "missing", is_missing=True)
            continue
        try:
            diagnosis = diagnoser.of(name)
        except BindingError as error:  # of a fused tensor that has no such expert, or of a sibling that is missing
            missing = largest is None and not isinstance(error, DamagedMatrix)
            told = f"{cause}: experts are missing" if missing else cause
            yield WeightFault(name, key, told, "missing" if missing else "damaged", max_abs_diff=largest)
            continue
        if diagnosis is None:
            enough = -(-(diagnoser.lacking + INTERPRETER) // (1 << 28)) / 4
            more = f"; to have its cause looked for, give --max-memory {enough:g}GiB" if diagnoser.lacking else ""
            damaged = pair.reader is not None and theirs[name].keys[0] in pair.reader.damaged
            yield WeightFault(name, key, f"{cause}{more}", "damaged" if damaged else None, max_abs_diff=largest)
        elif diagnosis.kind == "dtype":
            yield WeightFault(name, key, cause, "dtype", max_abs_diff=largest)
        else:
            told = f"{diagnosis.cause}; {cause.rpartition('; ')[2]}"
            yield WeightFault(name, key, told, diagnosis.kind, max_abs_diff=largest)


def losses_by_scheme(losses: Sequence[MatrixLoss]) -> dict[str, Any]:
    """What became of the quantized matrices, by scheme: how many, and the mean and the largest of their relative errors."""
    told: dict[str, Any] = {}
    for kind in sorted({loss.kind for loss in losses}):
        group = [loss for loss in losses if loss.kind == kind]
        worst = max(group, key=lambda loss: loss.relative_mse)
        told[kind] = {
            "matrices": len(group),
            "relative_mse_mean": finite(sum(loss.relative_mse for loss in group) / len(group)),
            "relative_mse_largest": finite(worst.relative_mse),
            "worst": worst.key,
        }
    return told


def memory_needed(pair: TensorPairs) -> int:
    """Bytes that the hungriest tensor takes while it is compared."""
    return max((_needed(pair, name) for name in pair.names), default=1)


def _needed(pair: TensorPairs, name: str) -> int:
    """Gate and up of a fused expert are read together; of two dtypes either is rounded to the other, and put together."""
    ours, found = pair.ours[name], pair.theirs[name]
    dtypes = {tensor.dtype: ITEM_SIZES[tensor.dtype] for tensor in (ours, found) if tensor.keys}
    a_number = 4 * sum(dtypes.values()) + 3
    if found.keys and found.keys[0] in pair.lossy:
        a_number = max(a_number, _BYTES_QUANTIZED)
    return pair.numbers(name) * a_number


def _in_order(
    look: Callable[[LogicalTensor], Outcome], tensors: list[LogicalTensor], workers: int
) -> Iterator[tuple[LogicalTensor, Outcome]]:
    """`look` at each in threads (reading and numpy let go of the interpreter); what it says, in their order."""
    with ThreadPoolExecutor(workers) as threads:
        begun = deque[tuple[LogicalTensor, Future[Outcome]]]()
        for tensor in tensors:
            begun.append((tensor, threads.submit(look, tensor)))
            if len(begun) > workers:
                first, outcome = begun.popleft()
                yield first, outcome.result()
        for first, outcome in begun:
            yield first, outcome.result()


def unexpected_tensors(reference: Checkpoint, candidate: Checkpoint, config: Llama4Config) -> list[str]:
    """Keys of a Transformers directory that hold no tensor of the model; beside a text model its vision tower is none of them."""
    if candidate.layout != "transformers":
        return []
    if reference.is_text_only:
        config = replace(config, vision_config=candidate.config.vision_config)
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
