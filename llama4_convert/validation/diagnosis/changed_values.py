"""Numbers that lie where they should and are others: flipped bits, zeros, factors, offsets, rounding. Pure, on arrays.

Looked at where anything differs (`Region`), so that what befell one head or one column is told of it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama4_convert.validation.diagnosis.moved_values import EXACT, Array, Diagnosis, Tolerance, listed, relative_error

Floats = NDArray[np.float32]
_FEW = 16
_SAMPLE = 512  # rows and columns that factors are looked for in
_ROWS, _COLUMNS = 512, 2048  # whose numbers are taken for calculations
_GLIMPSE = 32
_LOW_RANK = 256  # rows and columns whose change is decomposed
# Half a unit in the last place, of numbers near a power of two; and the bits of the fraction.
ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-24}
_MANTISSA = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52}
_FEWEST_OF_A_SCALE = 16
_KNOWN_CODE = 0.1  # of a step that a number may be off
_GROUPS = (32, 64, 128, 256)
_COUNTED = 1 << 20  # numbers at a time: np.bincount widens them to 64 bits


def floats(x: Array, dtype: str) -> Floats:
    """Raw bits as float32; numbers as they are."""
    from llama4.loading import to_tensor

    if x.dtype == np.float32:
        return x
    numbers: Floats = to_tensor(np.ascontiguousarray(x), dtype).float().numpy()
    return numbers


def _to_e4m3(x: Array) -> Array:
    import torch

    rounded: Array = torch.from_numpy(np.ascontiguousarray(x)).clamp(-448, 448).to(torch.float8_e4m3fn).double().numpy()
    return rounded


_EIGHT_BITS: tuple[tuple[str, float, Callable[[Any], Any]], ...] = (
    ("float8_e4m3fn", 448.0, _to_e4m3),
    ("int8", 127.0, np.rint),
)


@dataclass(frozen=True)
class Region:
    """The rows and the columns in which anything differs. x is the reference's and y what was found, bits or numbers."""

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    shape: tuple[int, int]  # of the whole
    dtype: str
    x: Array
    y: Array

    @staticmethod
    def of(x: Array, y: Array, dtype: str, same: Tolerance = EXACT) -> Region:
        if same.limit:
            error, power = np.square(y - x), np.square(x)
            rows, columns = (np.flatnonzero(~(error.sum(i) <= 2 * same.limit * power.sum(i))) for i in (1, 0))
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

    @cached_property
    def glimpse(self) -> Region:
        """Its first rows: what fails there need not be tried on the whole."""
        return replace(self, x=self.x[:_GLIMPSE], y=self.y[:_GLIMPSE], rows=self.rows[:_GLIMPSE])

    @cached_property
    def numbers(self) -> tuple[Array, Array]:
        """Of both, from no more than the first rows and columns, which stand for all."""
        x, y = (floats(one[:_ROWS, :_COLUMNS], self.dtype).astype(np.float64) for one in (self.x, self.y))
        return x, y


def _named(line: str, numbers: NDArray[np.intp]) -> str:
    return f"{line}{'s' if len(numbers) > 1 else ''} {listed(numbers)}"


