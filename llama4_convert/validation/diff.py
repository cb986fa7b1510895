"""`diff`: two checkpoints in any two layouts held against each other, tensor by tensor, in bounded memory.

Neither is taken as right: what is told is the same whichever comes first. Each side is bound for its own configuration, so that
checkpoints of other layer or expert counts are compared as far as both have a tensor. Only the words on how a tensor differs take
a side, since they must begin somewhere: that with more of its numbers (not quantized, of the wider dtype), else the first.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod, sqrt
from typing import Any

import numpy as np

from llama4.config import Llama4Config
from llama4.weights import BindingError, LogicalTensor, absent, expert_of, parameter_shapes
from llama4.weights_transformers import transformers_key
from llama4_convert.checkpoints.meta_quantized import DequantizedView
from llama4_convert.checkpoints.quantized import QuantizedMatrix, QuantizedReader
from llama4_convert.checkpoints.readers import RankReader
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.reference.checkpoint import Checkpoint
from llama4_convert.validation.config_diff import config_differences, told
from llama4_convert.validation.diagnosis.tensor_pairs import FLOATS, SLICED, TensorPairs
from llama4_convert.validation.parity.memory import INTERPRETER
from llama4_convert.validation.parity.metrics import finite
from llama4_convert.validation.tensor_check import LARGEST_LOSS
from llama4_convert.validation.weight_check import (
    MatrixLoss,
    WeightFault,
    compare_tensors,
    losses_by_scheme,
    memory_needed,
)
from mappings import load_table

MAX_MEMORY = 4 << 30
_FUSED = (".experts.gate_up_proj", ".experts.down_proj")
_MOST_EXPERTS = 1024  # an axis longer than that is none of experts
_SLICE = 32 << 20  # bytes of a tensor that no Llama 4 has, read at a time


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    max_memory: int = MAX_MEMORY,
    start: Callable[[int, int], None] = lambda total, done: None,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Hold two checkpoints against each other: `equal`, and what differs, as the manual says under `diff --json`.

    Equal are tensors with the same bits; of two dtypes, those that rounding one way or the other makes the same; and what is
    quantized on one side, or otherwise than on the other, where it differs by no more than its scheme loses. Keys that `convert`
    drops decide nothing. Raises UsageError, BadInput or EnvironmentFailed.
    """
    one, other = Checkpoint.open(a), Checkpoint.open(b)
    for checkpoint in (one, other):
        if checkpoint.unknown_quantization is not None:
            raise UsageError(
                f"{checkpoint.path} is quantized as {checkpoint.unknown_quantization}, which we cannot read: compare what it"
                " was made of"
            )
    sides = Side(one, other.config), Side(other, one.config)
    swapped = _is_right(sides[1], sides[0])
    right, left = reversed(sides) if swapped else sides
    comparison = _Comparison(right, left)
    pair = comparison.pair
    needed = INTERPRETER + memory_needed(pair)
    if needed > max_memory:
        raise UsageError(f"the largest matrix needs {needed >> 20:,} MiB: give --max-memory {-(-needed >> 20)}MiB")
    start(sum(right.nbytes(name) for name in comparison.names), 0)
    try:
        findings = list(compare_tensors(pair, progress, memory=max_memory - INTERPRETER))
    except BindingError as error:
        raise BadInput(f"{a} or {b}: {error}: download it again, or convert it again") from error
    faults = [_fault(finding) for finding in findings if isinstance(finding, WeightFault)]
    extras, more_faults = _compare_extras(*sides)
    only_in = [side.only(against, comparison.has_vision) for side, against in (sides, (sides[1], sides[0]))]
    dropped = [{"name": key, "why": why} for side in only_in for key, why in side.items() if why]
    said = [told(difference) for difference in config_differences(one, other)]
    different = [*faults, *more_faults]
    decisive = [key for side in only_in for key, why in side.items() if not why]
    return {
        "equal": not (different or said or decisive),
        "a": str(a),
        "b": str(b),
        "config_differences": said,
        "tensors_compared": len(comparison.names) + extras,
        "different": different,
        "reference": "b" if swapped else "a",
        "only_in_a": list(only_in[0]),
        "only_in_b": list(only_in[1]),
        "dropped": dropped,
        "quantized": losses_by_scheme([finding for finding in findings if isinstance(finding, MatrixLoss)]),
        "rounded": comparison.rounded(swapped),
    }


