"""How a quantized matrix is wrong: scales that are not its codes', codes that are packed in another way. Pure, on arrays.

What a whole matrix may lose hides wrong scales and single wrong codes: `suspicion` looks for these in the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from llama4_convert.checkpoints.quantized import QuantizedMatrix, QuantizedReader
from llama4_convert.checkpoints.readers import DirectoryReader
from llama4_convert.validation.diagnosis.block_order import describe, find_blocks
from llama4_convert.validation.diagnosis.changed_values import group_gain
from llama4_convert.validation.diagnosis.moved_values import Move, find_move
from llama4_convert.validation.diagnosis.tolerance import (
    Array,
    Diagnosis,
    Floats,
    Tolerance,
    divisors,
    floats,
    listed,
    relative_error,
    some_of,
)
from llama4_convert.validation.diagnosis.wrong_tensor import Axis

_SCALES = Tolerance(0.003)  # the ratio of a group is known to some percent, by the rounding of its codes
# Orders of the eight codes in a word that other packers use.
_WORDS = tuple(
    Move(f"R ({source}) -> R ({target})", "packing", f"packing: the codes lie {words}")
    for source, target, words in (
        ("word four two", "word -four -two", "in the reverse order"),
        ("word four two", "word two four", "in AWQ's order"),
        ("word two four", "word four two", "in AWQ's order"),
        ("word four two", "word four -two", "with the halves of each byte exchanged"),
        ("word four two", "word -four two", "with the bytes in the other order"),
    )
)
_AWQ_OUTPUTS = [0, 4, 1, 5, 2, 6, 3, 7]  # where the outputs of a word of AWQ lie in it
_CODES = 8  # of int4 in a word
_FP8_BLOCK = 128
# A group's ratio to the weights is 1 less its error. Over the groups it varies by some percent, by wrong scales five times so.
_USUAL_SPREAD = 0.05
_LARGEST_RATIO, _SMALLEST_RATIO = 1.3, 0.4
_WRONG_SCALE = 0.1  # who rounds to the nearest is off by some percent
# Half a step of the codes, as parts of a scale or of the number itself, and a fifth more.
_HALF_STEP = 0.6
_E4M3_MANTISSA, _LEAST_EXPONENT = 3, -6
_NF4_ROUNDING = 0.01  # of the largest weight of a block; levels lie 0.08 to 0.3 apart
_NF4_CELLS = 256  # of [-1, 1], ten or more between two levels
# Middle error of codes as parts of their scale: who rounds errs to either side, so that it is near 0.
_LARGEST_BIAS, _BIAS_ROWS, _FEWEST_WEIGHTS = 0.2, 256, 1024
_BAND_NUMBERS = 1 << 20  # whose codes are looked at at a time
_FEW_CODES = 1e-3  # part of the codes: who rounds otherwise than to the nearest has many more


@dataclass(frozen=True)
class QuantizedPair:
    """Weights [n, k] and what a runtime computes with in their place, of which `parts` are the codes and scales, by suffix."""

    weights: Floats
    decoded: Floats
    matrix: QuantizedMatrix
    parts: Mapping[str, Array]

    @property
    def decoder(self) -> Any:
        return self.matrix.decoder

    @cached_property
    def stored(self) -> Floats:
        """The scales as they are read, [rows, groups] or as many as there are."""
        if self.matrix.kind == "nf4":
            scales: Floats = self.decoder.scales(self.parts)
            return scales.reshape(self.gain.shape)
        scale = self.parts["weight_scale"]
        read = floats(scale, "F32" if scale.itemsize == 4 else "BF16")
        return read if self.matrix.kind == "int4" or self._by_blocks else read.reshape(self.gain.shape)

    @cached_property
    def gain(self) -> Floats:
        """What the scales are times what they should be."""
        a, b, (n, k) = self.weights, self.decoded, self.weights.shape
        if self.matrix.kind == "nf4":
            block = self.decoder.scheme.block_size
            gain = group_gain(a.reshape(-1, block), b.reshape(-1, block), block)
            return gain.reshape(n, k // block) if k % block == 0 else gain
        if self.matrix.kind == "int4":
            return group_gain(a, b, self.decoder.scheme.group_size)
        if self._by_blocks:
            of_blocks: Floats = (_block_sums(a * b) / np.maximum(_block_sums(a * a), 1e-30)).astype(np.float32)
            return of_blocks
        if self.matrix.settings["granularity"] == "tensor":
            return group_gain(a.reshape(1, -1), b.reshape(1, -1), a.size)
        return group_gain(a, b, k)

    @property
    def _by_blocks(self) -> bool:
        return self.matrix.settings.get("granularity") == "block"

    def of_each_weight(self, x: Floats) -> Floats:
        """Scales, or gains, broadcast to the weights that have them."""
        n, k = self.weights.shape
        if self.matrix.kind == "nf4":
            return np.repeat(x, self.decoder.scheme.block_size).reshape(n, k)
        if self.matrix.kind == "int4":
            return np.repeat(x, self.decoder.scheme.group_size, 1)
        return np.repeat(np.repeat(x, _FP8_BLOCK, 0)[:n], _FP8_BLOCK, 1)[:, :k] if self._by_blocks else x


def _block_sums(x: Floats) -> Floats:
    rows, columns = (np.arange(0, n, _FP8_BLOCK) for n in x.shape)
    sums: Floats = np.add.reduceat(np.add.reduceat(x, rows, 0), columns, 1)
    return sums


def suspicion(pair: QuantizedPair) -> Diagnosis | None:
    """Scales that are not the codes', or a few codes that no rounding makes, in a matrix whose error is not too large."""
    a, b, gain, kind = pair.weights, pair.decoded, pair.gain, pair.matrix.kind
    known = gain[gain != 0]
    if kind == "nf4":
        # Scales are quantized too, in steps of the largest of 256 of them: those of small weights can err by as much as they are.
        power = np.square(a).reshape(gain.size, -1).sum(1).reshape(gain.shape)
        known = gain[power >= 0.1 * np.quantile(power, 0.9)]
    if known.size > 8 and (
        1.4826 * np.median(np.abs(known - np.median(known))) > _USUAL_SPREAD
        or known.max() > _LARGEST_RATIO
        or known.min() < _SMALLEST_RATIO
    ):
        return Diagnosis("scale", f"scale: {_ratios(gain)}")
    if kind == "int4" and (found := _other_zero(a, b, pair.stored)):
        return found
    places = _wrong_codes(pair)
    size = [max(1, n // n_scales) for n, n_scales in zip(a.shape, pair.stored.shape, strict=True)]
    groups = np.unique(places // size, axis=0)  # whose scales these codes have
    if len(places) > 4 and len(groups) <= max(1, len(places) // 8):
        return Diagnosis("scale", _few_scales(groups, gain))
    if not 0 < len(places) <= max(4, _FEW_CODES * a.size):
        return None
    row, column = (int(i) for i in places[0])
    words = f"element [{row}, {column}] is read as {b[row, column]:.4g} for {a[row, column]:.4g}"
    n = len(places)
    many = f"{n} flipped bits, or codes overwritten" if n > 1 else "a flipped bit, or a code overwritten"
    return Diagnosis("flipped_bit", f"{many}: no rounding makes them; {words}")


def _wrong_codes(pair: QuantizedPair) -> Array:
    """Places of codes that are not the nearest to their weights, [n, 2]."""
    a, b, stored = pair.weights, pair.decoded, pair.stored
    if pair.matrix.kind == "int4":
        error = np.abs(a - b)
        size = a.shape[1] // stored.shape[1]
        far = np.flatnonzero(error.reshape(*stored.shape, size) > _HALF_STEP * np.abs(stored)[..., None])
        scale = stored.ravel()[far // size]
        weights, codes = a.ravel()[far] / scale, b.ravel()[far] / scale
        nearest = np.clip(np.rint(weights), -8, 7)  # what lies beyond the last code is far from it, and right
        wrong = np.abs(weights - codes) > np.abs(weights - nearest) + 2 * (_HALF_STEP - 0.5)
        far = far[wrong]
    elif pair.matrix.kind == "fp8":
        far = _in_bands(_wrong_fp8_codes, a, b, np.broadcast_to(pair.of_each_weight(np.abs(stored)), a.shape))
    else:
        blocks = (-1, a.size // stored.size)
        far = _in_bands(_wrong_nf4_codes, a.reshape(blocks), b.reshape(blocks), stored.reshape(-1, 1))
    return np.stack(np.unravel_index(far, a.shape), 1)


def _wrong_fp8_codes(a: Floats, b: Floats, scale: Floats) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        exponents = np.maximum(np.frexp(np.abs(b) / scale)[1] - 1, _LEAST_EXPONENT) - _E4M3_MANTISSA
    wrong: Array = (np.abs(a - b) > _HALF_STEP * np.ldexp(scale, exponents)) & (np.abs(b) < 447 * scale)
    return wrong


def _wrong_nf4_codes(a: Floats, b: Floats, scale: Floats) -> Array:
    """Of blocks [n, size]. A code belongs to its block's largest weight, not to its scale, which is quantized in turn."""
    low, high = _nf4_limits()
    top = np.abs(a).max(1, keepdims=True)
    known = (top > 0) & (scale > 0)
    weights, read = a / np.where(known, top, 1), b / np.where(known, scale, 1)
    with np.errstate(invalid="ignore"):
        cell = np.clip((read + 1) * (_NF4_CELLS / 2), 0, _NF4_CELLS - 1).astype(np.uint8)
    wrong: Array = known & ((weights < low[cell]) | (weights > high[cell]))
    return wrong


@cache
def _nf4_limits() -> tuple[Floats, Floats]:
    """Between what weights the level nearest to each cell of [-1, 1] is right, with half the rounding to either side."""
    from quant.schemes.nf4 import NF4

    middles = (NF4[1:] + NF4[:-1]) / 2
    level = np.searchsorted(middles, (np.arange(_NF4_CELLS) + 0.5) / (_NF4_CELLS / 2) - 1)
    low = np.concatenate([[-np.inf], middles - _NF4_ROUNDING / 2]).astype(np.float32)
    high = np.concatenate([middles + _NF4_ROUNDING / 2, [np.inf]]).astype(np.float32)
    return low[level], high[level]


def _in_bands(wrong: Callable[[Floats, Floats, Floats], Array], a: Floats, b: Floats, scale: Floats) -> Array:
    """Flat places, of some rows at a time: what each takes beside is a few times their size."""
    step = max(1, _BAND_NUMBERS // a.shape[1])
    found = [
        np.flatnonzero(wrong(a[i : i + step], b[i : i + step], scale[i : i + step])) + i * a.shape[1]
        for i in range(0, len(a), step)
    ]
    return np.concatenate(found)


def _other_zero(a: Floats, b: Floats, stored: Floats) -> Diagnosis | None:
    """Codes that all err to one side, as they do with a zero point that is one off, or where they were cut and not rounded."""
    if a.size < _FEWEST_WEIGHTS:
        return None
    some = some_of(len(a), _BIAS_ROWS)
    scale = stored[some]
    steps = (b[some] - a[some]).reshape(*scale.shape, -1) / np.where(scale == 0, np.inf, scale)[..., None]
    bias = float(np.median(steps))
    if not abs(bias) > _LARGEST_BIAS:  # NaN neither
        return None
    return Diagnosis(
        "packing", f"packing: the codes are {bias:+.2g} from the right ones in the median, as of another zero point"
    )


def _few_scales(places: Array, gain: Floats) -> str:
    group = f", group {listed(places[:, 1])}" if gain.shape[1] > 1 else ""
    ratios = gain[places[:, 0], places[:, 1]]
    return f"scale: {len(places)} of {gain.size:,} scales, of row {listed(places[:, 0])}{group}: {_ratios(ratios)}"


def _ratios(gain: Floats) -> str:
    return f"its scales are {gain.min():.3g} to {gain.max():.3g} times what they should be"


def wrong_scales(pair: QuantizedPair, tolerance: Tolerance) -> Diagnosis | None:
    """Whether each group of the decoded numbers is the weights' times a factor: the codes are right, and the scales known."""
    b, stored, gain = pair.decoded, pair.stored, pair.gain
    expected = pair.weights * pair.of_each_weight(gain)
    if not np.isfinite(gain).all() or relative_error(b, expected) > tolerance.limit:
        return None
    if (np.square(expected - b).sum(1) > 2 * tolerance.limit * np.square(b).sum(1)).any():
        return None  # rows that no scale puts right
    with np.errstate(all="ignore"):
        right = stored / gain
    codes = "the codes are right"
    if np.ptp(gain) <= 0.15 * np.abs(gain).mean() or gain.size == 1:
        return Diagnosis("scale", f"scale: all its scales are {gain.mean():.3g} times what they should be; {codes}")
    if not np.isfinite(right).all():
        return Diagnosis("scale", f"scale: {np.count_nonzero(gain == 0):,} of its scales are zero; {codes}")
    if stored.size > 1 and np.ptp(stored) == 0:
        return Diagnosis("scale", f"scale: all its scales are one value, {stored.flat[0]:.3g}; {codes}")
    wrong = np.argwhere(np.abs(gain - np.median(gain)) > _WRONG_SCALE * abs(np.median(gain)))
    if len(wrong) * 50 <= max(50, gain.size):
        return Diagnosis("scale", f"{_few_scales(wrong, gain)}; {codes}")
    if 1 not in right.shape:
        for moved in (right.T.reshape(right.shape), right.reshape(right.shape[::-1]).T):
            if _explains(moved, right, stored):
                return Diagnosis("scale_axis", f"scale on the wrong axis: the scales' data lie transposed; {codes}")
    for turned, lines in ((False, "row"), (True, "column")):
        x, y = (right.T, stored.T) if turned else (right, stored)
        for shift in (1, -1, 2, -2):
            if len(x) > abs(shift) and _explains(np.roll(x, shift, 0), x, y):
                return Diagnosis("scale", f"scale: the scales are shifted by {shift} {lines}(s); {codes}")
        found = find_blocks(x, y, _SCALES, [*divisors(len(x)), len(x)]) if x.shape[1] > 1 and len(x) > 1 else None
        if found and len(set(found.order.tolist())) == found.n:
            return Diagnosis("scale", f"scale: the scales' {describe(found, Axis(lines)).cause}; {codes}")
    for shift in (1, -1, 2, -2):
        if _explains(np.roll(right.ravel(), shift).reshape(right.shape), right, stored):
            return Diagnosis("scale", f"scale: the scales are shifted by {shift}; {codes}")
    return Diagnosis("scale", f"scale: {_ratios(gain)}; {codes}")


def _explains(moved: Floats, right: Floats, stored: Floats) -> bool:
    return relative_error(moved, stored) < min(0.15 * relative_error(right, stored), 0.02)


def wrong_packing(pair: QuantizedPair, tolerance: Tolerance) -> Diagnosis | None:
    """Codes in another order within their words, with another zero, or of another kind."""
    in_words = pair.matrix.kind != "fp8" and pair.weights.shape[1] % _CODES == 0
    if in_words and (found := find_move([_WORDS], pair.weights, pair.decoded, tolerance, {"four": 4})):
        return found
    for kind, cause, decoded in _read_otherwise(pair):
        if tolerance(pair.weights, decoded):
            return Diagnosis(kind, f"{kind}: {cause}")
    return None


def _read_otherwise(pair: QuantizedPair) -> Iterator[tuple[str, str, Floats]]:
    """Mistakes with codes: the kind, the cause, and the numbers as the codes were meant."""
    n, k = pair.weights.shape

    def decode(suffix: str, codes: Array) -> Floats:
        return floats(pair.decoder.decode({**pair.parts, suffix: np.ascontiguousarray(codes)}, n, k), "BF16")

    if pair.matrix.kind == "fp8":
        codes, granularity = pair.parts["weight"], pair.matrix.settings["granularity"]
        if n == k and granularity != "block":
            yield "packing", "the codes lie transposed, and their scales do not", decode("weight", codes.T)
        if granularity == "channel":
            import torch

            numbers = (
                torch.from_numpy(np.ascontiguousarray(codes).view(np.uint8)).view(torch.float8_e5m2).float().numpy()
            )
            yield "reinterpreted", "the codes are float8_e5m2's, read as float8_e4m3fn", numbers * pair.stored
    if pair.matrix.kind == "int4":
        words = pair.parts["weight_packed"].view(np.uint32)
        gptq = words.reshape(-1, n).T
        yield "packing", "the words lie transposed, [in / 8, out] as GPTQ writes them", decode("weight_packed", gptq)
        if n % _CODES == 0:
            places = np.arange(0, 4 * _CODES, 4, dtype=np.uint32)
            codes = ((words.reshape(k, -1, 1) >> places) & 15)[..., _AWQ_OUTPUTS].reshape(k, n).T
            awq = (codes.reshape(n, -1, _CODES) << places).sum(-1, dtype=np.uint32)
            yield "packing", "the words are AWQ's, [in, out / 8]", decode("weight_packed", awq)
        flipped = words ^ np.uint32(0x88888888)
        cause = "the codes count from 8 as zero where 0 is meant (unsigned for signed)"
        yield "packing", cause, decode("weight_packed", flipped)


def transposed_scales(
    weights: Floats, reader: QuantizedReader, module: str, tolerances: Mapping[str, Tolerance]
) -> Diagnosis | None:
    """Whether the scales of an int4 or FP8 matrix that cannot be decoded lie transposed, shape and all."""
    from quant.encoders import FloatQuantized, PackQuantized
    from quant.schemes.fp8 import Fp8
    from quant.schemes.int4 import GROUP_SIZES, Int4

    n, k = weights.shape
    tensors = reader.checkpoint.tensors
    packed, codes, scales = (f"{module}.{suffix}" for suffix in ("weight_packed", "weight", "weight_scale"))
    scale = tensors[scales].shape if scales in tensors else ()
    decoders: list[tuple[str, str, Any]] = []
    if packed in tensors and tensors[packed].shape == (n, k // 8):
        fitting = [size for size in GROUP_SIZES if scale == (k // size, n)]
        decoders = [("int4", "weight_packed", PackQuantized(Int4(size))) for size in fitting]
    elif codes in tensors and tensors[codes].shape == (n, k):
        schemes = [one for one in (Fp8("channel"), Fp8("block")) if one.shapes(n, k)[1] == scale[::-1]]
        decoders = [("fp8", "weight", FloatQuantized(one)) for one in schemes]
    for kind, suffix, decoder in decoders[:1]:
        right_scales = np.ascontiguousarray(DirectoryReader.read(reader, scales).T)
        parts = {suffix: DirectoryReader.read(reader, f"{module}.{suffix}"), "weight_scale": right_scales}
        fits = tolerances[kind](weights, floats(decoder.decode(parts, n, k), "BF16"))
        shapes = f"the scales are {list(scale)}, not {list(scale[::-1])}{'; transposed they fit' if fits else ''}"
        return Diagnosis("scale_axis", f"scale on the wrong axis: {shapes}")
    return None
