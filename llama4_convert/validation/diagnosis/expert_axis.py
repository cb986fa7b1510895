"""Experts' matrices that were mixed: ranks joined on the experts' axis, or that axis taken for another. Pure, on arrays.

Meta's ranks hold parts of all experts [experts, in, out / n]. Joined on the first axis, or reshaped with the axes in another
order, they fill the right shape, and each expert's matrix is made of pieces of rows of several. The beginnings of such pieces are
looked up among those of all experts of the layer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llama4_convert.validation.diagnosis.tolerance import Array, Diagnosis, listed, some_of

_PARTS_OF_A_ROW = (1, 2, 3, 4, 5, 6, 8, 16)
_KEY_NUMBERS = 8  # numbers that a piece is known by
_SAMPLE_ROWS = 64  # of the matrix that are looked up
_MULTIPLIERS = np.random.default_rng(0).integers(1 << 62, size=_KEY_NUMBERS, dtype=np.uint64) | np.uint64(1)
_Keys = NDArray[np.uint64]
_BYTES_PER_PIECE = 4 * 8  # its key twice, its place, and the keys in order


def _parts(width: int) -> list[int]:
    return [n for n in _PARTS_OF_A_ROW if width % n == 0 and width // n >= _KEY_NUMBERS]


class Pieces:
    """Of the experts of one layer as they lie, [in, out] each: the beginnings of their rows' n parts."""

    def __init__(self, load: Callable[[int], Array], n_experts: int, width: int) -> None:
        """`width`: of the rows of the matrices that will be asked for, which rows of `load` are once or twice as wide as."""
        keys: dict[int, list[_Keys]] = {n: [] for n in _parts(width)}
        for expert in range(n_experts):
            matrix = load(expert)
            for n, found in keys.items():
                found.append(_keys(matrix, width // n))
        self._sorted: dict[int, tuple[_Keys, NDArray[np.intp], int]] = {}
        for n, found in keys.items():
            all_keys = np.concatenate([key.ravel() for key in found])
            order = np.argsort(all_keys)
            self._sorted[n] = all_keys[order], order, found[0].size

    @staticmethod
    def nbytes(n_experts: int, numbers: int, width: int) -> int:
        """What they take while they are made, of matrices of so many numbers."""
        return n_experts * numbers // width * sum(_parts(width)) * _BYTES_PER_PIECE

    def mixed(self, y: Array, expert: int) -> Diagnosis | None:
        """Whether the rows of y, [in, out], are made of pieces of several experts' rows."""
        rows = y[some_of(len(y), _SAMPLE_ROWS)]
        for n, (keys, order, size) in self._sorted.items():
            asked = _keys(rows, y.shape[1] // n).ravel()
            place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
            known = keys[place] == asked
            if not known.all():
                continue
            experts = np.unique(order[place] // size)
            if experts.tolist() == [expert]:
                return None
            parts = "rows" if n == 1 else f"pieces of rows, {n} to a row,"
            whose = f"{'experts' if len(experts) > 1 else 'expert'} {listed(experts)}"
            return Diagnosis(
                "wrong_axis", f"joined on the wrong axis, that of the experts: its {parts} are those of {whose}"
            )
        return None


def _keys(matrix: Array, width: int) -> _Keys:
    """[rows, pieces]"""
    pieces = matrix.reshape(len(matrix), -1, width)[:, :, :_KEY_NUMBERS].astype(np.uint64)
    keys: _Keys = (pieces * _MULTIPLIERS).sum(-1, dtype=np.uint64)
    return keys
