"""Numbers that are all there and lie elsewhere: transposed, joined on the wrong axis, permuted, shifted. Pure, on arrays.

Mistakes that permute indices are rows of tables, tried by one matcher (`find_move`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product
from math import isqrt, prod

import numpy as np
from numpy.typing import NDArray

from llama4_convert.validation.diagnosis.tolerance import Array, Diagnosis, Tolerance, some_of
from llama4_convert.validation.diagnosis.wrong_tensor import WrongTensor
from mappings.layout import Layout

_SAMPLE_NUMBERS = 512  # that a row is tried on before it is tried on the whole
MAX_PARTS = 64


@dataclass(frozen=True)
class Move:
    """A mistake that permutes indices, as a pattern of the mapping tables: how a matrix should lie -> how it lies.

    `R` and `C` are its rows and columns, and `n` is tried from 2 on. Axes with longer names have a size where the tensor has one
    (`WrongTensor.sizes`): elsewhere the row is not tried. The size of one more axis is inferred. `-axis` lies in reverse order.
    Numbers are read in the order on the right, whatever shape they then have in the candidate.
    """

    pattern: str
    kind: str
    cause: str  # with the sizes of axes, and `rows` or `columns`, which are exchanged where the matrix is turned
    in_its_shape: str = (
        ""  # the cause where the candidate has the shape on the right, too; without it such a shape is not tried
    )
    of_matrices: bool = False  # not of vectors; tried on [out, in] and on [in, out], in which experts lie
    inferred_from: int = 2  # the smallest size of the axis that is inferred
    max_n: int | None = MAX_PARTS

    @cached_property
    def axes(self) -> tuple[str, ...]:
        return tuple(re.findall(r"\w+", self.pattern.partition("->")[0]))

    @cached_property
    def target(self) -> Layout:
        return Layout.parse(self.pattern.partition("->")[2].replace("-", ""), {"matrix": self.axes})

    @cached_property
    def order(self) -> list[int]:
        """The axes of the target, by their place in the source."""
        return [self.axes.index(axis) for dim in self.target.dims for axis in dim]

    @cached_property
    def reversed_axes(self) -> tuple[int, ...]:
        return tuple(self.axes.index(axis) for axis in re.findall(r"-(\w+)", self.pattern.partition("->")[2]))

    def split(self, known: Mapping[str, int], numbers: int) -> list[int] | None:
        """The size of each axis of a matrix of so many numbers; None if they do not make it up."""
        split = [known.get(axis, 0) for axis in self.axes]
        rest, remainder = divmod(numbers, prod(size for size in split if size) or 1)
        if remainder or split.count(0) != 1:
            return split if split.count(0) == 0 and (rest, remainder) == (1, 0) else None
        return [size or rest for size in split] if rest >= self.inferred_from else None

    def __call__(self, x: Array, split: Sequence[int]) -> Array:
        moved: Array = np.flip(x.reshape(split), self.reversed_axes).transpose(self.order)
        return moved

    def sources(self, places: NDArray[np.intp], split: Sequence[int]) -> NDArray[np.intp]:
        """Where the numbers at these flat places of the target come from."""
        index = np.unravel_index(places, [split[axis] for axis in self.order])
        of_axis = [index[self.order.index(axis)] for axis in range(len(split))]
        for axis in self.reversed_axes:
            of_axis[axis] = split[axis] - 1 - of_axis[axis]
        return np.ravel_multi_index(of_axis, split)

    def has_shape(self, shape: tuple[int, ...], split: Sequence[int]) -> bool:
        """Whether the target has this shape."""
        sizes = dict(zip(self.axes, split, strict=True))
        return self.target.shape({"matrix": sizes}) == shape


_RANKS, _ROPE = "ranks joined on the wrong axis:", "permuted for the other RoPE form: rows are in the order of"
_HALVES, _PAIRS = (
    f"{_ROPE} half-rotation (rotate_half) where pairs are interleaved",
    f"{_ROPE} interleaved pairs, as if it came from half-rotation (rotate_half)",
)
_HEADS = ", with heads of {twice_n} rows where there should be {head_dim}"
_PIXELS, _GATE_UP = ", in the order of pixel shuffle", "gate and up interleaved:"
_FUSED = f"{_GATE_UP} in blocks, as the fused tensors of {{n}} ranks joined whole"
# fmt: off
TRANSPOSED = (
    Move("R C -> C R", "transposed", "its numbers lie transposed under the unchanged shape", "transposed", of_matrices=True),
)
# Blocks of columns that lie behind one another, and the reverse.
RANKS = (
    Move("R (n c) -> (n R) c", "wrong_axis",
         f"{_RANKS} {{n}} parts that share the {{columns}} lie behind one another as if they shared the other axis",
         of_matrices=True),
    Move("(n R) c -> R (n c)", "wrong_axis",
         f"{_RANKS} {{n}} parts that lie behind one another are joined along the {{columns}}", of_matrices=True),
)
ALTERNATING_RANKS = (
    Move("(heads r) C -> r (heads C)", "wrong_axis",
         f"{_RANKS} {{heads}} blocks of {{rows}} are joined side by side, and alternate, as when the number of heads"
         " and their size are exchanged", of_matrices=True),
    Move("(n r) C -> r (n C)", "wrong_axis", f"{_RANKS} {{n}} blocks of {{rows}} are joined side by side, and alternate",
         f"{_RANKS} {{n}} blocks of {{rows}} lie along the other axis", of_matrices=True),
)
# One half-rotated head is also two ranks that are joined on the wrong axis, which is likelier.
ROPE = (
    Move("(h pairs two) C -> (h two pairs) C", "rope_permuted", _HALVES, inferred_from=1),
    Move("(h two pairs) C -> (h pairs two) C", "rope_permuted", _PAIRS),
)
ROPE_OF_OTHER_HEADS = (
    Move("(h n two) C -> (h two n) C", "rope_permuted", _HALVES + _HEADS, inferred_from=1, max_n=None),
    Move("(h two n) C -> (h n two) C", "rope_permuted", _PAIRS + _HEADS, max_n=None),
)
# The patch embedding, whose columns are one colour after the other; and the first matrix behind pixel shuffle.
PICTURE = (
    Move("R (rgb high wide) -> R (high wide rgb)", "columns_permuted",
         "columns permuted: colours last, as pictures lie in memory"),
    Move("R (high wide rgb) -> R (rgb high wide)", "columns_permuted",
         "columns permuted: taken for colours last, which they are not"),
    Move("R (rgb high wide) -> R (rgb wide high)", "columns_permuted", "columns permuted: height and width exchanged"),
    Move("R (rgb high wide) -> R (wide high rgb)", "columns_permuted", "columns permuted: width first and colours last"),
    Move("R (rgb high wide) -> R (-rgb high wide)", "columns_permuted",
         "columns permuted: blue, green, red for red, green, blue"),
    Move("R (pixels c) -> R (c pixels)", "columns_permuted",
         f"columns permuted: channel by channel where they should lie pixel by pixel{_PIXELS}"),
    Move("R (c pixels) -> R (pixels c)", "columns_permuted",
         f"columns permuted: taken for channel by channel, which they are not{_PIXELS}"),
)
# A gate projection upon an up projection.
GATE_AND_UP = (
    Move("(two f) C -> (-two f) C", "gate_up_swapped", "gate and up swapped: each holds the other's numbers"),
    Move("(two f) C -> (f two) C", "gate_up_interleaved", f"{_GATE_UP} column by column where they should lie side by side"),
    Move("(f two) C -> (two f) C", "gate_up_interleaved",
         f"{_GATE_UP} taken apart column by column where they lay side by side"),
    Move("(two n f) C -> (n two f) C", "gate_up_interleaved", _FUSED),
    Move("(n two f) C -> (two n f) C", "gate_up_interleaved", f"{_FUSED}, the other way round"),
)
_GRID = (Move("(high wide) C -> (wide high) C", "rows_permuted", "rows permuted: the picture's height and width exchanged"),)
# fmt: on


def find_move(
    tables: Sequence[Sequence[Move]],
    x: Array,
    y: Array,
    tolerance: Tolerance,
    sizes: Mapping[str, int] | None = None,
    heads: tuple[int, int] = (0, 0),
) -> Diagnosis | None:
    """The first row that makes y of x. `heads`: how many share the rows, and the columns."""
    if x.size != y.size or 0 in x.shape:
        return None
    places = some_of(x.size, _SAMPLE_NUMBERS)
    for table, is_turned in product(tables, (False, True)):
        rows = [row for row in table if (1 not in x.shape if row.of_matrices else not is_turned)]
        a, b = (x.T, y.T) if is_turned else (x, y)
        n_heads = heads[is_turned] if heads[is_turned] > 1 else 0
        known = {"R": len(a), "C": a.shape[1], "two": 2, "rgb": 3, "heads": n_heads, **(sizes or {})}
        lines = {"rows": "columns", "columns": "rows"} if is_turned else {"rows": "rows", "columns": "columns"}
        sample = _at(b, places)
        for n, row in _tries(rows, max(a.shape), any_n=a.shape != b.shape):
            split = row.split({**known, "n": n}, x.size)
            if split is None:
                continue
            in_its_shape = bool(row.in_its_shape) and row.has_shape(b.shape, split)
            if not in_its_shape and a.shape != b.shape:
                continue
            if tolerance.near(_at(a, row.sources(places, split)), sample) and tolerance(
                row(a, split).reshape(b.shape), b
            ):
                cause = row.in_its_shape if in_its_shape else row.cause
                return Diagnosis(row.kind, cause.format(**{**known, "n": n, "twice_n": 2 * n}, **lines))
    return None


def _tries(rows: Sequence[Move], longest: int, any_n: bool) -> Iterator[tuple[int, Move]]:
    """Every row that has no n, then those that have with one n after the other."""
    yield from ((1, row) for row in rows if "n" not in row.axes)
    rows = [row for row in rows if "n" in row.axes]
    for n in range(2, longest + 1 if rows else 0):
        yield from ((n, row) for row in rows if any_n or row.max_n is None or n <= row.max_n)


def _at(x: Array, places: NDArray[np.intp]) -> Array:
    """Numbers at flat places, without a copy of a matrix that is not contiguous."""
    picked: Array = x[np.unravel_index(places, x.shape)]
    return picked


def moved(wrong: WrongTensor) -> Diagnosis | None:
    """Transposed, in the order of the other RoPE form, or in another order of colours or pixels."""
    if wrong.thin is not None:
        # The first row of a sliced matrix decides: it holds the beginning of the first column.
        n = min(wrong.y.shape[1], len(wrong.x))
        if n > 1 and np.array_equal(wrong.y[0, :n], wrong.x[:n, 0]):
            return Diagnosis("transposed", "its numbers lie transposed under the unchanged shape")
        return None
    of_q_or_k = bool(re.search(r"attention\.[qk]|w[qk]\.", wrong.name))
    tables = [TRANSPOSED, ROPE, *([ROPE_OF_OTHER_HEADS] if of_q_or_k else []), PICTURE]
    found = find_move(tables, wrong.x, wrong.y, wrong.tolerance, wrong.sizes)
    if found is None and wrong.name == "vision.position_embedding":
        found = _positions_permuted(wrong.x, wrong.y, wrong.tolerance)
    return found


def _positions_permuted(x: Array, y: Array, tolerance: Tolerance) -> Diagnosis | None:
    """A position embedding [patches + 1, D], row by row of the picture, whose last is the class token's."""
    if tolerance(np.roll(x, 1, 0), y):
        return Diagnosis("shifted", "rows shifted by 1: the class token comes first, and should come last")
    side = isqrt(len(x) - 1)
    if side * side != len(x) - 1 or not tolerance(x[-1:], y[-1:]):
        return None
    return find_move([_GRID], x[:-1], y[:-1], tolerance, {"high": side, "wide": side})


