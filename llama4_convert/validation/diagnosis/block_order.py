"""Blocks of rows that are missing, repeated or in another order: ranks, heads, experts, single rows. Pure, on arrays.

Columns are the rows of the turned matrix. Blocks are known again by some of their numbers; the order that is found so is then
compared on the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from llama4_convert.validation.diagnosis.moved_values import ALTERNATING_RANKS, TRANSPOSED, find_move
from llama4_convert.validation.diagnosis.tolerance import (
    Ambiguous,
    Array,
    Diagnosis,
    Tolerance,
    divisors,
    listed,
    some_of,
)
from llama4_convert.validation.diagnosis.wrong_tensor import Axis, WrongTensor

_SIGNATURE_NUMBERS = 512  # numbers of a block that it is known by
_UNMATCHED, _ZERO = -1, -2


def _signatures(x: Array, n: int) -> Array:
    """Some numbers of each of n blocks of rows, [n, ...]."""
    rows, columns = x.shape
    height = rows // n
    across = min(columns, max(64, _SIGNATURE_NUMBERS // height) if height > 1 else 256)
    down = some_of(height, max(1, _SIGNATURE_NUMBERS // across))
    at = (np.arange(n)[:, None] * height + down).ravel()
    picked: Array = x[np.ix_(at, some_of(columns, across))].reshape(n, -1)
    return picked


def _match(x: Array, y: Array, tolerance: Tolerance) -> NDArray[np.intp]:
    """For each signature of y the one of x that it is, its own place if it can be; or _UNMATCHED, or _ZERO."""
    found = np.full(len(y), _UNMATCHED)
    if tolerance.limit:
        power = np.square(x).sum(1)
        for start in range(0, len(y), 1024):
            some = y[start : start + 1024]
            error = (power + np.square(some).sum(1)[:, None] - 2 * some @ x.T) / np.maximum(power, 1e-30)
            best = error.argmin(1)
            found[start : start + 1024] = np.where(error.min(1) <= 2 * tolerance.limit, best, _UNMATCHED)
    else:
        first: dict[bytes, int] = {}
        for i, row in enumerate(x):
            first.setdefault(row.tobytes(), i)
        found[:] = [first.get(row.tobytes(), _UNMATCHED) for row in y]
        n = min(len(x), len(y))
        stays = (x[:n] == y[:n]).all(1)
        found[:n][stays] = np.flatnonzero(stays)
    found[~y.any(1) & (found != np.arange(len(y)))] = _ZERO
    return found


def _check_told_apart(known: Array, order: NDArray[np.intp]) -> None:
    """Raises Ambiguous if a block that stands elsewhere is equal to another one of the reference: it may be either."""
    count = Counter(block.tobytes() for block in known)
    if any(count[known[block].tobytes()] > 1 for place, block in enumerate(order) if block >= 0 and block != place):
        raise Ambiguous


def _arranged(x: Array, order: NDArray[np.intp], n: int) -> Array:
    blocks = x.reshape(n, -1, x.shape[1])[np.maximum(order, 0)]
    blocks[order == _ZERO] = 0
    return blocks.reshape(-1, x.shape[1])


@dataclass(frozen=True)
class Blocks:
    """y is made of x's n blocks of rows in the order `order`, _ZERO where a block of zeros stands."""

    n: int
    height: int
    order: NDArray[np.intp]

    @property
    def lost(self) -> list[int]:
        """Blocks of x that y lacks."""
        return sorted(set(range(self.n)) - set(self.order.tolist()))


