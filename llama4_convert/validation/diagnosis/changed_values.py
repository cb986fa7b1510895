"""Numbers that lie where they should and are others: flipped bits, zeros, factors, offsets, rounding. Pure, on arrays.

Tried where anything differs (`Region`), so that a fault of one head or one column is reported for it alone. Mistakes that are
functions of a number are rows of two tables: `_of_bits`, and `_expected_values` with `_OF_VALUE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from llama4_convert.validation.diagnosis.tolerance import ROUNDING, Array, Diagnosis, floats, relative_error
from llama4_convert.validation.diagnosis.wrong_tensor import Region, WrongTensor

if TYPE_CHECKING:
    from torch import Tensor

_FEW_NUMBERS = 16
_SAMPLE_LINES = 512  # rows and columns that factors are looked for in
_MANTISSA_BITS = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52}
_GROUP_SIZES = (32, 64, 128, 256)


def flipped_bits(wrong: WrongTensor) -> Diagnosis | None:
    """One bit of one element, a few bits of a few, or the same bit of many. Of raw bits."""
    region = wrong.region
    count = int(np.count_nonzero(region.x != region.y))
    if not count:
        return None
    if count > _FEW_NUMBERS:
        flips = region.x ^ region.y
        highest = int(flips.max())
        bit = highest.bit_length() - 1
        part = _part_of_number(bit, region)
        if highest.bit_count() > 1 or part == "sign" or int(np.count_nonzero(flips == highest)) < count:
            return None
        return Diagnosis("flipped_bit", f"the same flipped bit, {bit} ({part}), in many elements{region.words}")
    places = np.argwhere(region.x != region.y)
    flips = (region.x ^ region.y)[tuple(places.T)]
    counts, bit = np.bitwise_count(flips), int(flips[0]).bit_length() - 1
    before, after = (float(floats(one[tuple(places[:1].T)], region.dtype)[0]) for one in (region.x, region.y))
    first = f"bit {bit} ({_part_of_number(bit, region)}) of element {region.index(*places[0])}, {before:.6g} became {after:.6g}"
    if count == 1 and counts[0] == 1:
        return Diagnosis("flipped_bit", f"one flipped bit: {first}")
    if count * 4 > region.size:
        return None
    if (counts == 1).all():
        words = f"{count} flipped bits, one in each of as many elements"
    elif count <= 4 and (counts <= 2).all() and after:
        words = f"{int(counts.sum())} flipped bits in {count} element(s)"
    else:
        return None
    return Diagnosis("flipped_bit", f"{words}; the first: {first}")


def _part_of_number(bit: int, region: Region) -> str:
    if bit == 8 * region.x.itemsize - 1:
        return "sign"
    return "mantissa" if bit < _MANTISSA_BITS[region.dtype] else "exponent"


def constant(wrong: WrongTensor) -> Diagnosis | None:
    """One value, NaN or infinities in the place of all numbers."""
    region = wrong.region
    return constant_somewhere(wrong) if region.x.size and (not region.words or not wrong.y.any()) else None


def constant_somewhere(wrong: WrongTensor) -> Diagnosis | None:
    region = wrong.region
    return _constant(region) if region.glimpse is region or _constant(region.glimpse) else None


def _constant(region: Region) -> Diagnosis | None:
    values = region.y[region.x != region.y]
    if not len(values):
        return None
    if (values == values[0]).all():
        value = float(floats(values[:1], region.dtype)[0])
        nan, infinite = (len(values) * bool(is_one(value)) for is_one in (np.isnan, np.isinf))
    else:
        numbers = floats(values, region.dtype)
        nan, infinite = (int(np.count_nonzero(is_one(numbers))) for is_one in (np.isnan, np.isinf))
        if nan + infinite < len(values):
            return None
    if nan + infinite:
        kinds = " and ".join(f"{n:,} {word}" for n, word in ((nan, "NaN"), (infinite, "infinite")) if n)
        return Diagnosis("nonfinite", f"{kinds} where the reference is finite{region.words}")
    if value and len(values) == 1 and region.size > 1:
        return None
    where = region.words or (" everywhere" if len(values) * 2 > region.size else "")
    if value == 0:
        return Diagnosis("zeros", f"zeros{where}")
    return Diagnosis("constant", f"all one value, {value:.6g},{where or ' here and there'}")


# -------------------- functions of a number's bits


def _of_bits(bits: Array, dtype: str) -> Iterator[tuple[str, str, Tensor]]:
    """The kind, the cause, and what the tensor would be."""
    import torch

    from llama4.loading import to_tensor

    w = to_tensor(bits, dtype)
    yield (
        "byte_swapped",
        "byte-swapped: its bytes are in the other order (big-endian)",
        to_tensor(bits.byteswap(), dtype),
    )
    if w.dtype == torch.bfloat16:
        yield "reinterpreted", "reinterpreted: BF16 bits read as F16", w.view(torch.float16).to(w.dtype)
    if w.dtype == torch.float16:
        yield "reinterpreted", "reinterpreted: F16 bits read as BF16", w.view(torch.bfloat16).to(w.dtype)
    for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        narrow = getattr(torch, name)
        if narrow.itemsize <= w.dtype.itemsize and narrow != w.dtype:
            numbers = w.clamp(-448, 448) if name == "float8_e4m3fn" else w
            yield "rounded", f"rounded: it went through a narrower dtype, {name}", numbers.to(narrow).to(w.dtype)
    if w.dtype == torch.float32:
        for n_bits, name in ((16, "bfloat16"), (13, "float16's mantissa")):
            cut = (w.view(torch.int32) & -(1 << n_bits)).view(w.dtype)
            yield "rounded", f"rounded: its lower bits are cut off, to {name}", cut


def changed_bits(wrong: WrongTensor) -> Diagnosis | None:
    """Bytes swapped, bits taken for another dtype's, or rounded through a narrower one. Of raw bits."""
    region = wrong.region
    found = _bits_that_make(region.glimpse)
    return found if region.glimpse is region or found is None else _bits_that_make(region)