def wrong_axis(wrong: WrongTensor) -> Diagnosis | None:
    """Ranks' parts joined on the axis that they do not share. Heads whose number and size are exchanged are as many ranks."""
    heads = wrong.axes[0].heads, wrong.axes[1].heads
    return find_move([RANKS, ALTERNATING_RANKS], *wrong.lines, wrong.tolerance, heads=heads)


def shifted(wrong: WrongTensor) -> Diagnosis | None:
    """All numbers a constant number of elements, or bytes, away: a wrong offset. Of raw bits."""
    found = _shift(wrong.x, wrong.y, "rows")
    lies_turned = ".experts." in wrong.name or wrong.name.endswith("router")
    if found is None and lies_turned and 1 not in wrong.x.shape:
        found = _shift(wrong.x.T, wrong.y.T, "columns")
    return found


def _shift(x: Array, y: Array, lines: str) -> Diagnosis | None:
    source, found = x.tobytes(), y.tobytes()
    size, item, row = len(source), x.itemsize, x.itemsize * x.shape[1]
    begin = int((np.frombuffer(source, np.uint8) != np.frombuffer(found, np.uint8)).argmax())
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
            steps = f"{abs(shift):,} bytes" if shift % item else f"{abs(shift) // item:,} elements"
            if shift % row == 0 and x.shape[1] > 1:
                steps = f"{abs(shift) // row:,} {lines} ({steps})"
            start = "" if begin < max(item, -shift + item) else f", from element {begin // item:,} on"
            way = "towards the front" if shift > 0 else "towards the end"
            return Diagnosis(
                "shifted", f"shifted by {steps} {way}{start}: its data offset is wrong or part of it is lost"
            )
    return None


