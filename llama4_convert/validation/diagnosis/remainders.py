"""What remains where no mistake explains a tensor: noise, coarse numbers, unrelated numbers. Pure, on arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llama4_convert.validation.diagnosis.tolerance import ROUNDING, Array, Diagnosis, floats, relative_error
from llama4_convert.validation.diagnosis.wrong_tensor import Region, WrongTensor

_FEW_NUMBERS = 16
_LOW_RANK_LINES = 256  # rows and columns whose change is decomposed
_FEWEST_OF_A_SCALE = 16  # numbers
_KNOWN_CODE = 0.1  # of a step that a number may be off
_BAND_NUMBERS = 1 << 20  # counted at a time: np.bincount widens them to 64 bits


def _to_e4m3(x: Array) -> Array:
    import torch

    rounded: Array = torch.from_numpy(np.ascontiguousarray(x)).clamp(-448, 448).to(torch.float8_e4m3fn).double().numpy()
    return rounded


_EIGHT_BITS: tuple[tuple[str, float, Callable[[Array], Array]], ...] = (
    ("float8_e4m3fn", 448.0, _to_e4m3),
    ("int8", 127.0, np.rint),
)


def near_or_unrelated(wrong: WrongTensor) -> Diagnosis | None:
    """What remains: noise on every number, or numbers of which none has to do with the reference's."""
    region = wrong.region
    places = region.numbers[0] != region.numbers[1]
    a, b = (numbers[places] for numbers in region.numbers)
    if region.size > 4 * a.size and 0 < a.size <= _FEW_NUMBERS:
        index = region.index(*np.argwhere(places)[0])
        words = f"overwritten: {a.size} number(s) are others; element {index} is {b[0]:.6g}, not {a[0]:.6g}"
        return Diagnosis("overwritten", words)
    if a.size and not a.any() and np.isfinite(b).all():
        return Diagnosis("unrelated", f"numbers where the reference has zeros{region.words}")
    if a.size < 64 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    error = relative_error(a, b)
    if error < 0.5:
        if found := _coarse(*region.numbers) or _eight_bits(region) or _low_rank(*region.numbers):
            return Diagnosis(found.kind, f"{found.cause} (a relative squared error of {error:.3g}){region.words}")
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
    step = max(1, _BAND_NUMBERS // max(1, region.x.shape[1]))
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
    x = (b - a)[:_LOW_RANK_LINES, :_LOW_RANK_LINES]
    if min(x.shape) < 32:
        return None
    power = np.square(np.linalg.svd(x, compute_uv=False))
    part = np.cumsum(power) / power.sum()
    rank = int(np.argmax(part > 0.99)) + 1
    if rank * 4 > min(x.shape):
        return None
    return Diagnosis("low_rank", f"a change of rank {rank} or so was added, as a merged adapter makes")
