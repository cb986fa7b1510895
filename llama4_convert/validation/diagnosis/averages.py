"""Numbers that are a mean or a mixture of right ones, as merging models, experts or heads makes them. Pure, on arrays.

Tensors are known by their sketches: some hundred numbers that fit within their rounding are no chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llama4_convert.validation.diagnosis.block_order import Axis
from llama4_convert.validation.diagnosis.changed_values import ROUNDING, Floats
from llama4_convert.validation.diagnosis.moved_values import Array, Diagnosis, divisors, relative_error

_FEWEST = 24  # numbers that two factors can be fitted to


def _within(x: Array, y: Array, dtype: str) -> bool:
    """Whether y is x as far as rounding to `dtype` tells."""
    return relative_error(y, x) <= (2 * ROUNDING.get(dtype, 2.0**-8)) ** 2


def of_blocks(x: Floats, y: Floats, dtype: str, axis: Axis) -> Diagnosis | None:
    """Heads that were averaged: y has the mean of each group of x's heads in the place of all of them."""
    heads = x.reshape(axis.heads, -1)
    for size in (*divisors(axis.heads, axis.heads), axis.heads):
        mean = heads.reshape(-1, size, heads.shape[1]).mean(1)
        every = np.repeat(mean, size, axis=0).reshape(x.shape)
        if size > 1 and _within(every, y, dtype):
            which = f"all {size} heads" if size == axis.heads else f"each {size} heads that follow one another"
            return Diagnosis("averaged", f"averaged: the mean of {which} stands in the place of each")
    return None


def is_mean(sketches: Sequence[Floats], found: Floats, dtype: str) -> bool:
    return _within(np.stack(sketches).astype(np.float64).mean(0, keepdims=True)[0], found, dtype)


def mixture(name: str, sketches: Mapping[str, Floats], found: Floats, dtype: str) -> tuple[str, float, float] | None:
    """The tensor that was mixed in, the factor of the right one and that of the other."""
    mine, y = sketches[name].astype(np.float64), found.astype(np.float64)
    if found.size < _FEWEST or not (np.isfinite(mine).all() and np.isfinite(y).all()):
        return None
    for other, sketch in sketches.items():
        if other == name or not np.isfinite(sketch).all():
            continue
        both = np.stack([mine, sketch.astype(np.float64)], 1)
        factors = np.linalg.lstsq(both, y, rcond=None)[0]
        if min(abs(factors)) > 0.01 and _within(both @ factors, y, dtype):
            return other, float(factors[0]), float(factors[1])
    return None
