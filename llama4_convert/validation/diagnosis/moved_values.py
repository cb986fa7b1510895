"""Numbers that are all there and lie elsewhere: transposed, joined on the wrong axis, permuted, shifted. Pure, on arrays.

x is what the reference holds and y what was found, two axes each (a vector is a column), raw bits or, where a candidate
is quantized, numbers. A hypothesis is tried on some hundred places first and on the whole only if it holds there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from math import isqrt, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_SAMPLE = 512  # numbers that a hypothesis is tried on first
_MOST_BLOCKS = 64
_AT_A_TIME = 1 << 22  # numbers whose differences are summed up together


@dataclass(frozen=True)
class Diagnosis:
    """How a tensor is wrong: a word for programs and a sentence for people."""

    kind: str
    cause: str


@dataclass(frozen=True)
class Tolerance:
    """Whether two arrays hold the same numbers: bit by bit, or within a relative squared error of `limit`."""

    limit: float = 0.0

    def __call__(self, x: Array, y: Array) -> bool:
        return self._within(x, y, self.limit)

    def near(self, x: Array, y: Array) -> bool:
        """Of a sample, whose error is not the whole's."""
        return self._within(x, y, 2 * self.limit)

    def _within(self, x: Array, y: Array, limit: float) -> bool:
        if x.shape != y.shape:
            return False
        return relative_error(x, y) <= limit if self.limit else np.array_equal(x, y)


EXACT = Tolerance()


def relative_error(x: Array, y: Array) -> float:
    """Squared difference over x squared, of numbers; infinite where x is zero and y is not."""
    error = power = 0.0
    # Some rows at a time, so that a matrix of float32 needs no third one beside the two.
    step = max(1, _AT_A_TIME // max(1, prod(x.shape[1:])))
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(x), step):
            some = x[start : start + step]
            difference = (y[start : start + step] - some).ravel()
            error, power = error + float(np.vdot(difference, difference)), power + float(np.vdot(some, some))
    return error / power if power else (0.0 if error == 0 else np.inf)


@dataclass(frozen=True)
class Move:
    """The numbers seen in the shape `split`, its axes put in the order `axes`, and seen in the old shape again."""

    split: tuple[int, ...]
    axes: tuple[int, ...]

    def __call__(self, x: Array) -> Array:
        return x.reshape(self.split).transpose(self.axes).reshape(x.shape)

    def sources(self, places: NDArray[np.intp]) -> NDArray[np.intp]:
        """Where the numbers at these flat places come from."""
        index = np.unravel_index(places, [self.split[axis] for axis in self.axes])
        return np.ravel_multi_index([index[self.axes.index(axis)] for axis in range(len(self.axes))], self.split)

    def explains(self, x: Array, y: Array, same: Tolerance) -> bool:
        places = some_of(x.size, _SAMPLE)
        if not same.near(_at(x, self.sources(places)), _at(y, places)):
            return False
        return same(self(x), y)


def some_of(size: int, count: int) -> NDArray[np.intp]:
    """Up to `count` of `size` indices, always the same ones, ascending."""
    if size <= count:
        return np.arange(size)
    return np.unique(np.random.default_rng(0).integers(size, size=count))


def _at(x: Array, places: NDArray[np.intp]) -> Array:
    """Numbers at flat places, without a copy of a matrix that is not contiguous."""
    picked: Array = x[np.unravel_index(places, x.shape)]
    return picked


def divisors(n: int, most: int = _MOST_BLOCKS) -> list[int]:
    """From 2 on, ascending, n itself left out."""
    return [d for d in range(2, min(n - 1, most) + 1) if n % d == 0]


def both_ways(x: Array, y: Array) -> Iterator[tuple[Array, Array]]:
    """As [out, in] and as [in, out], in which experts lie."""
    yield x, y
    if 1 not in x.shape:
        yield x.T, y.T


# -------------------- the whole of a matrix


def transposed(x: Array, y: Array, same: Tolerance) -> Diagnosis | None:
    rows, columns = x.shape
    if 1 in x.shape:
        return None
    words = "transposed" if rows == columns else "its numbers lie transposed under the unchanged shape"
    for a, b in both_ways(x, y):
        height, width = a.shape
        if Move((height, width), (1, 0)).explains(a, b, same):
            return Diagnosis("transposed", words)
    return None


