"""Numbers of another tensor under a tensor's name, and means and mixtures of several, as merging models or experts makes them.

Tensors are known again by their sketches: some hundred numbers that agree within their rounding are no coincidence.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from llama4.weights import BindingError, expert_of
from llama4.weights_transformers import transformers_key
from llama4_convert.validation.diagnosis.sketches import Sketches, sketch, sketch_of_rows
from llama4_convert.validation.diagnosis.tensor_pairs import SLICED, TensorPairs, cast, slices
from llama4_convert.validation.diagnosis.tolerance import (
    ROUNDING,
    Ambiguous,
    Array,
    Diagnosis,
    Floats,
    Tolerance,
    divisors,
    floats,
    relative_error,
)
from llama4_convert.validation.diagnosis.wrong_tensor import Axis, WrongTensor

_FEWEST_NUMBERS = 24  # that two factors can be fitted to
_CANDIDATES = 3  # tensors with the right sketch that are compared as a whole


def sibling(name: str) -> str | None:
    """The up projection beside a gate projection, and the reverse."""
    stem, _, part = name.rpartition(".")
    return {"gate": f"{stem}.up", "up": f"{stem}.gate"}.get(part)


def _layer(name: str) -> int | None:
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _module(name: str) -> str:
    return re.sub(r"layers\.\d+\.", "layers.", name)


@dataclass(frozen=True)
class OtherTensors:
    """What a tensor's neighbours explain. `wrong`: names of all wrong tensors; `sketches`: of the reference's tensors."""

    pairs: TensorPairs
    wrong: Collection[str]
    sketches: Sketches

    def another_tensor(self, wrong: WrongTensor) -> Diagnosis | None:
        """Another tensor's numbers under this name, as they are or transposed."""
        name, y, tolerance = wrong.name, wrong.y, wrong.tolerance
        if y.ndim != 2 or not y.size:
            return None
        is_sliced, theirs = name in SLICED, self.pairs.theirs[name]
        shape = (self.pairs.vocabulary if is_sliced else len(y), y.shape[1])
        made = sketch_of_rows(theirs, shape) if is_sliced else sketch(y, theirs.dtype)
        names = [other for other in self.sketches.like(made, shape, tolerance) if other != name]
        names.sort(key=lambda other: (_layer(other) != _layer(name), _module(other) != _module(name)))
        held = [other for other in names[:_CANDIDATES] if self._holds(name, other, tolerance)]
        if len(held) > 1:  # the reference has equal ones
            raise Ambiguous
        if held:
            return self._held(name, held[0], tolerance)
        if is_sliced:
            return None
        for other in self.sketches.like(sketch(y.T, theirs.dtype), shape[::-1], tolerance)[:_CANDIDATES]:
            if other not in {name, *SLICED} and tolerance(self.pairs.reference(other, tolerance, theirs.dtype), y.T):
                words = f"another tensor's numbers: it holds those of {self._key(other)}, transposed"
                return Diagnosis("other_tensor", words)
        return None

    def _key(self, name: str) -> str:
        """The name in a Transformers directory."""
        key, expert = transformers_key(name, self.pairs.config.vision_config is not None), expert_of(name)
        return f"{key} (expert {expert.expert}, {expert.part})" if expert else key

    def _holds(self, name: str, other: str, tolerance: Tolerance) -> bool:
        """Whether the candidate's `name` is the reference's `other`."""
        theirs, ours = self.pairs.theirs[name], self.pairs.ours[other]
        if name not in SLICED:
            return tolerance(
                self.pairs.reference(other, tolerance, theirs.dtype), self.pairs.candidate(name, tolerance)
            )
        return all(
            np.array_equal(cast(ours.load(span), ours.dtype, theirs.dtype), theirs.load(span))
            for span in slices(name, self.pairs.vocabulary)
        )

    def _held(self, name: str, other: str, tolerance: Tolerance) -> Diagnosis:
        """The candidate's `name` is the reference's `other`, in words."""
        is_exchanged = other in self.wrong and self._is_exchanged(name, other, tolerance)
        if is_exchanged and other == sibling(name):
            return Diagnosis("gate_up_swapped", "gate and up swapped: each holds the other's numbers")
        also = " (the two are exchanged)" if is_exchanged else ""
        mine, its, layer = expert_of(name), expert_of(other), _layer(other)
        if mine and its and (mine.layer, mine.part) == (its.layer, its.part):
            return Diagnosis("experts_reordered", f"experts reordered: it holds expert {its.expert}'s numbers{also}")
        of_layer = _module(name) == _module(other) and layer is not None and layer != _layer(name)
        whose = f"layer {layer}'s, {self._key(other)}" if of_layer else f"those of {self._key(other)}"
        return Diagnosis("other_tensor", f"another tensor's numbers: it holds {whose}{also}")

    def _is_exchanged(self, name: str, other: str, tolerance: Tolerance) -> bool:
        """Whether the candidate's `other` is the reference's `name`, as far as a sketch tells."""
        try:
            mine, theirs = self.pairs.sketch(self.pairs.ours[name]), self.pairs.sketch(self.pairs.theirs[other])
        except BindingError:
            return False
        return (tolerance if tolerance.limit else Tolerance(1e-4)).near(mine, theirs)

    def averaged(self, wrong: WrongTensor) -> Diagnosis | None:
        """The mean of heads, of experts or of layers, or a mixture with one other tensor."""
        if wrong.thin is not None:
            return None
        for x, y, axis in wrong.turned():
            if axis.heads and (
                found := _mean_of_heads(floats(x, wrong.dtype), floats(y, wrong.dtype), wrong.dtype, axis)
            ):
                return found
        rows, columns = wrong.x.shape
        others = {name: made for name, made in self.sketches.of_shape((rows, columns)).items() if name not in SLICED}
        if wrong.name not in others:
            return None
        made, mine = sketch(wrong.y, wrong.dtype), expert_of(wrong.name)
        experts = [
            x
            for name, x in others.items()
            if mine and (its := expert_of(name)) and (its.layer, its.part) == (mine.layer, mine.part)
        ]
        layers = [x for name, x in others.items() if _module(name) == _module(wrong.name)]
        for group, words in ((experts, "experts of the layer"), (layers, "layers that have one")):
            if len(group) > 1 and _is_mean(group, made, wrong.dtype):
                return Diagnosis("averaged", f"averaged: it is the mean of all {len(group)} {words}")
        right = others.pop(wrong.name)
        for name, other in others.items():
            if factors := _mixture(right, other, made, wrong.dtype):
                words = (
                    f"{factors[0]:.3g} times the right numbers and {factors[1]:.3g} times those of {self._key(name)}"
                )
                return Diagnosis("averaged", f"averaged: it is {words}")
        return None


