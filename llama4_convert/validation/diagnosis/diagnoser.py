"""How a tensor is wrong: hypotheses tried on its numbers, from the commonest mistakes of converters to a single bit.

What can be told of one matrix alone is in `altered` (numbers are others), `rearranged` and `block_order` (they lie elsewhere) and
`quantized_faults`. Here is what needs the tensor's name, its siblings, or the rest of the checkpoint, and the order of all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

import numpy as np

from llama4.config import Llama4Config
from llama4.weights import BindingError, LogicalTensor
from llama4.weights_transformers import transformers_key
from llama4_convert.checkpoints.quantized import QuantizedReader
from llama4_convert.checkpoints.readers import DirectoryReader
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.validation.diagnosis import altered, averages, block_order, quantized_faults, rearranged
from llama4_convert.validation.diagnosis.altered import floats
from llama4_convert.validation.diagnosis.block_order import Axis
from llama4_convert.validation.diagnosis.expert_axis import Pieces
from llama4_convert.validation.diagnosis.rearranged import Array, Diagnosis, Same
from llama4_convert.validation.diagnosis.sides import FLOATS, SLICED, Case, Sides, cast, slices
from llama4_convert.validation.diagnosis.sketches import Sketches, sketch, sketch_of_rows

# Bytes that diagnosing takes, measured: for each byte of a matrix that is raw bits, for each number of one that is float32;
# and where a hypothesis wants gate and up together.
_BITS, _FLOATS, _BITS_OF_A_PAIR, _FLOATS_OF_A_PAIR = 12, 36, 16, 60
_THOROUGH = 1000  # faults that every hypothesis is tried on; of those behind them only what has explained one before
_MOST_EXPERTS = 16 << 30  # bytes of a layer's experts that are read to find pieces of others in one
_PAIR = re.compile(r"(.+)\.(gate|up)")
_QKV = re.compile(r"(.+\.)(q|k|v)")
_EXPERT = re.compile(r"(layers\.\d+\.feed_forward\.experts)\.(\d+)\.(gate|up|down)")


class Diagnoser(Sides):
    """Of the faults of one candidate. `limits`: what each scheme may lose, as a relative squared error; `shape_of`: of a key.

    Hypotheses that would take more than `memory` bytes are left out, of a tensor of so many `numbers`.
    """

    def __init__(
        self,
        ours: Mapping[str, LogicalTensor],
        found: Mapping[str, LogicalTensor],
        wrong: Collection[str],
        config: Llama4Config,
        sketches: Sketches,
        quantized: QuantizedReader | None,
        limits: Mapping[str, float],
        shape_of: Callable[[str], tuple[int, ...]],
        numbers: Callable[[str], int],
        memory: int,
    ) -> None:
        super().__init__(ours, found, config, quantized, limits)
        self.numbers, self.memory = numbers, memory
        self.lacking = 0  # bytes that the last tensor would have needed, if that is more than there are
        self.wrong, self.sketches, self.shape_of = wrong, sketches, shape_of
        self._tried = 0
        self._last: dict[str, tuple[Hypothesis, str]] = {}  # what explained the expert before
        self._worked: set[Hypothesis] = set()
        self._pairs: dict[str, Diagnosis | None] = {}
        self._pieces: tuple[str, Pieces] | None = None  # of the experts asked for last
        self._kept = 0  # bytes of them

    def of(self, name: str) -> Diagnosis | None:
        """None where no hypothesis fits, and where none may be tried: see `lacking`. Raises BindingError."""
        ours, found = self.ours[name], self.found[name]
        self.lacking = 0
        if self._pieces and not name.startswith(f"{self._pieces[0].rpartition('.')[0]}."):
            self._pieces, self._kept = None, 0
        if {ours.dtype, found.dtype} <= FLOATS and not self._affords(name):
            return None
        if self.quantized and found.keys[0] in self.quantized.damaged:
            return self._of_damaged(name, self.quantized)
        if not {ours.dtype, found.dtype} <= FLOATS:
            return Diagnosis("dtype", f"its dtype is {found.dtype}, not {ours.dtype}")
        case = self.case(name)
        if case.x.shape != case.y.shape:
            return self._of_shape(case)
        stem = re.sub(r"experts\.\d+", "experts", name)
        if stem in self._last:
            hypothesis, kind = self._last[stem]
            again = hypothesis(self, case)
            if again and again.kind == kind:
                return again
        self._tried += 1
        hypotheses = _LOSSY if case.same.limit else _EXACT
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
        item = max(ITEM_SIZES[tensor.dtype] for tensor in (self.ours[name], self.found[name]))
        bits, floats = (_BITS_OF_A_PAIR, _FLOATS_OF_A_PAIR) if of_a_pair else (_BITS, _FLOATS)
        needed = self._kept + beside + self.numbers(name) * (floats if self.same(name).limit else bits * item)
        if needed > self.memory:
            self.lacking = max(self.lacking, needed)
        return needed <= self.memory

    # -------------------- hypotheses that need to know what the tensor is

    def _of_shape(self, case: Case) -> Diagnosis | None:
        pair, n_experts = _PAIR.fullmatch(case.name), self.config.text_config.num_local_experts
        stored = self.shape_of(self.found[case.name].keys[0])
        if _EXPERT.fullmatch(case.name) and len(stored) == 3 and stored[0] > n_experts and stored[0] % n_experts == 0:
            words = f"ranks joined on the wrong axis, that of the experts: there are {stored[0]}, not {n_experts}"
            return Diagnosis("wrong_axis", words)
        return (
            (self.in_a_pair(case) if pair and self._affords(case.name, of_a_pair=True) else None)
            or block_order.other_shape(case.x, case.y, case.same, case.axes)
            or self._another(case.name, case.y, case.same)
        )

    def another_tensor(self, case: Case) -> Diagnosis | None:
        """Another tensor's numbers under this name."""
        return self._another(case.name, case.y, case.same)

    def _another(self, name: str, y: Array, same: Same) -> Diagnosis | None:
        if y.ndim != 2 or not y.size:
            return None
        shape = (self.vocabulary if name in SLICED else y.shape[0], y.shape[1])
        made = sketch_of_rows(self.found[name], shape) if name in SLICED else sketch(y, self.found[name].dtype)
        names = [other for other in self.sketches.like(made, shape, same) if other != name]
        names.sort(key=lambda other: (_layer(other) != _layer(name), _stem(other) != _stem(name)))
        other = next((other for other in names[:3] if self._holds(name, other, same)), None)
        if other:
            return self._named_other(name, other, same)
        return None if name in SLICED else self._another_transposed(name, y, same)

    def _another_transposed(self, name: str, y: Array, same: Same) -> Diagnosis | None:
        dtype = self.found[name].dtype
        for other in self.sketches.like(sketch(y.T, dtype), (y.shape[1], y.shape[0]), same)[:3]:
            if other not in {name, *SLICED} and same(self.reference(other, same, dtype), y.T):
                words = f"another tensor's numbers: it holds those of {self.named(other)}, transposed"
                return Diagnosis("other_tensor", words)
        return None

    def named(self, name: str) -> str:
        """As people find it in a Transformers directory."""
        key = transformers_key(name, self.config.vision_config is not None)
        expert = _EXPERT.fullmatch(name)
        return f"{key} (expert {expert[2]}, {expert[3]})" if expert else key

    def _holds(self, name: str, other: str, same: Same) -> bool:
        """Whether the candidate's `name` is the reference's `other`."""
        found, theirs = self.found[name], self.ours[other]
        if name not in SLICED:
            return same(self.reference(other, same, found.dtype), self.candidate(name, same))
        return all(
            np.array_equal(cast(theirs.load(span), theirs.dtype, found.dtype), found.load(span))
            for span in slices(name, self.vocabulary)
        )

    def _named_other(self, name: str, other: str, same: Same) -> Diagnosis:
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

    def _is_exchanged(self, name: str, other: str, same: Same) -> bool:
        """Whether the candidate's `other` is the reference's `name`, as far as a sketch tells."""
        try:
            mine, theirs = self.sketch(self.ours[name]), self.sketch(self.found[other])
        except BindingError:
            return False
        return (same if same.limit else Same(1e-4)).near(mine, theirs)

    def in_a_pair(self, case: Case) -> Diagnosis | None:
        """Gate and up mistaken together."""
        pair = _PAIR.fullmatch(case.name)
        if pair is None or not {f"{pair[1]}.gate", f"{pair[1]}.up"} <= set(self.wrong):
            return None
        if pair[1] not in self._pairs:
            mine, other = case.name, f"{pair[1]}.{'up' if pair[2] == 'gate' else 'gate'}"
            self._pairs[pair[1]] = None
            if self.found[other].keys and self.same(other) == case.same:
                x, y = self.load(other, case.same)
                first, second = ((case.x, case.y), (x, y)) if mine.endswith("gate") else ((x, y), (case.x, case.y))
                xs, ys = (first[0], second[0]), (first[1], second[1])
                if ys[0].ndim == ys[1].ndim == 2 and ys[0].shape[1] == ys[1].shape[1]:
                    together = rearranged.paired(xs, ys, case.same)
                    if together is None and ys[0].shape != xs[0].shape:
                        whole = np.concatenate(xs), np.concatenate(ys)
                        together = block_order.other_shape(*whole, case.same, (Axis("row"), Axis("column")))
                    self._pairs[pair[1]] = together
        return self._pairs[pair[1]]

    def in_blocks_of_a_pair(self, case: Case) -> Diagnosis | None:
        """Blocks of a fused gate and up, whose halves no one told apart."""
        pair = _PAIR.fullmatch(case.name)
        if pair is None:
            return None
        other = f"{pair[1]}.{'up' if pair[2] == 'gate' else 'gate'}"
        if not self.found[other].keys or self.same(other) != case.same:
            return None
        x, y = self.load(other, case.same)
        if x.shape != y.shape or x.shape != case.x.shape:
            return None
        mine, theirs = (case.x, case.y), (x, y)
        gate, up = (mine, theirs) if pair[2] == "gate" else (theirs, mine)
        a, b = np.concatenate([gate[0], up[0]]), np.concatenate([gate[1], up[1]])
        found = block_order.block_order(a, b, case.same, Axis("row"))
        return Diagnosis(found.kind, f"{found.cause}, gate and up together") if found else None

    def mixed_experts(self, case: Case) -> Diagnosis | None:
        """Pieces of several experts' rows."""
        found = _EXPERT.fullmatch(case.name)
        if found is None:
            return None
        dtype, kinds = self.found[case.name].dtype, ("down",) if found[3] == "down" else ("gate", "up")
        of_all = f"{found[1]}.{kinds[0]}"

        def load(expert: int) -> Array:
            """As it lies."""
            return np.concatenate(
                [self.reference(f"{found[1]}.{expert}.{kind}", case.same, dtype).T for kind in kinds], 1
            )

        if self._pieces is None or self._pieces[0] != of_all:
            n, width = self.config.text_config.num_local_experts, case.x.shape[0]
            nbytes = Pieces.nbytes(n, case.x.size * len(kinds), width)
            self._pieces, self._kept = None, 0
            if n * case.x.nbytes > _MOST_EXPERTS or not self._affords(case.name, beside=nbytes):
                return None
            self._pieces, self._kept = (of_all, Pieces(load, n, width)), nbytes
        return self._pieces[1].mixed(case.y.T, int(found[2]))

    def cut_from_qkv(self, case: Case) -> Diagnosis | None:
        """Rows of q, k and v mistaken together."""
        one = _QKV.fullmatch(case.name)
        if one is None or case.same.limit:
            return None
        dtype, text = self.found[case.name].dtype, self.config.text_config
        parts = [self.reference(f"{one[1]}{part}", case.same, dtype) for part in "qkv"]
        most = max(block_order.MOST_RANKS, text.num_key_value_heads)
        return rearranged.stacked(parts, case.y, "qkv".index(one[2]), case.same, most)

    def permuted_for_rope(self, case: Case) -> Diagnosis | None:
        if not case.head_dim:
            return None
        others = bool(re.search(r"attention\.[qk]|w[qk]\.", case.name))
        return rearranged.rope_permuted(case.x, case.y, case.same, case.head_dim, others)

    def _of_damaged(self, name: str, reader: QuantizedReader) -> Diagnosis | None:
        module = self.found[name].keys[0].removesuffix(".weight")
        tensors = reader.checkpoint.tensors
        shapes = {key.removeprefix(f"{module}."): tensors[key].shape for key in tensors if key.startswith(f"{module}.")}
        ours = self.ours[name]
        return quantized_faults.damaged(
            floats(np.ascontiguousarray(ours.load(None)), ours.dtype),
            shapes,
            lambda suffix: DirectoryReader.read(reader, f"{module}.{suffix}"),
            {kind: Same(limit) for kind, limit in self.limits.items()},
        )

    def of_scales(self, case: Case) -> Diagnosis | None:
        if self.quantized is None or (matrix := self.quantized.quantized.get(self.found[case.name].keys[0])) is None:
            return None
        parts = self.quantized.read_parts(self.found[case.name].keys[0])
        if count := int(np.count_nonzero(~np.isfinite(case.y) & np.isfinite(case.x))):
            found = quantized_faults.wrong_packing(case.x, case.y, matrix, parts, case.same)
            words = f"{count:,} of its numbers are NaN or infinite"
            return found or Diagnosis("nonfinite", words)
        args = (case.x, case.y, matrix, parts, case.same)
        within = rearranged.relative_error(case.x, case.y) <= case.same.limit
        few = quantized_faults.suspicion(*args[:4]) if within else None
        if few and few.kind != "scale":
            return few
        return quantized_faults.wrong_scales(*args) or quantized_faults.wrong_packing(*args)

    # -------------------- hypotheses on the numbers alone

    def flipped(self, case: Case) -> Diagnosis | None:
        return altered.flipped_bits(case.region)

    def constant(self, case: Case) -> Diagnosis | None:
        if case.region.x.size and (not case.region.words or not case.y.any()):
            return altered.constants(case.region)
        return None

    def constant_somewhere(self, case: Case) -> Diagnosis | None:
        return altered.constants(case.region)

    def transposed(self, case: Case) -> Diagnosis | None:
        if case.thin is None:
            return rearranged.transposed(case.x, case.y, case.same)
        # Of a sliced matrix the first row tells: it holds the beginning of the first column.
        n = min(case.y.shape[1], len(case.x))
        if n > 1 and np.array_equal(case.y[0, :n], case.x[:n, 0]):
            return Diagnosis("transposed", "its numbers lie transposed under the unchanged shape")
        return None

    def permuted_in_the_picture(self, case: Case) -> Diagnosis | None:
        """Colours, pixels or patches in another order."""
        vision = self.config.vision_config
        if vision is None:
            return None
        args = case.x, case.y, case.same
        if case.name == "vision.patch_embedding":
            return rearranged.patches_permuted(*args, vision.patch_size)
        if case.name == "vision.position_embedding":
            return rearranged.positions_permuted(*args)
        if case.name == "vision.adapter.c_fc":
            return rearranged.pixels_permuted(*args, case.x.shape[1] // vision.hidden_size)
        return None

    def wrong_axis(self, case: Case) -> Diagnosis | None:
        return rearranged.wrong_axis(*(case.thin or (case.x, case.y)), case.same, [axis.heads for axis in case.axes])

    def in_blocks(self, case: Case) -> Diagnosis | None:
        found = (block_order.block_order(x, y, case.same, axis) for x, y, axis in case.turned())
        return next(filter(None, found), None)

    def in_rows(self, case: Case) -> Diagnosis | None:
        found = (block_order.row_order(x, y, case.same, axis, case.head_dim) for x, y, axis in case.turned())
        return next(filter(None, found), None)

    def shifted(self, case: Case) -> Diagnosis | None:
        return rearranged.shifted(
            case.x, case.y, case.same, turned=".experts." in case.name or case.name.endswith("router")
        )

    def read_otherwise(self, case: Case) -> Diagnosis | None:
        return altered.other_reading(case.region)

    def rounded(self, case: Case) -> Diagnosis | None:
        ours = self.ours[case.name]
        narrowed = ours.dtype == "F32" and case.dtype == "BF16" and case.thin is None
        if narrowed and np.array_equal(rearranged.as_matrix(ours.load(None)) >> 16, case.y):
            return Diagnosis("rounded", "rounded: the lower bits are cut off where they should be rounded to nearest")
        return altered.rounded(case.region)

    def recalculated(self, case: Case) -> Diagnosis | None:
        return altered.recalculated(case.region, case.same)

    def averaged(self, case: Case) -> Diagnosis | None:
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

    def near_or_unrelated(self, case: Case) -> Diagnosis | None:
        return altered.near_or_unrelated(case.region)


Hypothesis = Callable[[Diagnoser, Case], Diagnosis | None]

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