def _bits_that_make(region: Region) -> Diagnosis | None:
    from llama4.loading import to_bits

    for kind, cause, expected in _of_bits(np.ascontiguousarray(region.x), region.dtype):
        if np.array_equal(to_bits(expected), region.y):
            return Diagnosis(kind, cause)
    return None


# -------------------- functions of a number's value

_OF_VALUE: tuple[tuple[str, Callable[[Array], Array]], ...] = (
    ("1 / w", np.reciprocal),
    ("w squared", np.square),
    ("the root of |w|", lambda w: np.sqrt(np.abs(w))),
    ("exp w", np.exp),
    ("1 - w", lambda w: 1 - w),
)


def recalculated(wrong: WrongTensor) -> Diagnosis | None:
    """Each number is the right one times a factor, plus a constant, or the like."""
    (a, b), is_lossy = wrong.region.numbers, bool(wrong.tolerance.limit)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    if not is_lossy and np.array_equal(np.abs(a), np.abs(b)):
        how = "signs are lost" if (b >= 0).all() else "some signs are the other"
        found: Diagnosis | None = Diagnosis(
            "negated", f"negated: {'every sign is the other' if np.array_equal(a, -b) else how}"
        )
    elif not a.any() or a.size < 2:
        return None
    else:
        # What rounding can do to a product or a sum.
        unit = 2 * ROUNDING.get(wrong.dtype, 2.0**-8)
        found = _function_of_value(a, b, unit, wrong) or _factors(a, b, wrong.tolerance.limit or (unit / 2) ** 2)
    return Diagnosis(found.kind, f"{found.cause}{wrong.region.words}") if found else None