def _cut(x: Array, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Array:
    x = x if len(rows) == x.shape[0] else x[rows]
    return x if len(columns) == x.shape[1] else x[:, columns]


def flipped_bits(region: Region) -> Diagnosis | None:
    """One bit of one element, a few bits of a few, or the same bit of many. Of raw bits."""
    count = int(np.count_nonzero(region.x != region.y))
    if not count:
        return None
    if count > _FEW:
        pairs = region.x ^ region.y
        highest = int(pairs.max())
        bit = highest.bit_length() - 1
        part = _part(bit, region)
        if highest.bit_count() > 1 or part == "sign" or int(np.count_nonzero(pairs == highest)) < count:
            return None
        return Diagnosis("flipped_bit", f"the same flipped bit, {bit} ({part}), in many elements{region.words}")
    places = np.argwhere(region.x != region.y)
    at = tuple(places.T)
    pairs = region.x[at] ^ region.y[at]
    flips = np.bitwise_count(pairs)
    bit = int(pairs[0]).bit_length() - 1
    row, column = places[0]
    index = [int(region.rows[row])] + ([int(region.columns[column])] if region.shape[1] > 1 else [])
    before, after = (
        float(floats(one[row : row + 1, column : column + 1], region.dtype)[0, 0]) for one in (region.x, region.y)
    )
    part = _part(bit, region)
    one = f"bit {bit} ({part}) of element {index}, {before:.6g} became {after:.6g}"
    if len(places) == 1 and flips[0] == 1:
        return Diagnosis("flipped_bit", f"one flipped bit: {one}")
    few = len(places) * 4 <= region.shape[0] * region.shape[1]
    if few and (flips == 1).all():
        return Diagnosis(
            "flipped_bit", f"{len(places)} flipped bits, one in each of as many elements; the first: {one}"
        )
    if few and len(places) <= 4 and (flips <= 2).all() and after:
        return Diagnosis(
            "flipped_bit", f"{int(flips.sum())} flipped bits in {len(places)} element(s); the first: {one}"
        )
    return None


def _part(bit: int, region: Region) -> str:
    if bit == 8 * region.x.itemsize - 1:
        return "sign"
    return "mantissa" if bit < _MANTISSA[region.dtype] else "exponent"


def constants(region: Region) -> Diagnosis | None:
    """Zeros, one value, NaN or infinities in the place of numbers."""
    if len(region.x) > _GLIMPSE and constants(region.glimpse) is None:
        return None
    wrong = region.x != region.y
    count = int(np.count_nonzero(wrong))
    values = region.y[wrong]
    if not count:
        return None
    if not (values == values[0]).all():
        numbers = floats(values, region.dtype)
        nan, infinite = int(np.count_nonzero(np.isnan(numbers))), int(np.count_nonzero(np.isinf(numbers)))
        if nan + infinite < count:
            return None
        kinds = " and ".join(f"{n:,} {word}" for n, word in ((nan, "NaN"), (infinite, "infinite")) if n)
        return Diagnosis("nonfinite", f"{kinds} where the reference is finite{region.words}")
    value = float(floats(values[:1], region.dtype)[0])
    if not np.isfinite(value):
        name = "NaN" if np.isnan(value) else "infinite"
        return Diagnosis("nonfinite", f"{count:,} {name} where the reference is finite{region.words}")
    size = region.shape[0] * region.shape[1]
    if value and count == 1 and size > 1:
        return None
    where = region.words or (" everywhere" if count * 2 > size else "")
    if value == 0:
        return Diagnosis("zeros", f"zeros{where}")
    return Diagnosis("constant", f"all one value, {value:.6g},{where or ' here and there'}")


def other_reading(region: Region) -> Diagnosis | None:
    """Bytes swapped, or bits taken for another dtype's. Of raw bits."""
    from llama4.loading import to_bits, to_tensor

    if len(region.x) > _GLIMPSE and other_reading(region.glimpse) is None:
        return None
    x, y, dtype = np.ascontiguousarray(region.x), region.y, region.dtype
    if np.array_equal(x.byteswap(), y):
        return Diagnosis("byte_swapped", "byte-swapped: its bytes are in the other order (big-endian)")
    if dtype in ("BF16", "F16"):
        import torch

        other = "F16" if dtype == "BF16" else "BF16"
        mine = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
        if np.array_equal(to_bits(to_tensor(x, other).to(mine)), y):
            return Diagnosis("reinterpreted", f"reinterpreted: {dtype} bits read as {other}")
    return None


def rounded(region: Region) -> Diagnosis | None:
    """Through a narrower dtype and back. Of raw bits."""
    import torch

    from llama4.loading import to_bits, to_tensor

    if len(region.x) > _GLIMPSE and rounded(region.glimpse) is None:
        return None
    x, y, dtype = np.ascontiguousarray(region.x), region.y, region.dtype
    source = to_tensor(x, dtype)
    for through, name in (
        (torch.float16, "float16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
        (torch.float8_e5m2, "float8_e5m2"),
    ):
        if through.itemsize <= source.dtype.itemsize and through != source.dtype:
            taken = source
            if through == torch.float8_e4m3fn:
                taken = source.clamp(-448, 448)
            if np.array_equal(to_bits(taken.to(through).to(source.dtype)), y):
                return Diagnosis("rounded", f"rounded: it went through a narrower dtype, {name}")
    if dtype == "F32":
        for keep, name in ((16, "bfloat16"), (13, "float16's mantissa")):
            if np.array_equal(x & np.uint32((0xFFFFFFFF << keep) & 0xFFFFFFFF), y):
                return Diagnosis("rounded", f"rounded: its lower bits are cut off, to {name}")
    return None


def recalculated(region: Region, same: Tolerance) -> Diagnosis | None:
    """Each number is the right one times a factor, plus a constant, or the like."""
    (a, b), words, dtype = region.numbers, region.words, region.dtype
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    if not same.limit and np.array_equal(np.abs(a), np.abs(b)):
        every = np.array_equal(a, -b)
        lost = (
            "every sign is the other" if every else "signs are lost" if (b >= 0).all() else "some signs are the other"
        )
        return Diagnosis("negated", f"negated: {lost}{words}")
    if not a.any() or a.size < 2:
        return None
    # What rounding can do to a product or a sum, of one number and of all together.
    unit = 2 * ROUNDING.get(dtype, 2.0**-8)
    small = 1e-38 if dtype != "F16" else 2.0**-24

    def is_(expected: Array) -> bool:
        if same.limit:
            return relative_error(expected, b) <= same.limit
        return bool((np.abs(expected - b) <= unit * np.maximum(np.abs(b), np.abs(expected)) + small).all())

    factor = float(np.vdot(a, b) / np.vdot(a, a))
    if factor and is_(a * factor) and abs(factor - 1) > unit / 4:
        if abs(factor + 1) < unit / 4 + 0.2 * bool(same.limit):
            return Diagnosis("negated", f"negated: every sign is the other{words}")
        return Diagnosis("scaled", f"scaled: all multiplied by {_short(factor)}{words}")
    offset = float(np.median(b - a))
    slack = unit * float(np.abs(a).max()) + small
    if abs(offset) > slack / 4 and is_(a + offset):
        return Diagnosis("offset", f"offset: {_short(abs(offset))} {'added' if offset > 0 else 'subtracted'}{words}")
    others: tuple[tuple[str, Callable[[Any], Any]], ...] = (
        ("1 / w", np.reciprocal), ("w squared", np.square), ("the root of |w|", lambda v: np.sqrt(np.abs(v))), ("exp w", np.exp),
        ("1 - w", lambda v: 1 - v),
    )  # fmt: skip
    with np.errstate(all="ignore"):
        for name, function in others:
            if is_(function(a)):
                return Diagnosis("transformed", f"it holds {name} in the place of w{words}")
    top = float(np.abs(b).max())
    if not same.limit and np.array_equal(np.clip(a, b.min(), b.max()), b):
        return Diagnosis("clipped", f"clipped to {_short(top)} and below{words}")
    return factors(a, b, unit, same, words)


def factors(a: Array, b: Array, unit: float, same: Tolerance, words: str) -> Diagnosis | None:
    """A factor for each row, each column, both, or each group of neighbours."""
    if 1 in a.shape:
        return None
    limit = same.limit or (unit / 2) ** 2  # six times what rounding does on the mean
    for name, axis in (("row", 1), ("column", 0)):
        gain = _gain(a, b, axis)
        if relative_error(b, a * gain) <= limit:
            return Diagnosis("scale", f"scale: each {name} is multiplied by a factor of its own, {_range(gain)}{words}")
    rows, columns = (_spread(n) for n in a.shape)
    some, found = a[np.ix_(rows, columns)], b[np.ix_(rows, columns)]
    with np.errstate(all="ignore"):
        ratio = np.log(np.abs(found / some))
        usable = np.isfinite(ratio)
        ratio = np.where(usable, ratio, 0)
        down = ratio.sum(1, keepdims=True) / np.maximum(usable.sum(1, keepdims=True), 1)
        across = (ratio - down).sum(0, keepdims=True) / np.maximum(usable.sum(0, keepdims=True), 1)
    sign = np.sign(np.vdot(some, found))
    if relative_error(found, some * np.exp(down + across) * sign) <= limit:
        said = f"rows by {_range(np.exp(down))}, columns by {_range(np.exp(across))} of the mean"
        return Diagnosis(
            "scale_axis", f"scale on the wrong axis: each row and each column has a factor of its own ({said}){words}"
        )
    for turned, name in ((False, "inputs"), (True, "outputs")):
        x, y = (a.T, b.T) if turned else (a, b)
        for size in _GROUPS:
            if x.shape[1] % size == 0 and x.shape[1] > size:
                gain = np.repeat(group_gain(x, y, size), size, axis=1)
                if relative_error(y, x * gain) <= limit:
                    words_of = f"each group of {size} {name} is multiplied by a factor of its own"
                    return Diagnosis("scale", f"scale: {words_of}, {_range(gain)}{words}")
    return None


def _gain(a: Array, b: Array, axis: int) -> Array:
    """Factors that bring a nearest to b, along one axis."""
    gain: Array = (a * b).sum(axis, keepdims=True) / np.maximum(np.square(a).sum(axis, keepdims=True), 1e-30)
    return gain


def group_gain(a: Array, b: Array, size: int) -> Array:
    """Factors that bring each group of `size` neighbours of a row of a nearest to b's, [rows, groups]."""
    shape = (a.shape[0], a.shape[1] // size, size)
    x, y = a.reshape(shape), b.reshape(shape)
    gain: Array = np.einsum("ngk,ngk->ng", x, y) / np.maximum(np.einsum("ngk,ngk->ng", x, x), 1e-30)
    return gain


def near_or_unrelated(region: Region) -> Diagnosis | None:
    """What remains: noise on every number, or numbers of which none has to do with the reference's."""
    wrong = region.numbers[0] != region.numbers[1]
    a, b = (numbers[wrong] for numbers in region.numbers)
    if region.shape[0] * region.shape[1] > 4 * a.size and 0 < a.size <= _FEW:
        row, column = np.argwhere(wrong)[0]
        index = [int(region.rows[row])] + ([int(region.columns[column])] if region.shape[1] > 1 else [])
        words = f"overwritten: {a.size} number(s) are others; element {index} is {b[0]:.6g}, not {a[0]:.6g}"
        return Diagnosis("overwritten", words)
    if a.size and not a.any() and np.isfinite(b).all():
        return Diagnosis("unrelated", f"numbers where the reference has zeros{region.words}")
    if a.size < 64 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    error = relative_error(a, b)
    if error < 0.5 and (told := _coarse(*region.numbers) or _eight_bits(region) or _low_rank(*region.numbers)):
        return Diagnosis(told.kind, f"{told.cause} (a relative squared error of {error:.3g}){region.words}")
    if error < 0.5:
        return Diagnosis("noise", f"noise on the right numbers: a relative squared error of {error:.3g}{region.words}")
    x, y = a - a.mean(), b - b.mean()
    power = float(np.vdot(x, x)) * float(np.vdot(y, y))
    correlation = float(np.vdot(x, y)) / power**0.5 if power else 0.0
    if abs(correlation) < 4 / a.size**0.5 + 0.02:
        if _same_numbers(region):
            return Diagnosis(
                "permuted", f"permuted: the same numbers in an order that fits no mistake known here{region.words}"
            )
        words = f"unrelated numbers (correlation {correlation:.2g}, {b.std() / max(float(a.std()), 1e-30):.2g} times as large)"
        return Diagnosis("unrelated", f"{words}{region.words}: never written, or overwritten")
    return None


def _same_numbers(region: Region) -> bool:
    """Whether each number stands there as often as it should."""
    if region.x.dtype != np.uint16:
        return region.x.size < 1 << 24 and np.array_equal(np.sort(region.x, None), np.sort(region.y, None))
    step = max(1, _COUNTED // max(1, region.x.shape[1]))
    counts = np.zeros(1 << 16, np.intp)
    for start in range(0, len(region.x), step):
        for one, sign in ((region.x, 1), (region.y, -1)):
            counts += sign * np.bincount(one[start : start + step].ravel(), minlength=1 << 16)
    return not counts.any()


def _coarse(a: Array, b: Array) -> Diagnosis | None:
    """Only a few values in each row."""
    values = [(len(np.unique(x)), len(np.unique(y))) for x, y in zip(a[:8], b[:8], strict=True)]
    most = max(found for _, found in values)
    if most > 32 or any(found * 3 > known for known, found in values):
        return None
    return Diagnosis("rounded", f"rounded: no more than {most} different numbers in a row, as after a quantization")


def _eight_bits(region: Region) -> Diagnosis | None:
    """What a scale and codes of 8 bits can make, the scale the largest number's. Of raw bits."""
    if region.y.dtype.kind != "u":
        return None
    unit, sign = ROUNDING[region.dtype], 1 << (8 * region.y.itemsize - 1)
    magnitudes = region.y & region.y.dtype.type(sign - 1)  # in the order of the numbers that they are
    for name, axis, some in (("row", 1, np.s_[:16]), ("column", 0, np.s_[:, :16]), ("tensor", None, np.s_[:16])):
        largest = floats(magnitudes.max(axis, keepdims=True), region.dtype).astype(np.float64)
        top = largest if axis is None else largest[some]
        x, y = (
            floats(np.ascontiguousarray(one[some]), region.dtype).astype(np.float64) for one in (region.x, region.y)
        )
        if y.size < _FEWEST_OF_A_SCALE * top.size or not (top.all() and np.isfinite(top).all()):
            continue
        for codes, most, rounding in _EIGHT_BITS:
            a, b = x / top * most, y / top * most
            # Only codes that rounding to the dtype keeps apart tell anything.
            known = np.abs(b) * unit < _KNOWN_CODE if codes == "int8" else b != 0
            near = 2 * unit * np.abs(b) + 1e-4
            off = [np.count_nonzero((np.abs(one - rounding(one)) > near)[known]) for one in (a, b)]
            if np.count_nonzero(known) * 8 > b.size and off[1] == 0 and off[0] * 2 > np.count_nonzero(known):
                return Diagnosis("rounded", f"rounded: to {codes} with a scale for each {name}, and back")
    return None


def _low_rank(a: Array, b: Array) -> Diagnosis | None:
    """What was added has far fewer dimensions than the matrix, as a merged adapter."""
    x = (b - a)[:_LOW_RANK, :_LOW_RANK]
    if min(x.shape) < 32:
        return None
    power = np.square(np.linalg.svd(x, compute_uv=False))
    part = np.cumsum(power) / power.sum()
    rank = int(np.argmax(part > 0.99)) + 1
    if rank * 4 > min(x.shape):
        return None
    return Diagnosis("low_rank", f"a change of rank {rank} or so was added, as a merged adapter makes")


def _spread(n: int) -> NDArray[np.intp]:
    return np.unique(np.linspace(0, n - 1, min(n, _SAMPLE)).astype(np.intp))


def _range(values: Array) -> str:
    return f"{_short(float(values.min()))} to {_short(float(values.max()))}"


def _short(value: float) -> str:
    return f"{value:.4g}"