def cut_from_qkv(parts: Sequence[Array], y: Array, index: int, most: int) -> Diagnosis | None:
    """Whether y, in the place of the `index`-th of matrices [q, k, v], was cut from ranks' (or KV heads') fused blocks q|k|v that
    were joined whole, or was cut in another order. `most`: blocks that are tried. Of raw bits.
    """
    if len({part.shape[1:] for part in parts}) > 1:  # of a damaged reference, as `diff` may have one
        return None
    sizes = [len(part) for part in parts]
    plain = np.arange(sum(sizes))
    orders = [(plain, "")]
    for n in range(2, most + 1):
        if not any(size % n for size in sizes):
            starts = np.cumsum([0, *sizes])
            pieces = [np.split(plain[start : start + size], n) for start, size in zip(starts, sizes, strict=False)]
            fused = np.concatenate([piece for rank in zip(*pieces, strict=True) for piece in rank])
            words = f"cut from {n} fused q|k|v blocks joined whole"
            orders += [(fused, words), (np.argsort(fused), f"{words}, the other way round")]
    cuts = []
    for order in permutations(range(3)):
        start = sum(sizes[part] for part in order[: order.index(index)])
        words = "" if order == (0, 1, 2) else f"cut in the order {', '.join('qkv'[part] for part in order)}"
        cuts.append((slice(start, start + sizes[index]), words))
    right = plain[cuts[0][0]]
    # One mistake before two.
    tries = [*product(orders, cuts[:1]), *product(orders[:1], cuts[1:]), *product(orders[1:], cuts[1:])]
    whole = np.concatenate(parts)
    for (order, words), (cut, how) in tries:
        rows = order[cut]
        some = some_of(len(rows), 16)
        if (
            not np.array_equal(rows, right)
            and np.array_equal(whole[rows[some]], y[some])
            and np.array_equal(whole[rows], y)
        ):
            return Diagnosis("qkv_interleaved", f"q, k and v interleaved: {', '.join(filter(None, (words, how)))}")
    return None
