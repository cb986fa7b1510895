"""`diff`: two checkpoints in any two layouts compared, tensor by tensor, in bounded memory.

Neither is taken as right: the result is the same whichever comes first. Each side is bound for its own configuration, so that
checkpoints of other layer or expert counts are compared as far as both have a tensor. Only the words on how a tensor differs take
a side, since they must begin somewhere: that with more of its numbers (not quantized, of the wider dtype), else the first.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod, sqrt
from typing import Any

import numpy as np

from llama4.config import Llama4Config
from llama4.weights import BindingError, LogicalTensor, absent, expert_of, parameter_shapes
from llama4.weights_transformers import transformers_key
from llama4_convert.checkpoints.manifest import DroppedKey
from llama4_convert.checkpoints.meta_quantized import DequantizedView
from llama4_convert.checkpoints.quantized import QuantizedMatrix, QuantizedReader
from llama4_convert.checkpoints.readers import CheckpointReader, RankReader
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.reference.checkpoint import Checkpoint
from llama4_convert.validation.config_diff import config_differences
from llama4_convert.validation.diagnosis.tensor_pairs import FLOATS, SLICED, TensorPairs
from llama4_convert.validation.parity.memory import INTERPRETER_BYTES
from llama4_convert.validation.parity.metrics import finite
from llama4_convert.validation.results import Diff, RoundedTensors, TensorDifference
from llama4_convert.validation.tensor_check import LARGEST_LOSS, memory_needed
from llama4_convert.validation.weight_check import WeightFault, compare_weights, losses_by_scheme
from mappings import load_table

MAX_MEMORY = 4 << 30
_FUSED = (".experts.gate_up_proj", ".experts.down_proj")
_MAX_EXPERTS = 1024  # an axis longer than that is none of experts
_SLICE_BYTES = 32 << 20  # of a tensor that no Llama 4 has, read at a time


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    max_memory: int = MAX_MEMORY,
    start: Callable[[int, int], None] = lambda total, done: None,
    progress: Callable[[int], None] = lambda n: None,
) -> Diff:
    """Compare two checkpoints of either layout in no more than `max_memory` bytes.

    Equal are tensors with the same bits; of two dtypes, those that rounding one way or the other makes the same; and what is
    quantized on one side, or otherwise than on the other, where it differs by no more than its scheme loses. Keys that `convert`
    drops decide nothing. `start(total, done)` and `progress(n)` count bytes. Raises UsageError, BadInput or EnvironmentFailed.
    """
    one, other = Checkpoint.open(a), Checkpoint.open(b)
    for checkpoint in (one, other):
        if checkpoint.unknown_quantization is not None:
            raise UsageError(
                f"{checkpoint.path} is quantized as {checkpoint.unknown_quantization}, which we cannot read: compare what it"
                " was made of"
            )
    sides = Side.bind(one, beside=other.config), Side.bind(other, beside=one.config)
    swapped = sides[1].completeness > sides[0].completeness
    right, left = reversed(sides) if swapped else sides
    pairs = _pairs(right, left)
    needed = INTERPRETER_BYTES + memory_needed(pairs)
    if needed > max_memory:
        raise UsageError(f"the largest matrix needs {needed >> 20:,} MiB: give --max-memory {-(-needed >> 20)}MiB")
    start(sum(map(pairs.nbytes, pairs.names)), 0)
    try:
        weights = compare_weights(pairs, progress, memory=max_memory - INTERPRETER_BYTES)
    except BindingError as error:
        raise BadInput(f"{a} or {b}: {error}: take whole copies of both") from error
    n_extras, different_extras = _compare_extras(*sides)
    only_in = [side.keys_beyond(against, pairs.has_vision) for side, against in (sides, (sides[1], sides[0]))]
    fields = config_differences(one, other)
    different = [*map(_difference, weights.faults), *different_extras]
    return Diff(
        equal=not (different or fields or any(why is None for side in only_in for why in side.values())),
        a=str(a),
        b=str(b),
        config_differences=fields,
        tensors_compared=len(pairs.names) + n_extras,
        different=different,
        reference="b" if swapped else "a",
        only_in_a=list(only_in[0]),
        only_in_b=list(only_in[1]),
        dropped=[DroppedKey(name=key, why=why) for side in only_in for key, why in side.items() if why],
        quantized=losses_by_scheme(weights.losses),
        rounded=_rounded(pairs.names, *sides),
        warnings=[*one.notes, *other.notes],
    )


@dataclass(frozen=True)
class Side:
    """A checkpoint bound for its own configuration and what the other one has beyond it: what it lacks is `absent`."""

    checkpoint: Checkpoint
    config: Llama4Config
    tensors: Mapping[str, LogicalTensor]  # by logical name

    @staticmethod
    def bind(checkpoint: Checkpoint, beside: Llama4Config) -> Side:
        config = _widened(checkpoint, beside)
        tensors = {t.name: _within(checkpoint, t) for t in checkpoint.logical_tensors(config, lenient=True)}
        return Side(checkpoint, config, tensors)

    @property
    def reader(self) -> CheckpointReader:
        """That of the directory, or of the first rank."""
        return self.checkpoint.readers[0]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self.config)

    @cached_property
    def names(self) -> set[str]:
        """Of the tensors that it has."""
        return {name for name, tensor in self.tensors.items() if tensor.keys}

    @property
    def completeness(self) -> tuple[bool, int]:
        """How much of its numbers it has: whether they are not quantized, and the bytes of the dtype that most tensors have."""
        dtypes = Counter(self.tensors[name].dtype for name in self.names)
        return not self.checkpoint.quantized, ITEM_SIZES[dtypes.most_common(1)[0][0]] if dtypes else 0

    def encoding(self, name: str) -> tuple[str, Any] | None:
        """The scheme of a quantized matrix, and what decides its numbers beside it."""
        matrix = self.reader.quantized.get(self.tensors[name].keys[0])
        if isinstance(matrix, QuantizedMatrix):
            return matrix.kind, matrix.settings
        # In Meta's layout each rank has scales of its own.
        return (matrix.kind, len(self.checkpoint.readers)) if isinstance(matrix, DequantizedView) else None

    @cached_property
    def extras(self) -> dict[str, str | None]:
        """Keys that hold no tensor of a Llama 4 -> why `convert` drops them, or None."""
        used = {key for t in self.checkpoint.logical_tensors(self.config, lenient=True) for key in t.keys}
        keys = set(self.reader.keys()) - used
        if not isinstance(self.reader, RankReader):
            return dict.fromkeys(sorted(keys))
        rules = [rule for rule in load_table().drops if rule.when is None]
        keys |= set(self.reader.index.others)
        return {key: next((r.why for r in rules if r.matches(key)), None) for key in sorted(keys)}

    def keys_beyond(self, other: Side, has_vision: bool) -> dict[str, str | None]:
        """What `other` lacks, as Transformers calls it -> why it decides nothing, or None.

        Experts under their fused key where all that this side has of it is missing there; else each under its own.
        """
        lacking = self.names - other.names
        missing = [name for name in self.tensors if name in lacking]
        fused = {transformers_key(name, has_vision) for name in self.names & other.names}
        keys = []
        for name in missing:
            key, matrix = transformers_key(name, has_vision), expert_of(name)
            if matrix and key in fused:
                key = f"{key.rpartition('.')[0]}.{matrix.expert}.{matrix.part}_proj.weight"
            keys.append(key)
        return dict.fromkeys(keys) | {key: why for key, why in self.extras.items() if key not in other.extras}


def _widened(checkpoint: Checkpoint, beside: Llama4Config) -> Llama4Config:
    """The configuration of all tensors that a checkpoint or the one `beside` it may have.

    Tensors decide: a directory may hold layers and experts that its config.json does not count.
    """
    reader, text, beyond = checkpoint.readers[0], checkpoint.config.text_config, beside.text_config
    if checkpoint.layout == "transformers":
        experts = [text.num_local_experts, beyond.num_local_experts if beyond.moe_layers else 0]
        for key in reader.keys():  # noqa: SIM118
            shape = () if key in reader.damaged else reader.shape(key)
            if key.endswith(_FUSED) and len(shape) == 3 and shape[0] <= _MAX_EXPERTS:
                experts.append(shape[0])
        text = replace(text, num_local_experts=max(experts))
    layers = max(text.num_hidden_layers, beyond.num_hidden_layers)
    moe = [layer for layer in beyond.moe_layers if layer >= text.num_hidden_layers]
    text = replace(text, num_hidden_layers=layers, moe_layers=(*text.moe_layers, *moe))
    config = replace(checkpoint.config, text_config=text)
    found = [t for t in checkpoint.logical_tensors(config, lenient=True) if t.name in SLICED and t.keys]
    heights = [reader.shape(t.keys[0])[0] * len(checkpoint.readers) for t in found]
    return replace(config, text_config=replace(text, vocab_size=max([text.vocab_size, *heights])))


def _within(checkpoint: Checkpoint, tensor: LogicalTensor) -> LogicalTensor:
    """`absent` where the fused tensor ends before this expert."""
    matrix = expert_of(tensor.name)
    if matrix and tensor.keys and checkpoint.layout == "transformers" and tensor.keys[0].endswith("_proj"):
        shape = checkpoint.readers[0].shape(tensor.keys[0])
        if len(shape) == 3 and shape[0] <= matrix.expert:
            return absent(tensor.name, BindingError(f"{tensor.keys[0]} has {shape[0]} experts"))
    return tensor


def _pairs(right: Side, left: Side) -> TensorPairs:
    """The tensors that both have, `left` as seen from `right`."""
    shared = right.names & left.names
    names = [name for name in right.tensors if name in shared]
    lossy, limits = {}, dict(LARGEST_LOSS)
    for name in names:
        encodings = right.encoding(name), left.encoding(name)
        if encodings[0] != encodings[1]:  # which cannot be equal bit by bit
            schemes = sorted(encoding[0] for encoding in encodings if encoding)
            scheme = " and ".join(schemes)
            lossy[left.tensors[name].keys[0]] = scheme
            limits[scheme] = sum(sqrt(LARGEST_LOSS[one]) for one in schemes) ** 2
    none = {name: absent(name, BindingError(f"no tensor {name}")) for name in right.tensors}
    is_right_quantized = bool(right.checkpoint.quantized)
    return TensorPairs(
        right.tensors,
        {**none, **left.tensors},
        names,
        right.config,
        any(side.checkpoint.config.vision_config is not None for side in (right, left)),
        lossy,
        limits,
        left.reader if isinstance(left.reader, QuantizedReader) and not is_right_quantized else None,
        left.reader,
        either_way=True,
        both_quantized=is_right_quantized,
        their_shapes=left.shapes,
    )


def _rounded(names: Sequence[str], a: Side, b: Side) -> list[RoundedTensors]:
    """Which dtypes were rounded to each other, and of how many tensors."""
    exact = [name for name in names if a.encoding(name) == b.encoding(name)]
    dtypes = Counter((a.tensors[name].dtype, b.tensors[name].dtype) for name in exact)
    return [RoundedTensors(a=x, b=y, tensors=n) for (x, y), n in dtypes.items() if x != y and {x, y} <= FLOATS]


def _difference(fault: WeightFault) -> TensorDifference:
    return TensorDifference(
        name=fault.tensor,
        module=fault.module,
        max_abs_diff=finite(fault.max_abs_diff),
        cause=fault.cause,
        kind=fault.kind,
    )


def _compare_extras(a: Side, b: Side) -> tuple[int, list[TensorDifference]]:
    """Tensors that no Llama 4 has and both sides do, under one key: how many, and those that differ."""
    stored = set(a.reader.keys()) & set(b.reader.keys())
    shared = [key for key, why in a.extras.items() if why is None and key in b.extras and key in stored]
    causes = {key: _extra_cause(key, a.checkpoint, b.checkpoint) for key in shared}
    return len(shared), [
        TensorDifference(name=key, module=None, max_abs_diff=None, cause=cause, kind=None)
        for key, cause in causes.items()
        if cause
    ]


def _extra_cause(key: str, a: Checkpoint, b: Checkpoint) -> str | None:
    if len(a.readers) != len(b.readers):
        return "no Llama 4 has it, so nothing tells how its ranks join: they are not as many on the other side"
    for one, other in zip(a.readers, b.readers, strict=True):
        kinds = [(reader.dtype(key), list(reader.shape(key))) for reader in (one, other)]
        if kinds[0] != kinds[1]:
            return f"it is {' '.join(map(str, kinds[0]))} in one and {' '.join(map(str, kinds[1]))} in the other"
        if any(not np.array_equal(one.read(key, rows), other.read(key, rows)) for rows in _row_slices(*kinds[0])):
            return "no Llama 4 has it, and its numbers differ"
    return None


def _row_slices(dtype: str, shape: list[int]) -> Iterator[tuple[int, int] | None]:
    if not shape:
        yield None
        return
    step = max(1, _SLICE_BYTES // max(1, prod(shape[1:]) * ITEM_SIZES[dtype]))
    yield from ((start, start + step) for start in range(0, shape[0], step))