class Side:
    """A checkpoint's tensors by logical name, bound for its own configuration and what `other` has beyond it."""

    def __init__(self, checkpoint: Checkpoint, other: Llama4Config) -> None:
        self.checkpoint, self.reader = checkpoint, checkpoint.readers[0]
        self.config = self._config(other)
        self.tensors = {t.name: self._held(t) for t in checkpoint.logical_tensors(self.config, lenient=True)}
        self.names = {name for name, tensor in self.tensors.items() if tensor.keys}

    def _config(self, other: Llama4Config) -> Llama4Config:
        """Tensors decide: a directory may hold layers and experts that its config.json does not count."""
        text, beyond = self.checkpoint.config.text_config, other.text_config
        if self.checkpoint.layout == "transformers":
            experts = [text.num_local_experts, beyond.num_local_experts if beyond.moe_layers else 0]
            keys = self.reader.keys()
            for key in keys:
                shape = () if key in self.reader.damaged else self.reader.shape(key)
                if key.endswith(_FUSED) and len(shape) == 3 and shape[0] <= _MOST_EXPERTS:
                    experts.append(shape[0])
            text = replace(text, num_local_experts=max(experts))
        layers = max(text.num_hidden_layers, beyond.num_hidden_layers)
        moe = [layer for layer in beyond.moe_layers if layer >= text.num_hidden_layers]
        text = replace(text, num_hidden_layers=layers, moe_layers=(*text.moe_layers, *moe))
        config = replace(self.checkpoint.config, text_config=text)
        found = [t for t in self.checkpoint.logical_tensors(config, lenient=True) if t.name in SLICED and t.keys]
        heights = [self.reader.shape(t.keys[0])[0] * len(self.checkpoint.readers) for t in found]
        return replace(config, text_config=replace(text, vocab_size=max([text.vocab_size, *heights])))

    def _held(self, tensor: LogicalTensor) -> LogicalTensor:
        """`absent` where the fused tensor ends before this expert."""
        expert = expert_of(tensor.name)
        if expert and tensor.keys and self.checkpoint.layout == "transformers" and tensor.keys[0].endswith("_proj"):
            shape = self.reader.shape(tensor.keys[0])
            if len(shape) == 3 and shape[0] <= expert.expert:
                return absent(tensor.name, BindingError(f"{tensor.keys[0]} has {shape[0]} experts"))
        return tensor

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self.config)

    def nbytes(self, name: str) -> int:
        return prod(self.shapes[name]) * ITEM_SIZES[self.tensors[name].dtype]

    @property
    def width(self) -> int:
        """Bytes of the dtype that most tensors have."""
        dtypes = Counter(self.tensors[name].dtype for name in self.names)
        return ITEM_SIZES[dtypes.most_common(1)[0][0]] if dtypes else 0

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

    def only(self, other: Side, has_vision: bool) -> dict[str, str | None]:
        """What `other` lacks, as Transformers calls it -> why it decides nothing, or None.

        Experts under their fused key where all that this side has of it is missing there; else each under its own.
        """
        lacking = self.names - other.names
        missing = [name for name in self.tensors if name in lacking]
        fused = {transformers_key(name, has_vision) for name in self.names & other.names}
        keys = []
        for name in missing:
            key, expert = transformers_key(name, has_vision), expert_of(name)
            if expert and key in fused:
                key = f"{key.rpartition('.')[0]}.{expert.expert}.{expert.part}_proj.weight"
            keys.append(key)
        return dict.fromkeys(keys) | {key: why for key, why in self.extras.items() if key not in other.extras}


def _is_right(one: Side, other: Side) -> bool:
    """Whether `one` has more of its numbers than `other`, so that the other is to be seen from it."""
    rank = [(not side.checkpoint.quantized, side.width) for side in (one, other)]
    return rank[0] > rank[1]