def find_blocks(x: Array, y: Array, tolerance: Tolerance, counts: Sequence[int]) -> Blocks | None:
    """The first of these counts of blocks that explains y, which may have more or fewer rows than x. Raises Ambiguous."""
    for n in counts:
        if x.shape[0] % n or y.shape[0] % (x.shape[0] // n):
            continue
        height = x.shape[0] // n
        known = _signatures(x, n)
        order = _match(known, _signatures(y, y.shape[0] // height), tolerance)
        if np.array_equal(order, np.arange(n)):  # where numbers are lossy a single wrong row is lost among the others
            continue
        if _UNMATCHED not in order and tolerance(_arranged(x, order, n), y):
            _check_told_apart(known, order)
            return Blocks(n, height, order)
    return None


_REORDERED = {"rank": "ranks_reordered", "head": "heads_reordered", "expert": "experts_reordered"}


def describe(found: Blocks, axis: Axis) -> Diagnosis:
    """Blocks that are missing, repeated or in another order, in words."""
    role, order = axis.role(found.n, found.height), found.order
    places = np.arange(len(order))
    zero = np.flatnonzero(order == _ZERO)
    extent = "" if found.height == 1 else f" ({found.height} {axis.line}s each)"
    if len(zero):
        where = f"{axis.line}s {listed(np.concatenate([i * found.height + np.arange(found.height) for i in zero]))}"
        if role == "rank" or (role == "head" and found.n <= 8):
            also = " (or head)" if role == "head" else ""
            words = f"rank missing: no numbers of rank {listed(found.lost)}{also} of {found.n}, zeros in {where}"
            return Diagnosis("rank_missing", words)
        which = f"{role} {listed(zero)}: " if role in ("head", "expert") else ""
        return Diagnosis("zeros", f"{which}{where} {'are' if len(zero) * found.height > 1 else 'is'} all zeros")
    if len(set(order.tolist())) < len(order):
        twice = np.flatnonzero(np.bincount(order) > 1)
        words = f"{role} repeated: {role} {listed(twice)} of {found.n}{extent} stands there more than once"
        words += f", {role} {listed(found.lost)} is missing" if found.lost else ""
        kind = {"expert": "experts_reordered", "row": "rows_permuted", "column": "columns_permuted"}
        return Diagnosis(kind.get(role, "rank_repeated"), words)
    moved = np.flatnonzero(order != places)
    if len(moved) == 2:
        words = f"{moved[0]} and {moved[1]} of {found.n}{extent} are exchanged"
    elif np.array_equal(order, places[::-1]):
        words = f"the last of {found.n}{extent} comes first"
    else:
        words = f"{found.n}{extent} in the order {listed(order, 16)}"
    if role == "expert":
        words += f"; {role} {moved[0]} holds the numbers of expert {order[moved[0]]}"
    verb = "reordered" if role in _REORDERED else "permuted"
    return Diagnosis(_REORDERED.get(role, f"{axis.line}s_permuted"), f"{role}s {verb}: {words}")


def in_blocks(wrong: WrongTensor) -> Diagnosis | None:
    """Ranks or heads missing, repeated or in another order, along the rows or the columns."""
    found = (block_order(x, y, wrong.tolerance, axis) for x, y, axis in wrong.turned())
    return next(filter(None, found), None)


def block_order(x: Array, y: Array, tolerance: Tolerance, axis: Axis) -> Diagnosis | None:
    """The same along the rows."""
    counts = divisors(len(x))
    if axis.heads not in (0, 1, *counts) and len(x) % axis.heads == 0:
        counts.append(axis.heads)
    found = find_blocks(x, y, tolerance, sorted(n for n in counts if n < len(x)))
    return describe(found, axis) if found else None


def in_rows(wrong: WrongTensor) -> Diagnosis | None:
    """Single rows or columns: zeros, in another order, shifted, repeated, or permuted for RoPE in some of the heads."""
    found = (_row_order(x, y, wrong.tolerance, axis, 2 * wrong.sizes.get("pairs", 0)) for x, y, axis in wrong.turned())
    return next(filter(None, found), None)


def _row_order(x: Array, y: Array, tolerance: Tolerance, axis: Axis, head_dim: int) -> Diagnosis | None:
    n = len(x)
    if x.shape[1] == 1:
        if not tolerance.limit and np.array_equal(np.sort(x, axis=None), np.sort(y, axis=None)):
            return Diagnosis("rows_permuted", "the same numbers in another order")
        return None
    known = _signatures(x, n)
    order = _match(known, _signatures(y, n), tolerance)
    shifts = np.where(order >= 0, order - np.arange(n), 0)
    if shifts.any():
        shift = int(np.bincount(shifts[shifts != 0] + n).argmax()) - n
        shifted = np.flatnonzero(shifts == shift)
        if len(shifted) > n // 2 and not axis.of_experts and tolerance(x[shifted + shift], y[shifted]):
            others = np.setdiff1d(np.arange(n), shifted)
            rest = f"; {axis.line} {listed(others)} is another" if len(others) else ""
            return Diagnosis("shifted", f"{axis.line}s shifted by {-shift}{rest}")
    if _UNMATCHED in order or np.array_equal(order, np.arange(n)) or not tolerance(_arranged(x, order, n), y):
        return None
    _check_told_apart(known, order)
    if head_dim and n % head_dim == 0:
        right = np.arange(head_dim)
        forms = [right.reshape(-1, 2).T.ravel(), right.reshape(2, -1).T.ravel()]
        within = order.reshape(-1, head_dim) - np.arange(0, n, head_dim)[:, None]
        wrong = [head for head, rows in enumerate(within) if not np.array_equal(rows, right)]
        if all(any(np.array_equal(within[head], form) for form in forms) for head in wrong):
            return Diagnosis(
                "rope_permuted", f"permuted for the other RoPE form in head {listed(wrong)} of {len(within)}"
            )
    return describe(Blocks(n, 1, order), axis)


# -------------------- another shape


def other_shape(x: Array, y: Array, tolerance: Tolerance, axes: tuple[Axis, Axis]) -> Diagnosis | None:
    """y has not x's shape. `axes`: of the rows, and of the columns."""
    if not y.size:
        return Diagnosis("truncated", "it is empty")
    if y.ndim != 2 or x.ndim != 2:
        is_reshaped = y.size == x.size and tolerance(x, y.reshape(x.shape))
        return Diagnosis("reshaped", "the right numbers in another shape") if is_reshaped else None
    if y.size == x.size:
        if found := find_move([TRANSPOSED], x, y, tolerance):
            return found
        if tolerance(np.ascontiguousarray(x).reshape(y.shape), y):
            words = "the right numbers in the order in which they should be, seen in another shape"
            return Diagnosis("transposed" if y.shape == x.shape[::-1] else "reshaped", words)
        return find_move([ALTERNATING_RANKS], x, y, tolerance)
    for a, b, axis in ((x, y, axes[0]), (x.T, y.T, axes[1])):
        if a.shape[1] == b.shape[1]:
            return _other_height(a, b, tolerance, axis)
    return None


def _other_height(x: Array, y: Array, tolerance: Tolerance, axis: Axis) -> Diagnosis | None:
    counts = dict.fromkeys(n for n in (len(x) // gcd(len(x), len(y)), axis.heads, len(x)) if n)
    found = find_blocks(x, y, tolerance, tuple(counts))
    if found is None:
        return None
    lines, order, role, n = f"{axis.line}s", found.order.tolist(), axis.role(found.n, found.height), found.n
    if order[:n] == list(range(n)) and set(order[n:]) == {_ZERO}:
        return Diagnosis("padded", f"padded: {len(y) - len(x)} {lines} of zeros behind the right ones")
    if order == sorted(set(order)) and _ZERO not in order:
        if role in ("rank", "head"):
            return Diagnosis("rank_missing", f"rank missing: no numbers of {role} {listed(found.lost)} of {n}")
        if order == list(range(len(order))):
            return Diagnosis("truncated", f"truncated: the last {len(x) - len(y)} {lines} are missing")
        return Diagnosis("truncated", f"{lines} {listed(found.lost)} are missing")
    if len(order) > len(set(order)):
        words = f"the numbers of {role} {listed(sorted({i for i in order if order.count(i) > 1}))} of {n}"
        missing = f", those of {role} {listed(found.lost)} are missing" if found.lost else ""
        return Diagnosis("rank_repeated", f"rank repeated: {words} stand there more than once{missing}")
    return None
