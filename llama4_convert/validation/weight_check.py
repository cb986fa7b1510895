"""The streamed comparison of weights: every tensor of two checkpoints, each through its own layout's binding.

What differs by a single bit is found with certainty, whatever logits make of it; how it is wrong is `diagnosis`'s to say.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from msgspec import Struct, field

from llama4.config import Llama4Config
from llama4.weights import BindingError, expert_of
from llama4.weights_transformers import expert_of_fused, transformers_key
from llama4_convert.checkpoints.quantized import DamagedMatrix, QuantizedReader
from llama4_convert.reference.checkpoint import Checkpoint
from llama4_convert.validation.diagnosis.diagnose import Diagnoser
from llama4_convert.validation.diagnosis.sketches import Sketches
from llama4_convert.validation.diagnosis.tensor_pairs import FLOATS, SLICED, TensorPairs, cast
from llama4_convert.validation.parity.memory import INTERPRETER_BYTES
from llama4_convert.validation.parity.metrics import finite
from llama4_convert.validation.results import ExpertErrors, SchemeLoss, TensorFault
from llama4_convert.validation.tensor_check import (
    LARGEST_LOSS,
    TensorComparison,
    compare_tensor,
    memory_needed,
    sketch_of,
)


@dataclass(frozen=True)
class WeightFault:
    """One logical tensor of the candidate that is not the reference's."""

    name: str
    tensor: str  # the Transformers key, fused form
    cause: str
    kind: str | None = None  # the cause in a word; None where no hypothesis fits
    is_missing: bool = False
    max_abs_diff: float | None = None  # NaN where either side has one; None where no difference can be taken

    @property
    def module(self) -> str:
        """The name without the layer: "feed_forward.experts.3.gate"."""
        return re.sub(r"layers\.\d+\.", "", self.name)

    def result(self) -> TensorFault:
        layer = re.search(r"layers\.(\d+)\.", self.name)
        return TensorFault(
            layer=int(layer[1]) if layer else None,
            module=self.module,
            tensor=self.tensor,
            cause=self.cause,
            kind=self.kind,
        )


class MatrixLoss(Struct, frozen=True, array_like=True):
    """What quantizing a matrix cost: squared error of what the runtime computes with over the squared weights."""

    key: str
    scheme: str
    relative_mse: float


class ComparisonProgress(Struct):
    """How far a comparison has come: tensors in model order, what is wrong with some of them, what quantizing cost others."""

    done: int = 0
    wrong: dict[str, str] = field(default_factory=dict)  # name -> cause
    largest: dict[str, float] = field(default_factory=dict)  # difference of two numbers, of those that are wrong
    losses: list[MatrixLoss] = field(default_factory=list)


class WeightComparison(NamedTuple):
    """What comparing all tensors found, each list in model order."""

    losses: list[MatrixLoss]
    faults: list[WeightFault]
    compared: int  # tensors that both have
    unexpected: Sequence[str]  # keys that hold no tensor of the model


def pairs_with_reference(reference: Checkpoint, candidate: Checkpoint, config: Llama4Config) -> TensorPairs:
    """The tensors that `config` calls for, `candidate`'s held to `reference`'s. Raises BindingError if the latter lacks one.

    A quantized tensor cannot be equal: it may lose what its scheme can.
    """
    ours = {tensor.name: tensor for tensor in reference.logical_tensors(config)}
    theirs = {tensor.name: tensor for tensor in candidate.logical_tensors(config, lenient=True)}
    lossy = candidate.lossy_beside(reference)
    reader = candidate.readers[0]
    return TensorPairs(
        ours,
        theirs,
        list(ours),
        config,
        candidate.is_multimodal,
        lossy,
        LARGEST_LOSS,
        reader if isinstance(reader, QuantizedReader) and (lossy or not reference.quantized) else None,
        reader,
        _unexpected_tensors(reference, candidate, config),
    )