def _within(x: Array, y: Array, dtype: str) -> bool:
    """Whether y is x as far as rounding to `dtype` tells."""
    return relative_error(y, x) <= (2 * ROUNDING.get(dtype, 2.0**-8)) ** 2


def _mean_of_heads(x: Floats, y: Floats, dtype: str, axis: Axis) -> Diagnosis | None:
    """Whether y has the mean of each group of x's heads in the place of all of them."""
    heads = x.reshape(axis.heads, -1)
    for size in (*divisors(axis.heads, axis.heads), axis.heads):
        mean = heads.reshape(-1, size, heads.shape[1]).mean(1)
        if size > 1 and _within(np.repeat(mean, size, axis=0).reshape(x.shape), y, dtype):
            which = f"all {size} heads" if size == axis.heads else f"each {size} heads that follow one another"
            return Diagnosis("averaged", f"averaged: the mean of {which} stands in the place of each")
    return None


def _is_mean(sketches: Sequence[Floats], found: Floats, dtype: str) -> bool:
    return _within(np.stack(sketches).astype(np.float64).mean(0), found, dtype)


def _mixture(right: Floats, other: Floats, found: Floats, dtype: str) -> tuple[float, float] | None:
    """The factors of both in `found`."""
    both, y = np.stack([right, other], 1).astype(np.float64), found.astype(np.float64)
    if found.size < _FEWEST_NUMBERS or not (np.isfinite(both).all() and np.isfinite(y).all()):
        return None
    factors = np.linalg.lstsq(both, y, rcond=None)[0]
    is_mixed = min(abs(factors)) > 0.01 and _within(both @ factors, y, dtype)
    return (float(factors[0]), float(factors[1])) if is_mixed else None