def wrong_axis(x: Array, y: Array, same: Tolerance, heads: Sequence[int] = (0, 0)) -> Diagnosis | None:
    """Ranks' parts joined on the axis that they do not share, seen in the right shape. `heads`: on either axis.

    Heads whose number and size are exchanged are the same as that many ranks.
    """
    if 1 in x.shape:
        return None
    for a, b in both_ways(x, y):
        lines = "columns" if a is x else "rows"
        rows, columns = a.shape
        for n in divisors(columns):
            for split in ((rows, n, columns // n), (n, rows, columns // n)):
                if Move(split, (1, 0, 2)).explains(a, b, same):
                    return Diagnosis(
                        "wrong_axis",
                        f"ranks joined on the wrong axis: {n} parts that share the {lines} lie behind one another as if they"
                        " shared the other axis" if split[0] == rows else
                        f"ranks joined on the wrong axis: {n} parts that lie behind one another are joined along the {lines}",
                    )  # fmt: skip
    for a, b in both_ways(x, y):
        lines = "rows" if a is x else "columns"
        rows, columns = a.shape
        for n in divisors(rows):
            if Move((n, rows // n, columns), (1, 0, 2)).explains(a, b, same):
                words = f"ranks joined on the wrong axis: {n} blocks of {lines} are joined side by side, and alternate"
                if n == heads[a is not x]:
                    words += ", as when the number of heads and their size are exchanged"
                return Diagnosis("wrong_axis", words)
    return None


def rope_permuted(x: Array, y: Array, same: Tolerance, head_dim: int, others: bool = False) -> Diagnosis | None:
    """Rows of each head in the order of the other form of RoPE; if `others`, with heads of any even size."""
    rows, columns = x.shape
    sizes = [
        head_dim,
        *(size for size in (*divisors(rows, rows), rows) if others and size != head_dim and size > 2),
    ]
    for size in sizes:
        if size % 2 or rows % size:
            continue
        heads = "" if size == head_dim else f", with heads of {size} rows where there should be {head_dim}"
        for split, words in (
            ((rows // size, size // 2, 2, columns), "half-rotation (rotate_half) where pairs are interleaved"),
            (
                (rows // size, 2, size // 2, columns),
                "interleaved pairs, as if it came from half-rotation (rotate_half)",
            ),
        ):
            if split[:2] == (1, 2):
                continue  # also two ranks joined on the wrong axis, which is likelier
            if Move(split, (0, 2, 1, 3)).explains(x, y, same):
                return Diagnosis(
                    "rope_permuted", f"permuted for the other RoPE form: rows are in the order of {words}{heads}"
                )
    return None


def shifted(x: Array, y: Array, same: Tolerance, turned: bool) -> Diagnosis | None:
    """All numbers a constant number of elements, or bytes, away: a wrong offset. `turned`: the matrix may lie as [in, out]."""
    if same.limit:
        return None
    for a, b in both_ways(x, y):
        if a is not x and not turned:
            break
        source, found = a.tobytes(), b.tobytes()
        size = len(source)
        unequal = np.frombuffer(source, np.uint8) != np.frombuffer(found, np.uint8)
        begin = int(unequal.argmax())
        length = min(32, (size - begin) // 4)
        if length < 8:
            return None
        for place in (begin + (size - begin) // 2, size - 2 * length):
            at = source.find(found[place : place + length])
            shift = at - place
            if at < 0 or shift == 0:
                continue
            # What the shift brought in from outside is no one's: at the end, or at the beginning.
            first, last = max(begin, -shift), min(size, size - shift)
            if (last - first) * 2 > size - begin and source[first + shift : last + shift] == found[first:last]:
                item = x.itemsize
                steps = f"{abs(shift):,} bytes" if shift % item else f"{abs(shift) // item:,} elements"
                if shift % (row := item * a.shape[1]) == 0 and a.shape[1] > 1:
                    steps = f"{abs(shift) // row:,} {'rows' if a is x else 'columns'} ({steps})"
                start = "" if begin < max(item, -shift + item) else f", from element {begin // item:,} on"
                way = "towards the front" if shift > 0 else "towards the end"
                return Diagnosis(
                    "shifted", f"shifted by {steps} {way}{start}: its data offset is wrong or part of it is lost"
                )
    return None


def patches_permuted(x: Array, y: Array, same: Tolerance, patch: int) -> Diagnosis | None:
    """A patch embedding [D, 3 * patch * patch], whose columns are a colour after the other."""
    d = len(x)
    for move, words in (
        (Move((d, 3, patch, patch), (0, 2, 3, 1)), "colours last, as pictures lie in memory"),
        (Move((d, patch, patch, 3), (0, 3, 1, 2)), "taken for colours last, which they are not"),
        (Move((d, 3, patch, patch), (0, 1, 3, 2)), "height and width exchanged"),
        (Move((d, 3, patch, patch), (0, 3, 2, 1)), "width first and colours last"),
    ):
        if move.explains(x, y, same):
            return Diagnosis("columns_permuted", f"columns permuted: {words}")
    if same(x.reshape(d, 3, -1)[:, ::-1].reshape(x.shape), y):
        return Diagnosis("columns_permuted", "columns permuted: blue, green, red for red, green, blue")
    return None


def positions_permuted(x: Array, y: Array, same: Tolerance) -> Diagnosis | None:
    """A position embedding [patches + 1, D], row by row of the picture, whose last is the class token's."""
    side = isqrt(len(x) - 1)
    if same(np.roll(x, 1, 0), y):
        return Diagnosis("shifted", "rows shifted by 1: the class token comes first, and should come last")
    if side * side != len(x) - 1:
        return None
    grid = x[:-1].reshape(side, side, -1).transpose(1, 0, 2).reshape(side * side, -1)
    if same(np.concatenate([grid, x[-1:]]), y):
        return Diagnosis("rows_permuted", "rows permuted: the picture's height and width exchanged")
    return None


def pixels_permuted(x: Array, y: Array, same: Tolerance, n: int) -> Diagnosis | None:
    """The columns of the first matrix behind pixel shuffle: the channels of one of n pixels after the other's."""
    rows, columns = x.shape
    for split, words in (
        ((rows, n, columns // n), "channel by channel where they should lie pixel by pixel"),
        ((rows, columns // n, n), "taken for channel by channel, which they are not"),
    ):
        if columns % n == 0 and Move(split, (0, 2, 1)).explains(x, y, same):
            return Diagnosis("columns_permuted", f"columns permuted: {words}, in the order of pixel shuffle")
    return None


# -------------------- more than one matrix


def paired(x: Sequence[Array], y: Sequence[Array], same: Tolerance) -> Diagnosis | None:
    """A gate and an up projection [F, D] that were mistaken as a pair."""
    if same(x[0], y[1]) and same(x[1], y[0]):
        return Diagnosis("gate_up_swapped", "gate and up swapped: each holds the other's numbers")
    a, b = np.concatenate(x), np.concatenate(y)
    width, d = x[0].shape
    if b.shape == (d, 2 * width) and same(a.T, b):
        return Diagnosis("transposed", "transposed, gate and up together")
    if a.shape != b.shape:
        return None
    moves = [
        (Move((2, width, d), (1, 0, 2)), "column by column where they should lie side by side"),
        (Move((width, 2, d), (1, 0, 2)), "taken apart column by column where they lay side by side"),
    ]
    for n in divisors(width):
        many = f"in blocks, as the fused tensors of {n} ranks joined whole"
        moves.append((Move((2, n, width // n, d), (1, 0, 2, 3)), many))
        moves.append((Move((n, 2, width // n, d), (1, 0, 2, 3)), f"{many}, the other way round"))
    for move, words in moves:
        if move.explains(a, b, same):
            return Diagnosis("gate_up_interleaved", f"gate and up interleaved: {words}")
    found = transposed(a, b, same) or wrong_axis(a, b, same)
    return Diagnosis(found.kind, f"{found.cause}, gate and up together") if found else None


def stacked(x: Sequence[Array], y: Array, index: int, same: Tolerance, most: int) -> Diagnosis | None:
    """Whether `y`, the `index`-th of matrices [q, k, v], was cut from ranks' (or KV heads') fused blocks joined whole, or in
    another order."""
    sizes = [len(part) for part in x]
    starts = np.cumsum([0, *sizes])
    orders = [
        (order, words)
        for n in range(2, most + 1)
        if not any(size % n for size in sizes)
        for order, words in _fused(sizes, n)
    ]
    plain = np.arange(starts[-1])
    cuts = [(plain[starts[index] : starts[index + 1]], "")]
    for cut in list(permutations(range(3)))[1:]:
        start = sum(sizes[part] for part in cut[: cut.index(index)])
        cuts.append((plain[start : start + sizes[index]], f"cut in the order {', '.join('qkv'[part] for part in cut)}"))
    a: Array | None = None
    for (order, words), (rows, how) in [
        *product(orders, cuts[:1]),
        *product([(plain, "")], cuts[1:]),
        *product(orders, cuts[1:]),
    ]:
        picked = order[rows]
        if np.array_equal(picked, cuts[0][0]):
            continue
        a = np.concatenate(x) if a is None else a
        some = some_of(len(picked), 16)
        if same.near(a[picked[some]], y[some]) and same(a[picked], y):
            return Diagnosis("qkv_interleaved", f"q, k and v interleaved: {', '.join(filter(None, (words, how)))}")
    return None


def _fused(sizes: Sequence[int], n: int) -> Iterator[tuple[NDArray[np.intp], str]]:
    """The order of the rows of n blocks q|k|v, each way."""
    starts = np.cumsum([0, *sizes])
    fused = np.concatenate(
        [
            np.arange(start + r * size // n, start + (r + 1) * size // n)
            for r in range(n)
            for start, size in zip(starts, sizes, strict=False)
        ]
    )
    words = f"cut from {n} fused q|k|v blocks joined whole"
    yield fused, words
    yield np.argsort(fused), f"{words}, the other way round"


def listed(numbers: Sequence[int] | NDArray[np.intp], most: int = 8) -> str:
    """3, 5 or 0..7, short."""
    numbers = [int(n) for n in numbers]
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return ", ".join(map(str, numbers[:most])) + (f" and {len(numbers) - most} more" if len(numbers) > most else "")


def as_matrix(x: Array) -> Array:
    """A vector as a column; a matrix as it is."""
    return x.reshape(-1, 1) if x.ndim < 2 else x.reshape(x.shape[0], prod(x.shape[1:]))
