"""A wrong tensor: what the reference holds, what the candidate holds, and where they differ. Pure, on arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llama4_convert.validation.diagnosis.tolerance import EXACT, Array, Tolerance, floats, listed

_SAMPLE_ROWS, _SAMPLE_COLUMNS = 512, 2048  # whose numbers are taken for calculations
_GLIMPSE_ROWS = 32
MAX_RANKS = 16


@dataclass(frozen=True)
class Axis:
    """What the rows of a matrix are, as people call them."""

    line: str = "row"  # or "column", where the matrix is turned for the test
    heads: int = 0  # number of attention heads on this axis
    of_experts: bool = False  # a router's rows

    def role(self, n: int, height: int) -> str:
        """What n blocks of `height` rows are."""
        if self.of_experts:
            return "expert"
        if n == self.heads:
            return "head"
        if height == 1:
            return self.line
        return "rank" if n <= MAX_RANKS else "block"


@dataclass(frozen=True)
class Region:
    """The rows and the columns in which anything differs. x is the reference's and y the candidate's, bits or numbers."""

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    shape: tuple[int, int]  # of the whole
    dtype: str
    x: Array
    y: Array

    @staticmethod
    def between(x: Array, y: Array, dtype: str, tolerance: Tolerance = EXACT) -> Region:
        if tolerance.limit:
            error, power = np.square(y - x), np.square(x)
            rows, columns = (np.flatnonzero(~(error.sum(i) <= 2 * tolerance.limit * power.sum(i))) for i in (1, 0))
            rows, columns = (
                some if len(some) else np.arange(n) for some, n in zip((rows, columns), x.shape, strict=True)
            )
        else:
            unequal = x != y
            rows, columns = np.flatnonzero(unequal.any(1)), np.flatnonzero(unequal.any(0))
        return Region(rows, columns, (x.shape[0], x.shape[1]), dtype, *(_cut(one, rows, columns) for one in (x, y)))

    @property
    def words(self) -> str:
        """Where that is, beginning with a blank; nothing for everywhere."""
        height, width = self.shape
        line = "row" if width > 1 else "element"
        parts = [_named(line, self.rows)] if len(self.rows) < height else []
        parts += [_named("column", self.columns)] if len(self.columns) < width else []
        return f" in {' and '.join(parts)}" if parts else ""

    @property
    def size(self) -> int:
        """Numbers of the whole tensor."""
        return self.shape[0] * self.shape[1]

    def index(self, row: int, column: int) -> list[int]:
        """Where in the whole tensor a number of the region lies."""
        return [int(self.rows[row])] + ([int(self.columns[column])] if self.shape[1] > 1 else [])

    @cached_property
    def glimpse(self) -> Region:
        """Its first rows: what fails there need not be tried on the whole."""
        if len(self.x) <= _GLIMPSE_ROWS:
            return self
        return replace(self, x=self.x[:_GLIMPSE_ROWS], y=self.y[:_GLIMPSE_ROWS], rows=self.rows[:_GLIMPSE_ROWS])

    @cached_property
    def numbers(self) -> tuple[Array, Array]:
        """Both as float64: no more than the first rows and columns, which stand for all."""
        x, y = (floats(one[:_SAMPLE_ROWS, :_SAMPLE_COLUMNS], self.dtype).astype(np.float64) for one in (self.x, self.y))
        return x, y


def _named(line: str, numbers: NDArray[np.intp]) -> str:
    return f"{line}{'s' if len(numbers) > 1 else ''} {listed(numbers)}"


def _cut(x: Array, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Array:
    x = x if len(rows) == x.shape[0] else x[rows]
    return x if len(columns) == x.shape[1] else x[:, columns]


@dataclass
class WrongTensor:
    """x is the reference's and y the candidate's [rows, columns] (a vector is a column): bits of one dtype, or numbers if lossy.

    Of a sliced matrix x and y are the first rows; `thin` has some columns of all rows.
    """

    name: str
    tolerance: Tolerance
    dtype: str
    x: Array
    y: Array
    axes: tuple[Axis, Axis] = (Axis("row"), Axis("column"))
    sizes: Mapping[str, int] = field(default_factory=dict)  # of the axes that rows of `moved_values` name
    thin: tuple[Array, Array] | None = None
    sparse: Region | None = None  # of a sliced matrix: some of the rows and columns that differ

    @cached_property
    def region(self) -> Region:
        return self.sparse or Region.between(self.x, self.y, self.dtype, self.tolerance)

    @property
    def lines(self) -> tuple[Array, Array]:
        """x and y with all their rows, of a sliced matrix in some columns."""
        return self.thin or (self.x, self.y)

    def turned(self) -> Iterator[tuple[Array, Array, Axis]]:
        """For tests of rows: as it is, and for its columns."""
        yield *self.lines, self.axes[0]
        if self.x.shape[1] > 1:
            yield self.x.T, self.y.T, self.axes[1]
