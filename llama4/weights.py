"""What the bindings of the two layouts read from, and what both make of it: the same logical tensors under the same names.

`weights_meta` and `weights_transformers` bind their layouts by hand, independently of the conversion tables: if a table lies,
these do not lie with it. A binding is an iterator of (name, load) pairs in model order, with `load()` returning the
tensor's raw bits ([out, in] for projections, an expert at a time), so that two checkpoints can be held against each other in
little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.unsignedinteger[Any]]
LogicalTensors = Iterator[tuple[str, Callable[[], Bits]]]


class TensorReader(Protocol):
    """One file or directory of named tensors; implemented by `llama4_convert.checkpoints`."""

    def keys(self) -> Collection[str]: ...

    def read(self, key: str, rows: tuple[int, int] | None = None) -> Bits:
        """The raw bits of a tensor, as unsigned integers of its item size; `rows` cuts its first dimension."""
        ...


class BindingError(ValueError):
    """A layout lacks a tensor that the geometry calls for; the message names the keys that were looked for."""


def first_key(keys: Collection[str], *candidates: str) -> str:
    """The first of several spellings that is there. Raises BindingError."""
    for key in candidates:
        if key in keys:
            return key
    raise BindingError(f"no tensor {' or '.join(candidates)}")


def different(a: LogicalTensors, b: LogicalTensors) -> Iterator[tuple[str, int]]:
    """(name, number of differing elements) of every logical tensor that is not equal bit by bit on both sides."""
    for (name, load_a), (other, load_b) in zip(a, b, strict=True):
        if name != other:
            raise BindingError(f"{name} on one side, {other} on the other")
        x, y = load_a(), load_b()
        if x.dtype != y.dtype or x.shape != y.shape:
            yield name, x.size
        elif n := int(np.count_nonzero(x != y)):
            yield name, n
