"""How a tensor is wrong: hypotheses tried on its numbers, from the commonest mistakes of converters to a single bit.

What one matrix alone shows is in `changed_values`, `moved_values`, `block_order` and `quantized_faults`.
Here is what needs the name of the tensor, its siblings, or the rest of the checkpoint, and the order of all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

import numpy as np

from llama4.weights import BindingError
from llama4.weights_transformers import transformers_key
from llama4_convert.checkpoints.quantized import QuantizedReader
from llama4_convert.checkpoints.readers import DirectoryReader
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.validation.diagnosis import averages, block_order, changed_values, moved_values, quantized_faults
from llama4_convert.validation.diagnosis.block_order import Axis
from llama4_convert.validation.diagnosis.changed_values import floats
from llama4_convert.validation.diagnosis.expert_axis import Pieces
from llama4_convert.validation.diagnosis.moved_values import Array, Diagnosis, Tolerance
from llama4_convert.validation.diagnosis.sketches import Sketches, sketch, sketch_of_rows
from llama4_convert.validation.diagnosis.tensor_pairs import FLOATS, SLICED, TensorPairs, WrongTensor, cast, slices

# Bytes that diagnosing takes, measured: for each byte of a matrix that is raw bits, for each number of one that is float32;
# and where a hypothesis wants gate and up together.
_BITS, _FLOATS, _BITS_OF_A_PAIR, _FLOATS_OF_A_PAIR = 12, 36, 16, 60
_THOROUGH = 1000  # faults that every hypothesis is tried on; of those behind them only what has explained one before
_MOST_EXPERTS = 16 << 30  # bytes of a layer's experts that are read to find pieces of others in one
_PAIR = re.compile(r"(.+)\.(gate|up)")
_QKV = re.compile(r"(.+\.)(q|k|v)")
_EXPERT = re.compile(r"(layers\.\d+\.feed_forward\.experts)\.(\d+)\.(gate|up|down)")


class Diagnoser:
    """How tensors of one candidate are wrong. `wrong`: names of all its wrong tensors; `sketches`: of the reference's.

    Hypotheses that would take more than `memory` bytes are left out.
    """

    def __init__(self, pairs: TensorPairs, wrong: Collection[str], sketches: Sketches, memory: int) -> None:
        self.pairs, self.wrong, self.sketches, self.memory = pairs, wrong, sketches, memory
        self.lacking = 0  # bytes that the last tensor would have needed, if that is more than there are
        self._tried = 0
        self._last: dict[str, tuple[Hypothesis, str]] = {}  # what explained the expert before
        self._worked: set[Hypothesis] = set()
        self._pairs: dict[str, Diagnosis | None] = {}
        self._pieces: tuple[str, Pieces] | None = None  # of the experts asked for last
        self._kept = 0  # bytes of them

    def of(self, name: str) -> Diagnosis | None:
        """None where no hypothesis fits, and where none may be tried: see `lacking`. Raises BindingError."""
        ours, found = self.pairs.ours[name], self.pairs.theirs[name]
        self.lacking = 0
        if self._pieces and not name.startswith(f"{self._pieces[0].rpartition('.')[0]}."):
            self._pieces, self._kept = None, 0
        if {ours.dtype, found.dtype} <= FLOATS and not self._affords(name):
            return None
        if self.pairs.reader and found.keys[0] in self.pairs.reader.damaged:
            return self._of_damaged(name, self.pairs.reader)
        if not {ours.dtype, found.dtype} <= FLOATS:
            return Diagnosis("dtype", f"its dtype is {found.dtype}, not {ours.dtype}")
        case = self.pairs.wrong_tensor(name)
        if case.x.shape != case.y.shape:
            return self._of_shape(case)
        stem = re.sub(r"experts\.\d+", "experts", name)
        if stem in self._last:
            hypothesis, kind = self._last[stem]
            again = hypothesis(self, case)
            if again and again.kind == kind:
                return again
        self._tried += 1
        hypotheses = _LOSSY if case.tolerance.limit else _EXACT
        for hypothesis in hypotheses:
            if self._tried > _THOROUGH and hypothesis not in self._worked:
                continue
            if hypothesis in _OF_A_PAIR and not (_PAIR.fullmatch(name) and self._affords(name, of_a_pair=True)):
                continue
            if self.lacking and hypothesis == Diagnoser.near_or_unrelated:
                return None
            diagnosis = hypothesis(self, case)
            if diagnosis:
                if hypothesis is not Diagnoser.near_or_unrelated:  # which fits what others explain better
                    self._last[stem] = hypothesis, diagnosis.kind
                self._worked.add(hypothesis)
                return diagnosis
        return None

    def _affords(self, name: str, *, of_a_pair: bool = False, beside: int = 0) -> bool:
        """Whether there is the memory for it, `beside` so many bytes."""
        item = max(ITEM_SIZES[tensor.dtype] for tensor in (self.pairs.ours[name], self.pairs.theirs[name]))
        bits, floats = (_BITS_OF_A_PAIR, _FLOATS_OF_A_PAIR) if of_a_pair else (_BITS, _FLOATS)
        needed = (
            self._kept
            + beside
            + self.pairs.numbers(name) * (floats if self.pairs.tolerance(name).limit else bits * item)
        )
        if needed > self.memory:
            self.lacking = max(self.lacking, needed)
        return needed <= self.memory

    # -------------------- hypotheses that need to know what the tensor is

    def _of_shape(self, case: WrongTensor) -> Diagnosis | None:
        pair, n_experts = _PAIR.fullmatch(case.name), self.pairs.config.text_config.num_local_experts
        stored = self.pairs.their_reader.shape(self.pairs.theirs[case.name].keys[0])
        if _EXPERT.fullmatch(case.name) and len(stored) == 3 and stored[0] > n_experts and stored[0] % n_experts == 0:
            words = f"ranks joined on the wrong axis, that of the experts: there are {stored[0]}, not {n_experts}"
            return Diagnosis("wrong_axis", words)
        return (
            (self.in_a_pair(case) if pair and self._affords(case.name, of_a_pair=True) else None)
            or block_order.other_shape(case.x, case.y, case.tolerance, case.axes)
            or self._another(case.name, case.y, case.tolerance)
        )

    def another_tensor(self, case: WrongTensor) -> Diagnosis | None:
        """Another tensor's numbers under this name."""
        return self._another(case.name, case.y, case.tolerance)

    def _another(self, name: str, y: Array, same: Tolerance) -> Diagnosis | None:
        if y.ndim != 2 or not y.size:
            return None
        shape = (self.pairs.vocabulary if name in SLICED else y.shape[0], y.shape[1])
        made = (
            sketch_of_rows(self.pairs.theirs[name], shape)
            if name in SLICED
            else sketch(y, self.pairs.theirs[name].dtype)
        )
        names = [other for other in self.sketches.like(made, shape, same) if other != name]
        names.sort(key=lambda other: (_layer(other) != _layer(name), _stem(other) != _stem(name)))
        other = next((other for other in names[:3] if self._holds(name, other, same)), None)
        if other:
            return self._named_other(name, other, same)
        return None if name in SLICED else self._another_transposed(name, y, same)

    def _another_transposed(self, name: str, y: Array, same: Tolerance) -> Diagnosis | None:
        dtype = self.pairs.theirs[name].dtype
        for other in self.sketches.like(sketch(y.T, dtype), (y.shape[1], y.shape[0]), same)[:3]:
            if other not in {name, *SLICED} and same(self.pairs.reference(other, same, dtype), y.T):
                words = f"another tensor's numbers: it holds those of {self.named(other)}, transposed"
                return Diagnosis("other_tensor", words)
        return None

    def named(self, name: str) -> str:
        """As people find it in a Transformers directory."""
        key = transformers_key(name, self.pairs.config.vision_config is not None)
        expert = _EXPERT.fullmatch(name)
        return f"{key} (expert {expert[2]}, {expert[3]})" if expert else key

    def _holds(self, name: str, other: str, same: Tolerance) -> bool:
        """Whether the candidate's `name` is the reference's `other`."""
        found, theirs = self.pairs.theirs[name], self.pairs.ours[other]
        if name not in SLICED:
            return same(self.pairs.reference(other, same, found.dtype), self.pairs.candidate(name, same))
        return all(
            np.array_equal(cast(theirs.load(span), theirs.dtype, found.dtype), found.load(span))
            for span in slices(name, self.pairs.vocabulary)
        )

    def _named_other(self, name: str, other: str, same: Tolerance) -> Diagnosis:
        exchanged = other in self.wrong and self._is_exchanged(name, other, same)
        pair, expert, its = _PAIR.fullmatch(name), _EXPERT.fullmatch(name), _EXPERT.fullmatch(other)
        if exchanged and pair and other == f"{pair[1]}.{'up' if pair[2] == 'gate' else 'gate'}":
            return Diagnosis("gate_up_swapped", "gate and up swapped: each holds the other's numbers")
        also = " (the two are exchanged)" if exchanged else ""
        if expert and its and expert[1] == its[1] and expert[3] == its[3]:
            return Diagnosis("experts_reordered", f"experts reordered: it holds expert {its[2]}'s numbers{also}")
        layer = _layer(other)
        if _stem(name) == _stem(other) and layer is not None and layer != _layer(name):
            return Diagnosis(
                "other_tensor", f"another tensor's numbers: it holds layer {layer}'s, {self.named(other)}{also}"
            )
        return Diagnosis("other_tensor", f"another tensor's numbers: it holds those of {self.named(other)}{also}")

    def _is_exchanged(self, name: str, other: str, same: Tolerance) -> bool:
        """Whether the candidate's `other` is the reference's `name`, as far as a sketch tells."""
        try:
            mine, theirs = self.pairs.sketch(self.pairs.ours[name]), self.pairs.sketch(self.pairs.theirs[other])
        except BindingError:
            return False
        return (same if same.limit else Tolerance(1e-4)).near(mine, theirs)

    def in_a_pair(self, case: WrongTensor) -> Diagnosis | None:
        """Gate and up mistaken together."""
        pair = _PAIR.fullmatch(case.name)
        if pair is None or not {f"{pair[1]}.gate", f"{pair[1]}.up"} <= set(self.wrong):
            return None
        if pair[1] not in self._pairs:
            mine, other = case.name, f"{pair[1]}.{'up' if pair[2] == 'gate' else 'gate'}"
            self._pairs[pair[1]] = None
            if self.pairs.theirs[other].keys and self.pairs.tolerance(other) == case.tolerance:
                x, y = self.pairs.load(other, case.tolerance)
                first, second = ((case.x, case.y), (x, y)) if mine.endswith("gate") else ((x, y), (case.x, case.y))
                xs, ys = (first[0], second[0]), (first[1], second[1])
                if ys[0].ndim == ys[1].ndim == 2 and ys[0].shape[1] == ys[1].shape[1]:
                    together = moved_values.paired(xs, ys, case.tolerance)
                    if together is None and ys[0].shape != xs[0].shape:
                        whole = np.concatenate(xs), np.concatenate(ys)
                        together = block_order.other_shape(*whole, case.tolerance, (Axis("row"), Axis("column")))
                    self._pairs[pair[1]] = together
        return self._pairs[pair[1]]

    def in_blocks_of_a_pair(self, case: WrongTensor) -> Diagnosis | None:
        """Blocks of a fused gate and up, whose halves no one told apart."""
        pair = _PAIR.fullmatch(case.name)
        if pair is None:
            return None
        other = f"{pair[1]}.{'up' if pair[2] == 'gate' else 'gate'}"
        if not self.pairs.theirs[other].keys or self.pairs.tolerance(other) != case.tolerance:
            return None
        x, y = self.pairs.load(other, case.tolerance)
        if x.shape != y.shape or x.shape != case.x.shape:
            return None
        mine, theirs = (case.x, case.y), (x, y)
        gate, up = (mine, theirs) if pair[2] == "gate" else (theirs, mine)
        a, b = np.concatenate([gate[0], up[0]]), np.concatenate([gate[1], up[1]])
        found = block_order.block_order(a, b, case.tolerance, Axis("row"))
        return Diagnosis(found.kind, f"{found.cause}, gate and up together") if found else None

    def mixed_experts(self, case: WrongTensor) -> Diagnosis | None:
        """Pieces of several experts' rows."""
        found = _EXPERT.fullmatch(case.name)
        if found is None:
            return None
        dtype, kinds = self.pairs.theirs[case.name].dtype, ("down",) if found[3] == "down" else ("gate", "up")
        of_all = f"{found[1]}.{kinds[0]}"

        def load(expert: int) -> Array:
            """As it lies."""
            return np.concatenate(
                [self.pairs.reference(f"{found[1]}.{expert}.{kind}", case.tolerance, dtype).T for kind in kinds], 1
            )

        if self._pieces is None or self._pieces[0] != of_all:
            n, width = self.pairs.config.text_config.num_local_experts, case.x.shape[0]
            nbytes = Pieces.nbytes(n, case.x.size * len(kinds), width)
            self._pieces, self._kept = None, 0
            if n * case.x.nbytes > _MOST_EXPERTS or not self._affords(case.name, beside=nbytes):
                return None
            self._pieces, self._kept = (of_all, Pieces(load, n, width)), nbytes
        return self._pieces[1].mixed(case.y.T, int(found[2]))

    def cut_from_qkv(self, case: WrongTensor) -> Diagnosis | None:
        """Rows of q, k and v mistaken together."""
        one = _QKV.fullmatch(case.name)
        if one is None or case.tolerance.limit:
            return None
        dtype, text = self.pairs.theirs[case.name].dtype, self.pairs.config.text_config
        parts = [self.pairs.reference(f"{one[1]}{part}", case.tolerance, dtype) for part in "qkv"]
        most = max(block_order.MOST_RANKS, text.num_key_value_heads)
        return moved_values.stacked(parts, case.y, "qkv".index(one[2]), case.tolerance, most)

    def permuted_for_rope(self, case: WrongTensor) -> Diagnosis | None:
        if not case.head_dim:
            return None
        others = bool(re.search(r"attention\.[qk]|w[qk]\.", case.name))
        return moved_values.rope_permuted(case.x, case.y, case.tolerance, case.head_dim, others)

    def _of_damaged(self, name: str, reader: QuantizedReader) -> Diagnosis | None:
        module = self.pairs.theirs[name].keys[0].removesuffix(".weight")
        tensors = reader.checkpoint.tensors
        shapes = {key.removeprefix(f"{module}."): tensors[key].shape for key in tensors if key.startswith(f"{module}.")}
        ours = self.pairs.ours[name]
        return quantized_faults.damaged(
            floats(np.ascontiguousarray(ours.load(None)), ours.dtype),
            shapes,
            lambda suffix: DirectoryReader.read(reader, f"{module}.{suffix}"),
            {kind: Tolerance(limit) for kind, limit in self.pairs.limits.items()},
        )

    def of_scales(self, case: WrongTensor) -> Diagnosis | None:
        if (
            self.pairs.reader is None
            or (matrix := self.pairs.reader.quantized.get(self.pairs.theirs[case.name].keys[0])) is None
        ):
            return None
        parts = self.pairs.reader.read_parts(self.pairs.theirs[case.name].keys[0])
        if count := int(np.count_nonzero(~np.isfinite(case.y) & np.isfinite(case.x))):
            found = quantized_faults.wrong_packing(case.x, case.y, matrix, parts, case.tolerance)
            words = f"{count:,} of its numbers are NaN or infinite"
            return found or Diagnosis("nonfinite", words)
        args = (case.x, case.y, matrix, parts, case.tolerance)
        within = moved_values.relative_error(case.x, case.y) <= case.tolerance.limit
        few = quantized_faults.suspicion(*args[:4]) if within else None
        if few and few.kind != "scale":
            return few
        return quantized_faults.wrong_scales(*args) or quantized_faults.wrong_packing(*args)

    # -------------------- hypotheses on the numbers alone

    def flipped(self, case: WrongTensor) -> Diagnosis | None:
        return changed_values.flipped_bits(case.region)

    def constant(self, case: WrongTensor) -> Diagnosis | None:
        if case.region.x.size and (not case.region.words or not case.y.any()):
            return changed_values.constants(case.region)
        return None

    def constant_somewhere(self, case: WrongTensor) -> Diagnosis | None:
        return changed_values.constants(case.region)

    def transposed(self, case: WrongTensor) -> Diagnosis | None:
        if case.thin is None:
            return moved_values.transposed(case.x, case.y, case.tolerance)
        # Of a sliced matrix the first row tells: it holds the beginning of the first column.
        n = min(case.y.shape[1], len(case.x))
        if n > 1 and np.array_equal(case.y[0, :n], case.x[:n, 0]):
            return Diagnosis("transposed", "its numbers lie transposed under the unchanged shape")
        return None

    def permuted_in_the_picture(self, case: WrongTensor) -> Diagnosis | None:
        """Colours, pixels or patches in another order."""
        vision = self.pairs.config.vision_config
        if vision is None:
            return None
        args = case.x, case.y, case.tolerance
        if case.name == "vision.patch_embedding":
            return moved_values.patches_permuted(*args, vision.patch_size)
        if case.name == "vision.position_embedding":
            return moved_values.positions_permuted(*args)
        if case.name == "vision.adapter.c_fc":
            return moved_values.pixels_permuted(*args, case.x.shape[1] // vision.hidden_size)
        return None

    def wrong_axis(self, case: WrongTensor) -> Diagnosis | None:
        return moved_values.wrong_axis(
            *(case.thin or (case.x, case.y)), case.tolerance, [axis.heads for axis in case.axes]
        )

    def in_blocks(self, case: WrongTensor) -> Diagnosis | None:
        found = (block_order.block_order(x, y, case.tolerance, axis) for x, y, axis in case.turned())
        return next(filter(None, found), None)

    def in_rows(self, case: WrongTensor) -> Diagnosis | None:
        found = (block_order.row_order(x, y, case.tolerance, axis, case.head_dim) for x, y, axis in case.turned())
        return next(filter(None, found), None)

    def shifted(self, case: WrongTensor) -> Diagnosis | None:
        return moved_values.shifted(
            case.x, case.y, case.tolerance, turned=".experts." in case.name or case.name.endswith("router")
        )

    def read_otherwise(self, case: WrongTensor) -> Diagnosis | None:
        return changed_values.other_reading(case.region)

    def rounded(self, case: WrongTensor) -> Diagnosis | None:
        ours = self.pairs.ours[case.name]
        narrowed = ours.dtype == "F32" and case.dtype == "BF16" and case.thin is None
        if narrowed and np.array_equal(moved_values.as_matrix(ours.load(None)) >> 16, case.y):
            return Diagnosis("rounded", "rounded: the lower bits are cut off where they should be rounded to nearest")
        return changed_values.rounded(case.region)

    def recalculated(self, case: WrongTensor) -> Diagnosis | None:
        return changed_values.recalculated(case.region, case.tolerance)

    def averaged(self, case: WrongTensor) -> Diagnosis | None:
        """The mean of heads, of experts or of layers, or a mixture with one other tensor, as model merging makes them."""
        if case.thin is not None:
            return None
        for x, y, axis in case.turned():
            found = (
                averages.of_blocks(floats(x, case.dtype), floats(y, case.dtype), case.dtype, axis)
                if axis.heads
                else None
            )
            if found:
                return found
        shape = case.x.shape[0], case.x.shape[1]
        others = {name: made for name, made in self.sketches.of_shape(shape).items() if name not in SLICED}
        if case.name not in others:
            return None
        made = sketch(case.y, case.dtype)
        same_module = {other: x for other, x in others.items() if _stem(other) == _stem(case.name)}
        expert = _EXPERT.fullmatch(case.name)
        same_layer = {
            other: x
            for other, x in others.items()
            if expert and (its := _EXPERT.fullmatch(other)) and its[1] == expert[1] and its[3] == expert[3]
        }
        for group, words in ((same_layer, "experts of the layer"), (same_module, "layers that have one")):
            if len(group) > 1 and averages.is_mean(list(group.values()), made, case.dtype):
                return Diagnosis("averaged", f"averaged: it is the mean of all {len(group)} {words}")
        mixed = averages.mixture(case.name, others, made, case.dtype)
        if mixed is None:
            return None
        other, mine, theirs = mixed
        words = f"it is {mine:.3g} times the right numbers and {theirs:.3g} times those of {self.named(other)}"
        return Diagnosis("averaged", f"averaged: {words}")

    def near_or_unrelated(self, case: WrongTensor) -> Diagnosis | None:
        return changed_values.near_or_unrelated(case.region)


Hypothesis = Callable[[Diagnoser, WrongTensor], Diagnosis | None]

# The surest first: what is told of the whole before what is told of rows, what is held bit by bit before what is measured.
_EXACT: tuple[Hypothesis, ...] = (
    Diagnoser.flipped,
    Diagnoser.constant,
    Diagnoser.another_tensor,
    Diagnoser.transposed,
    Diagnoser.permuted_for_rope,
    Diagnoser.permuted_in_the_picture,
    Diagnoser.in_a_pair,
    Diagnoser.in_blocks,
    Diagnoser.in_blocks_of_a_pair,
    Diagnoser.constant_somewhere,
    Diagnoser.wrong_axis,
    Diagnoser.mixed_experts,
    Diagnoser.read_otherwise,
    Diagnoser.cut_from_qkv,
    Diagnoser.shifted,
    Diagnoser.in_rows,
    Diagnoser.rounded,
    Diagnoser.recalculated,
    Diagnoser.averaged,
    Diagnoser.near_or_unrelated,
)
_LOSSY: tuple[Hypothesis, ...] = (
    Diagnoser.constant,
    Diagnoser.another_tensor,
    Diagnoser.transposed,
    Diagnoser.in_a_pair,
    Diagnoser.in_blocks,
    Diagnoser.in_blocks_of_a_pair,
    Diagnoser.constant_somewhere,
    Diagnoser.of_scales,
    Diagnoser.wrong_axis,
    Diagnoser.in_rows,
    Diagnoser.recalculated,
    Diagnoser.near_or_unrelated,
)
_OF_A_PAIR = {Diagnoser.in_a_pair, Diagnoser.in_blocks_of_a_pair}


def _layer(name: str) -> int | None:
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _stem(name: str) -> str:
    return re.sub(r"layers\.\d+\.", "layers.", name)