def compare_weights(
    pairs: TensorPairs,
    advance: Callable[[int], None] = lambda n: None,
    *,
    memory: int = 2 << 30,
    progress: ComparisonProgress | None = None,
    save: Callable[[ComparisonProgress], None] = lambda progress: None,
    matching: MutableMapping[str, str] | None = None,
) -> WeightComparison:
    """What quantizing cost every matrix, and how the tensors that are wrong are wrong.

    `advance` takes the bytes of the reference as they are read; a wrong tensor is read a second time, to say how. As many tensors
    are compared at a time as there are cores, and as `memory` bytes hold; hypotheses that they do not hold are left out, and the
    cause says so. The comparison goes on from `progress`, and `save` takes it after each tensor. `matching` takes the digest of
    each tensor that is the reference's bit by bit; one that has its digest there already is compared with that, and the
    reference's is not read. Raises BindingError for a tensor that cannot be read.
    """
    sketches, progress = Sketches(), progress or ComparisonProgress()
    unread = set(pairs.names[: progress.done])  # of the reference, in this run

    def compare(name: str) -> TensorComparison:
        known = matching.get(name) if matching is not None else None
        return compare_tensor(pairs, name, known, with_digest=matching is not None)

    workers = max(1, min(os.cpu_count() or 1, memory // memory_needed(pairs)))
    for name, found in _in_order(compare, pairs.names[progress.done :], workers):
        advance(pairs.nbytes(name))
        if found.sketch is not None:
            sketches.add(name, *found.sketch)
        if not found.reference_was_read:
            unread.add(name)
        if found.digest is not None and matching is not None:
            matching[name] = found.digest
        _record(pairs, name, found, progress)
        save(progress)
    faults = _diagnose(pairs, progress, sketches, unread, memory) if progress.wrong else []
    n_missing = sum(fault.is_missing for fault in faults)
    return WeightComparison(progress.losses, faults, len(pairs.names) - n_missing, pairs.unexpected)


def _record(pairs: TensorPairs, name: str, found: TensorComparison, progress: ComparisonProgress) -> None:
    progress.done += 1
    if found.relative_mse is not None:
        key = pairs.theirs[name].keys[0]
        progress.losses.append(MatrixLoss(key, pairs.lossy[key], found.relative_mse))
    if found.cause:
        progress.wrong[name] = found.cause
        if found.largest is not None:
            progress.largest[name] = found.largest


def _in_order(
    compare: Callable[[str], TensorComparison], names: Sequence[str], workers: int
) -> Iterator[tuple[str, TensorComparison]]:
    """`compare` of each name, in threads (reading and numpy let go of the interpreter); the results in the order of the names."""
    with ThreadPoolExecutor(workers) as threads:
        begun = deque[tuple[str, Future[TensorComparison]]]()
        for name in names:
            begun.append((name, threads.submit(compare, name)))
            if len(begun) > workers:
                first, result = begun.popleft()
                yield first, result.result()
        for first, result in begun:
            yield first, result.result()


def _diagnose(
    pairs: TensorPairs, progress: ComparisonProgress, sketches: Sketches, unread: Collection[str], memory: int
) -> list[WeightFault]:
    """How each wrong tensor is wrong."""
    ours, theirs = pairs.ours, pairs.theirs
    for name in (name for name in pairs.names if name in unread):  # each may stand in another's place
        whole = None if name in SLICED else ours[name].load(None)
        if made := sketch_of(ours[name], whole, pairs.shapes[name]):
            sketches.add(name, *made)
    diagnoser = Diagnoser(pairs, progress.wrong, sketches, memory)
    faults = []
    for name, cause in progress.wrong.items():
        largest = progress.largest.get(name)
        words, kind = _cause_of(pairs, name, cause, largest, diagnoser)
        key, is_missing = transformers_key(name, pairs.has_vision), not theirs[name].keys
        faults.append(WeightFault(name, key, words, kind, is_missing, largest))
    return faults


def _cause_of(
    pairs: TensorPairs, name: str, cause: str, largest: float | None, diagnoser: Diagnoser
) -> tuple[str, str | None]:
    """In words and in a word; `cause` is what the comparison said, `largest` the difference of two numbers."""
    found = pairs.theirs[name]
    if not found.keys:
        return f"{cause}{_under_another_name(pairs, name)}", "missing"
    try:
        diagnosis = diagnoser.diagnose(name)
    except BindingError as error:  # of a fused tensor that has no such expert, or of a sibling that is missing
        if largest is None and not isinstance(error, DamagedMatrix):
            return f"{cause}: experts are missing", "missing"
        return cause, "damaged"
    if diagnosis is None:
        enough = -(-(diagnoser.lacking + INTERPRETER_BYTES) // (1 << 28)) / 4
        more = f"; to have its cause looked for, give --max-memory {enough:g}GiB" if diagnoser.lacking else ""
        is_damaged = pairs.reader is not None and found.keys[0] in pairs.reader.damaged
        return f"{cause}{more}", "damaged" if is_damaged else None
    if diagnosis.kind == "dtype":
        return cause, "dtype"
    return f"{diagnosis.cause}; {cause.rpartition('; ')[2]}", diagnosis.kind


def losses_by_scheme(losses: Sequence[MatrixLoss]) -> dict[str, SchemeLoss]:
    """What became of the quantized matrices, by scheme: how many, and the mean and the largest of their relative errors."""
    made = {}
    for scheme in sorted({loss.scheme for loss in losses}):
        group = [loss for loss in losses if loss.scheme == scheme]
        worst = max(group, key=lambda loss: loss.relative_mse)
        made[scheme] = SchemeLoss(
            matrices=len(group),
            relative_mse_mean=finite(sum(loss.relative_mse for loss in group) / len(group)),
            relative_mse_largest=finite(worst.relative_mse),
            worst=worst.key,
        )
    return made


def error_by_expert(losses: Sequence[MatrixLoss]) -> ExpertErrors | None:
    """Relative squared error, the mean of an expert's matrices; None if none is quantized."""
    errors: dict[int, dict[int, list[float]]] = {}  # by layer and expert
    for loss in losses:
        if matrix := expert_of(loss.key):
            errors.setdefault(matrix.layer, {}).setdefault(matrix.expert, []).append(loss.relative_mse)
    if not errors:
        return None
    n_experts = 1 + max(expert for row in errors.values() for expert in row)
    return ExpertErrors(
        layers=sorted(errors),
        relative_mse=[
            [finite(sum(row[e]) / len(row[e])) if e in row else None for e in range(n_experts)]
            for _, row in sorted(errors.items())
        ],
    )


def _unexpected_tensors(reference: Checkpoint, candidate: Checkpoint, config: Llama4Config) -> list[str]:
    """Keys of a Transformers directory that hold no tensor of the model; beside a text model its vision tower is none of them."""
    if candidate.layout != "transformers":
        return []
    if reference.is_text_only:
        config = replace(config, vision_config=candidate.config.vision_config)
    used = {key for tensor in candidate.logical_tensors(config, lenient=True) for key in tensor.keys}
    return sorted(set(candidate.readers[0].keys()) - used)


def _under_another_name(pairs: TensorPairs, name: str) -> str:
    """In words, which of the unexpected tensors the missing one may be."""
    ours, reader = pairs.ours[name], pairs.their_reader
    shape, matrix = pairs.shapes[name], expert_of(name)
    shapes = [shape]
    if matrix:  # one expert's place in a fused tensor
        doubled = (1 if matrix.part == "down" else 2) * shape[0]
        shapes.append((pairs.config.text_config.num_local_experts, shape[1], doubled))
    fitting = [key for key in pairs.unexpected if reader.shape(key) in shapes]
    for key in fitting if name not in SLICED else ():
        if matrix and len(reader.shape(key)) == 3:
            bits = expert_of_fused(reader, key, matrix.expert, matrix.part, None)
        else:
            bits = reader.read(key)
        if reader.dtype(key) in FLOATS and np.array_equal(cast(ours.load(None), ours.dtype, reader.dtype(key)), bits):
            return f": it is there under the name {key}"
    return f": maybe it is there under the name {' or '.join(fitting[:3])}" if fitting else ""
