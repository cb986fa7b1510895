"""A few hundred numbers of every tensor of the reference, by which a tensor is known again under another name."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llama4.weights import LogicalTensor
from llama4_convert.validation.diagnosis.tolerance import Array, Floats, Tolerance, floats

_SAMPLE_ROWS, _SAMPLE_COLUMNS = 16, 32
_ROUNDED = Tolerance(1e-4)  # what is equal bit by bit may have been rounded to another dtype on its way
Shape = tuple[int, int]


class Sketches:
    """By shape, since only tensors of one shape can be mistaken for each other. 2 KB a tensor."""

    def __init__(self) -> None:
        self._made: dict[Shape, dict[str, Floats]] = {}

    def add(self, name: str, shape: Shape, made: Floats) -> None:
        self._made.setdefault(shape, {})[name] = made

    def of_shape(self, shape: Shape) -> dict[str, Floats]:
        return self._made.get(shape, {})

    def like(self, made: Floats, shape: Shape, tolerance: Tolerance) -> list[str]:
        """Names of the tensors of this shape that have this sketch."""
        tolerance = tolerance if tolerance.limit else _ROUNDED
        return [name for name, other in self.of_shape(shape).items() if tolerance.near(other, made)]


def sketch(x: Array, dtype: str) -> Floats:
    """Of a matrix, or a vector as a column: the same places of each that has its shape, as float32."""
    return floats(x[np.ix_(*_places((x.shape[0], x.shape[1])))], dtype).ravel()


def sketch_of_rows(tensor: LogicalTensor, shape: Shape) -> Floats:
    """The same of a matrix that is too large to be read whole."""
    rows, columns = _places(shape)
    picked = np.concatenate([tensor.load((int(row), int(row) + 1)) for row in rows])
    return floats(picked[:, columns], tensor.dtype).ravel()


def _places(shape: Shape) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return _spread(shape[0], _SAMPLE_ROWS if shape[1] > 1 else _SAMPLE_ROWS * _SAMPLE_COLUMNS), _spread(
        shape[1], _SAMPLE_COLUMNS
    )


def _spread(n: int, most: int) -> NDArray[np.intp]:
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.intp))