def _function_of_value(a: Array, b: Array, unit: float, wrong: WrongTensor) -> Diagnosis | None:
    smallest, limit = 2.0**-24 if wrong.dtype == "F16" else 1e-38, wrong.tolerance.limit
    with np.errstate(all="ignore"):
        for kind, cause, expected in _expected_values(a, b, unit, smallest, is_lossy=limit > 0):
            if limit:
                is_made = relative_error(expected, b) <= limit
            else:
                rounding = unit * np.maximum(np.abs(b), np.abs(expected)) + smallest
                is_made = bool((np.abs(expected - b) <= rounding).all())
            if is_made:
                return Diagnosis(kind, cause)
    if not limit and np.array_equal(np.clip(a, b.min(), b.max()), b):
        return Diagnosis("clipped", f"clipped to {_short(np.abs(b).max())} and below")
    return None


def _expected_values(
    a: Array, b: Array, unit: float, smallest: float, is_lossy: bool
) -> Iterator[tuple[str, str, Array]]:
    """The kind, the cause, and what b would be."""
    factor = float(np.vdot(a, b) / np.vdot(a, a))
    if abs(factor + 1) < unit / 4 + 0.2 * is_lossy:
        yield "negated", "negated: every sign is the other", a * factor
    elif factor and abs(factor - 1) > unit / 4:
        yield "scaled", f"scaled: all multiplied by {_short(factor)}", a * factor
    offset = float(np.median(b - a))
    if abs(offset) > (unit * float(np.abs(a).max()) + smallest) / 4:
        yield "offset", f"offset: {_short(abs(offset))} {'added' if offset > 0 else 'subtracted'}", a + offset
    for name, function in _OF_VALUE:
        yield "transformed", f"it holds {name} in the place of w", function(a)


def _factors(a: Array, b: Array, limit: float) -> Diagnosis | None:
    """A factor for each row, each column, both, or each group of neighbours."""
    if 1 in a.shape:
        return None
    for name, axis in (("row", 1), ("column", 0)):
        gain = (a * b).sum(axis, keepdims=True) / np.maximum(np.square(a).sum(axis, keepdims=True), 1e-30)
        if relative_error(b, a * gain) <= limit:
            return Diagnosis("scale", f"scale: each {name} is multiplied by a factor of its own, {_range(gain)}")
    some = np.ix_(*(np.unique(np.linspace(0, n - 1, min(n, _SAMPLE_LINES)).astype(np.intp)) for n in a.shape))
    x, y = a[some], b[some]
    with np.errstate(all="ignore"):
        ratio = np.log(np.abs(y / x))
        usable = np.isfinite(ratio)
        ratio = np.where(usable, ratio, 0)
        down = ratio.sum(1, keepdims=True) / np.maximum(usable.sum(1, keepdims=True), 1)
        across = (ratio - down).sum(0, keepdims=True) / np.maximum(usable.sum(0, keepdims=True), 1)
    down, across = np.exp(down), np.exp(across)
    if relative_error(y, x * down * across * np.sign(np.vdot(x, y))) <= limit:
        ranges = f"rows by {_range(down)}, columns by {_range(across)} of the mean"
        words = f"each row and each column has a factor of its own ({ranges})"
        return Diagnosis("scale_axis", f"scale on the wrong axis: {words}")
    for name, x, y in (("inputs", a, b), ("outputs", a.T, b.T)):
        for size in _GROUP_SIZES:
            if x.shape[1] % size == 0 and x.shape[1] > size:
                gain = np.repeat(group_gain(x, y, size), size, axis=1)
                if relative_error(y, x * gain) <= limit:
                    words = f"each group of {size} {name} is multiplied by a factor of its own, {_range(gain)}"
                    return Diagnosis("scale", f"scale: {words}")
    return None


def group_gain(a: Array, b: Array, size: int) -> Array:
    """Factors that bring each group of `size` neighbours of a row of a nearest to b's, [rows, groups]."""
    shape = (a.shape[0], a.shape[1] // size, size)
    x, y = a.reshape(shape), b.reshape(shape)
    gain: Array = np.einsum("ngk,ngk->ng", x, y) / np.maximum(np.einsum("ngk,ngk->ng", x, x), 1e-30)
    return gain


def _range(values: Array) -> str:
    return f"{_short(values.min())} to {_short(values.max())}"


def _short(value: float) -> str:
    return f"{value:.4g}"