@dataclass(frozen=True)
class _Comparison:
    """`left` as seen from `right`."""

    right: Side
    left: Side

    @property
    def has_vision(self) -> bool:
        return any(side.checkpoint.config.vision_config is not None for side in (self.right, self.left))

    @cached_property
    def names(self) -> list[str]:
        shared = self.right.names & self.left.names
        return [name for name in self.right.tensors if name in shared]

    @cached_property
    def _schemes(self) -> dict[str, tuple[str, float]]:
        """Of what cannot be equal bit by bit: logical name -> the scheme, and what it may lose at most."""
        found = {}
        for name in self.names:
            ours, theirs = self.right.encoding(name), self.left.encoding(name)
            if ours == theirs:
                continue
            kinds = sorted(encoding[0] for encoding in (ours, theirs) if encoding)
            found[name] = " and ".join(kinds), sum(sqrt(LARGEST_LOSS[kind]) for kind in kinds) ** 2
        return found

    @cached_property
    def lossy(self) -> dict[str, str]:
        return {self.left.tensors[name].keys[0]: kind for name, (kind, _) in self._schemes.items()}

    @property
    def pair(self) -> TensorPairs:
        reader = self.left.reader if not self.right.checkpoint.quantized else None
        none = {name: absent(name, BindingError(f"no tensor {name}")) for name in self.right.tensors}
        return TensorPairs(
            self.right.tensors,
            {**none, **self.left.tensors},
            frozenset(self.names),
            self.right.config,
            self.has_vision,
            self.lossy,
            LARGEST_LOSS | dict(self._schemes.values()),
            reader if isinstance(reader, QuantizedReader) else None,
            self.left.reader.shape,
            either_way=True,
            both_quantized=bool(self.right.checkpoint.quantized),
            their_shapes=self.left.shapes,
        )

    def rounded(self, swapped: bool) -> list[dict[str, Any]]:
        """Which dtypes were rounded to each other, and of how many tensors."""
        a, b = (self.left, self.right) if swapped else (self.right, self.left)
        pairs = Counter(
            (a.tensors[name].dtype, b.tensors[name].dtype) for name in self.names if name not in self._schemes
        )
        return [{"a": x, "b": y, "tensors": n} for (x, y), n in pairs.items() if x != y and {x, y} <= FLOATS]


def _fault(fault: WeightFault) -> dict[str, Any]:
    return {
        "name": fault.tensor,
        "module": fault.module,
        "max_abs_diff": finite(fault.max_abs_diff),
        "cause": fault.cause,
        "kind": fault.kind,
    }


def _compare_extras(a: Side, b: Side) -> tuple[int, list[dict[str, Any]]]:
    """Tensors that no Llama 4 has and both sides do, under one key: how many, and those that differ."""
    stored = set(a.reader.keys()) & set(b.reader.keys())
    shared = [key for key, why in a.extras.items() if why is None and key in b.extras and key in stored]
    causes = {key: _extra_cause(key, a.checkpoint, b.checkpoint) for key in shared}
    keys: Mapping[str, Any] = {"module": None, "max_abs_diff": None, "kind": None}
    return len(shared), [{"name": key, **keys, "cause": cause} for key, cause in causes.items() if cause]


def _extra_cause(key: str, a: Checkpoint, b: Checkpoint) -> str | None:
    if len(a.readers) != len(b.readers):
        return "no Llama 4 has it, so nothing tells how its ranks join: they are not as many on the other side"
    for one, other in zip(a.readers, b.readers, strict=True):
        kinds = [(reader.dtype(key), list(reader.shape(key))) for reader in (one, other)]
        if kinds[0] != kinds[1]:
            return f"it is {' '.join(map(str, kinds[0]))} in one and {' '.join(map(str, kinds[1]))} in the other"
        if any(not np.array_equal(one.read(key, rows), other.read(key, rows)) for rows in _rows(*kinds[0])):
            return "no Llama 4 has it, and its numbers differ"
    return None


def _rows(dtype: str, shape: list[int]) -> Iterator[tuple[int, int] | None]:
    if not shape:
        yield None
        return
    step = max(1, _SLICE // max(1, prod(shape[1:]) * ITEM_SIZES[dtype]))
    yield from ((start, start + step) for start in range(0, shape[0], step))
