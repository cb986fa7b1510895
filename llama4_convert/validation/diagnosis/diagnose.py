"""How a tensor is wrong: hypotheses tried on its numbers, from the commonest mistakes of converters to a single bit.

Begin with `Diagnoser.hypotheses`, which names them in the order in which they are tried; the first that holds is the cause.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from llama4.weights import ShapeError, expert_of
from llama4_convert.checkpoints.quantized import QuantizedReader
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.validation.diagnosis import block_order, changed_values, moved_values
from llama4_convert.validation.diagnosis.expert_axis import Pieces
from llama4_convert.validation.diagnosis.moved_values import (
    ALTERNATING_RANKS,
    GATE_AND_UP,
    RANKS,
    TRANSPOSED,
    find_move,
)
from llama4_convert.validation.diagnosis.other_tensors import OtherTensors, sibling
from llama4_convert.validation.diagnosis.quantized_faults import (
    QuantizedPair,
    suspicion,
    transposed_scales,
    wrong_packing,
    wrong_scales,
)
from llama4_convert.validation.diagnosis.remainders import near_or_unrelated
from llama4_convert.validation.diagnosis.sketches import Sketches
from llama4_convert.validation.diagnosis.tensor_pairs import FLOATS, TensorPairs
from llama4_convert.validation.diagnosis.tolerance import (
    Ambiguous,
    Array,
    Diagnosis,
    Tolerance,
    as_matrix,
    floats,
    relative_error,
)
from llama4_convert.validation.diagnosis.wrong_tensor import MAX_RANKS, Axis, WrongTensor

# Bytes that diagnosing takes, measured: alone, and where a hypothesis wants gate and up together.
_PER_BYTE_OF_BITS, _PER_LOSSY_NUMBER = (12, 16), (36, 60)
_THOROUGH_FAULTS = 1000  # that every hypothesis is tried on; behind them only what has explained one before
_EXPERTS_LIMIT_BYTES = 16 << 30  # of a layer's experts that are read to find pieces of others in one
_QKV = re.compile(r"(.+\.)(q|k|v)")


class Hypothesis(NamedTuple):
    """`find` is tried on tensors that should be equal bit by bit (`exact`), and on quantized ones (`lossy`)."""

    find: Callable[[WrongTensor], Diagnosis | None]
    exact: bool = True
    lossy: bool = True
    of_a_pair: bool = False  # only of gate and up projections, and wants both in memory


class Diagnoser:
    """How tensors of one candidate are wrong. `wrong`: names of all its wrong tensors; `sketches`: of the reference's.

    Hypotheses that would take more than `memory` bytes are left out.
    """

    def __init__(self, pairs: TensorPairs, wrong: Collection[str], sketches: Sketches, memory: int) -> None:
        self.pairs, self.wrong, self.memory = pairs, wrong, memory
        self.others = OtherTensors(pairs, wrong, sketches)
        self.lacking = 0  # bytes that the last tensor would have needed, if that is more than there are
        self._tried = 0
        self._last: dict[str, tuple[Hypothesis, str]] = {}  # what explained the same matrix of another expert
        self._worked: set[Hypothesis] = set()
        self._pair: tuple[str, Diagnosis | None] = "", None  # the last gate and up, and what was found on both
        self._pieces: tuple[str, Pieces] | None = None  # of the experts asked for last
        self._kept_bytes = 0  # of them
        # The surest first: the whole before single rows, what is equal bit by bit before what is measured.
        self.hypotheses = (
            Hypothesis(changed_values.flipped_bits, lossy=False),
            Hypothesis(changed_values.constant),
            Hypothesis(self.others.another_tensor),
            Hypothesis(moved_values.moved),
            Hypothesis(self.gate_and_up, of_a_pair=True),
            Hypothesis(block_order.in_blocks),
            Hypothesis(self.blocks_of_gate_and_up, of_a_pair=True),
            Hypothesis(changed_values.constant_somewhere),
            Hypothesis(self.codes_and_scales, exact=False),
            Hypothesis(moved_values.wrong_axis),
            Hypothesis(self.pieces_of_experts, lossy=False),
            Hypothesis(self.lower_bits_cut_off, lossy=False),
            Hypothesis(changed_values.changed_bits, lossy=False),
            Hypothesis(self.cut_from_qkv, lossy=False),
            Hypothesis(moved_values.shifted, lossy=False),
            Hypothesis(block_order.in_rows),
            Hypothesis(changed_values.recalculated),
            Hypothesis(self.others.averaged, lossy=False),
        )
        self.last_resort = Hypothesis(near_or_unrelated)  # it fits what others explain better

    def diagnose(self, name: str) -> Diagnosis | None:
        """None where no hypothesis fits, where several fit equally, and where none may be tried: see `lacking`.

        Raises BindingError.
        """
        try:
            return self._diagnose(name)
        except Ambiguous:
            return None

    def _diagnose(self, name: str) -> Diagnosis | None:
        ours, theirs, reader = self.pairs.ours[name], self.pairs.theirs[name], self.pairs.reader
        self.lacking = 0
        if self._pieces and not name.startswith(f"{self._pieces[0].rpartition('.')[0]}."):
            self._pieces, self._kept_bytes = None, 0
        are_floats = {ours.dtype, theirs.dtype} <= FLOATS
        if are_floats and not self._affords(name):
            return None
        if reader and theirs.keys[0] in reader.damaged:
            return self._damaged(name, reader)
        if not are_floats:
            return Diagnosis("dtype", f"its dtype is {theirs.dtype}, not {ours.dtype}")
        wrong = self.pairs.wrong_tensor(name)
        if wrong.x.shape != wrong.y.shape:
            return self._other_shape(wrong)
        module = re.sub(r"experts\.\d+", "experts", name)
        if module in self._last:
            hypothesis, kind = self._last[module]
            again = hypothesis.find(wrong)
            if again and again.kind == kind:
                return again
        self._tried += 1
        for hypothesis in self.hypotheses:
            if self._may_be_tried(hypothesis, wrong) and (found := hypothesis.find(wrong)):
                self._last[module] = hypothesis, found.kind
                self._worked.add(hypothesis)
                return found
        if self.lacking or not self._may_be_tried(self.last_resort, wrong):
            return None
        found = near_or_unrelated(wrong)
        if found:
            self._worked.add(self.last_resort)
        return found

    def _may_be_tried(self, hypothesis: Hypothesis, wrong: WrongTensor) -> bool:
        if self._tried > _THOROUGH_FAULTS and hypothesis not in self._worked:
            return False
        if not (hypothesis.lossy if wrong.tolerance.limit else hypothesis.exact):
            return False
        return not hypothesis.of_a_pair or (bool(sibling(wrong.name)) and self._affords(wrong.name, of_a_pair=True))

    def _affords(self, name: str, *, of_a_pair: bool = False, beside: int = 0) -> bool:
        """Whether there is the memory for it, `beside` so many bytes."""
        item = max(ITEM_SIZES[tensor.dtype] for tensor in (self.pairs.ours[name], self.pairs.theirs[name]))
        is_lossy = self.pairs.tolerance(name).limit
        per_number = _PER_LOSSY_NUMBER[of_a_pair] if is_lossy else item * _PER_BYTE_OF_BITS[of_a_pair]
        needed = self._kept_bytes + beside + self.pairs.numbers(name) * per_number
        if needed > self.memory:
            self.lacking = max(self.lacking, needed)
        return needed <= self.memory

    def _other_shape(self, wrong: WrongTensor) -> Diagnosis | None:
        n_experts = self.pairs.config.text_config.num_local_experts
        stored = self.pairs.their_reader.shape(self.pairs.theirs[wrong.name].keys[0])
        if expert_of(wrong.name) and len(stored) == 3 and stored[0] > n_experts and stored[0] % n_experts == 0:
            words = f"ranks joined on the wrong axis, that of the experts: there are {stored[0]}, not {n_experts}"
            return Diagnosis("wrong_axis", words)
        return (
            (self.gate_and_up(wrong) if sibling(wrong.name) and self._affords(wrong.name, of_a_pair=True) else None)
            or block_order.other_shape(wrong.x, wrong.y, wrong.tolerance, wrong.axes)
            or self.others.another_tensor(wrong)
        )

    # -------------------- hypotheses on several tensors

    def _gate_and_up(self, wrong: WrongTensor) -> list[tuple[Array, Array]] | None:
        """Reference and candidate of gate, then of up; None if the two do not join."""
        other = sibling(wrong.name)
        if other is None or not self.pairs.theirs[other].keys or self.pairs.tolerance(other) != wrong.tolerance:
            return None
        halves = [(wrong.x, wrong.y), self.pairs.load(other, wrong.tolerance)]
        for side in zip(*halves, strict=True):  # in `diff` the reference may be the damaged one
            if any(half.ndim != 2 or half.shape[1] != side[0].shape[1] for half in side):
                return None
        return halves if wrong.name.endswith(".gate") else halves[::-1]

    def gate_and_up(self, wrong: WrongTensor) -> Diagnosis | None:
        """Gate and up mistaken together."""
        stem, other = wrong.name.rpartition(".")[0], sibling(wrong.name)
        if not {wrong.name, other} <= set(self.wrong):
            return None
        if stem != self._pair[0]:
            halves = self._gate_and_up(wrong)
            self._pair = stem, _mistaken_together(halves, wrong) if halves else None
        return self._pair[1]

    def blocks_of_gate_and_up(self, wrong: WrongTensor) -> Diagnosis | None:
        """Blocks of a fused gate and up, whose halves were taken for ranks."""
        halves = self._gate_and_up(wrong)
        if halves is None or any(one.shape != wrong.x.shape for half in halves for one in half):
            return None
        x, y = (np.concatenate(side) for side in zip(*halves, strict=True))
        found = block_order.block_order(x, y, wrong.tolerance, Axis("row"))
        return found.together() if found else None

    def pieces_of_experts(self, wrong: WrongTensor) -> Diagnosis | None:
        """Pieces of several experts' rows."""
        expert = expert_of(wrong.name)
        if expert is None:
            return None
        dtype, kinds = self.pairs.theirs[wrong.name].dtype, ("down",) if expert.part == "down" else ("gate", "up")
        of_all = f"{expert.experts}.{kinds[0]}"

        def load(n: int) -> Array:
            """As it lies, [in, out]. Raises ShapeError where the reference is damaged, as it may be in `diff`."""
            names = [f"{expert.experts}.{n}.{kind}" for kind in kinds]
            parts = [self.pairs.reference(name, wrong.tolerance, dtype) for name in names]
            if any(part.shape != wrong.x.shape for part in parts):
                raise ShapeError(f"expert {n} has another shape than expert {expert.expert}")
            return np.concatenate([part.T for part in parts], 1)

        if self._pieces is None or self._pieces[0] != of_all:
            n, width = self.pairs.config.text_config.num_local_experts, wrong.x.shape[0]
            nbytes = Pieces.nbytes(n, wrong.x.size * len(kinds), width)
            self._pieces, self._kept_bytes = None, 0
            if n * wrong.x.nbytes > _EXPERTS_LIMIT_BYTES or not self._affords(wrong.name, beside=nbytes):
                return None
            try:
                self._pieces, self._kept_bytes = (of_all, Pieces(load, n, width)), nbytes
            except ShapeError:
                return None
        return self._pieces[1].mixed(wrong.y.T, expert.expert)

    def cut_from_qkv(self, wrong: WrongTensor) -> Diagnosis | None:
        """Rows of q, k and v mistaken together."""
        part = _QKV.fullmatch(wrong.name)
        if part is None:
            return None
        dtype, n_blocks = self.pairs.theirs[wrong.name].dtype, self.pairs.config.text_config.num_key_value_heads
        parts = [self.pairs.reference(f"{part[1]}{one}", wrong.tolerance, dtype) for one in "qkv"]
        return moved_values.cut_from_qkv(parts, wrong.y, "qkv".index(part[2]), max(MAX_RANKS, n_blocks))

    def lower_bits_cut_off(self, wrong: WrongTensor) -> Diagnosis | None:
        """Of a float32, to make a bf16."""
        ours = self.pairs.ours[wrong.name]
        if (ours.dtype, wrong.dtype) != ("F32", "BF16") or wrong.thin is not None:
            return None
        if not np.array_equal(as_matrix(ours.load(None)) >> 16, wrong.y):
            return None
        return Diagnosis("rounded", "rounded: the lower bits are cut off where they should be rounded to nearest")

    # -------------------- quantized matrices

    def codes_and_scales(self, wrong: WrongTensor) -> Diagnosis | None:
        key, reader = self.pairs.theirs[wrong.name].keys[0], self.pairs.reader
        if reader is None or (matrix := reader.quantized.get(key)) is None:
            return None
        pair = QuantizedPair(wrong.x, wrong.y, matrix, reader.read_parts(key))
        if n_lost := int(np.count_nonzero(~np.isfinite(wrong.y) & np.isfinite(wrong.x))):
            found = wrong_packing(pair, wrong.tolerance)
            return found or Diagnosis("nonfinite", f"{n_lost:,} of its numbers are NaN or infinite")
        if relative_error(wrong.x, wrong.y) <= wrong.tolerance.limit:
            few = suspicion(pair)
            if few and few.kind != "scale":
                return few
        return wrong_scales(pair, wrong.tolerance) or wrong_packing(pair, wrong.tolerance)

    def _damaged(self, name: str, reader: QuantizedReader) -> Diagnosis | None:
        module, ours = self.pairs.theirs[name].keys[0].removesuffix(".weight"), self.pairs.ours[name]
        weights = floats(np.ascontiguousarray(ours.load(None)), ours.dtype)
        tolerances = {kind: Tolerance(limit) for kind, limit in self.pairs.limits.items()}
        return transposed_scales(weights, reader, module, tolerances)


def _mistaken_together(halves: Sequence[tuple[Array, Array]], wrong: WrongTensor) -> Diagnosis | None:
    """What explains gate upon up."""
    x, y = (np.concatenate(side) for side in zip(*halves, strict=True))
    is_same_shape = x.shape == y.shape
    if is_same_shape and (found := find_move([GATE_AND_UP], x, y, wrong.tolerance)):
        return found
    tables = [TRANSPOSED, RANKS, ALTERNATING_RANKS] if is_same_shape else [TRANSPOSED]
    if found := find_move(tables, x, y, wrong.tolerance):
        return found.together()
    gate = halves[0]
    return None if gate[0].shape == gate[1].shape else block_order.other_shape(x, y, wrong.tolerance, wrong.axes)
