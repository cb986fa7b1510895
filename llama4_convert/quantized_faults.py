"""How a quantized matrix is wrong: scales that are not its codes', or codes that are packed in another way. Pure, on arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama4_convert.altered import Floats, floats, group_gain
from llama4_convert.block_order import Axis, blocks, told
from llama4_convert.checkpoints.quantized import QuantizedMatrix
from llama4_convert.rearranged import Array, Diagnosis, Same, divisors, relative_error

# Scales are known as well as the codes' rounding lets the ratio of a group be known: some percent.
_SCALES = Same(0.003)
# Orders of eight codes in a word that other packers use: reversed, as AWQ deals them out, halves of bytes exchanged.
_WORDS = {
    "in the reverse order": (7, 6, 5, 4, 3, 2, 1, 0),
    "in AWQ's order": (0, 2, 4, 6, 1, 3, 5, 7),
    "in AWQ's order undone": (0, 4, 1, 5, 2, 6, 3, 7),
    "with the halves of each byte exchanged": (1, 0, 3, 2, 5, 4, 7, 6),
    "with the bytes in the other order": (6, 7, 4, 5, 2, 3, 0, 1),
}


def wrong_scales(
    a: Floats, b: Floats, matrix: QuantizedMatrix, parts: Mapping[str, Array], same: Same
) -> Diagnosis | None:
    """Whether each group of `b` is `a`'s times a factor: then the codes are right, and the scales that they need are known."""
    stored, gain, spread = _scales(a, b, matrix, parts)
    if not np.isfinite(gain).all() or relative_error(b, a * spread) > same.limit:
        return None
    with np.errstate(all="ignore"):
        right = stored / gain
    codes = "the codes are right"
    if np.ptp(gain) <= 0.15 * np.abs(gain).mean() or gain.size == 1:
        return Diagnosis("scale", f"scale: all its scales are {gain.mean():.3g} times what they should be; {codes}")
    if not np.isfinite(right).all():
        return Diagnosis("scale", f"scale: {np.count_nonzero(gain == 0):,} of its scales are zero; {codes}")
    if stored.size > 1 and np.ptp(stored) == 0:
        return Diagnosis("scale", f"scale: all its scales are one value, {stored.flat[0]:.3g}; {codes}")
    if 1 not in right.shape:
        for moved in (right.T.reshape(right.shape), right.reshape(right.shape[::-1]).T):
            if _explains(moved, right, stored):
                return Diagnosis("scale_axis", f"scale on the wrong axis: the scales' data lie transposed; {codes}")
    for turned, lines in ((False, "row"), (True, "column")):
        x, y = (right.T, stored.T) if turned else (right, stored)
        for shift in (1, -1, 2, -2):
            if len(x) > abs(shift) and _explains(np.roll(x, shift, 0), x, y):
                return Diagnosis("scale", f"scale: the scales are shifted by {shift} {lines}(s); {codes}")
        found = (
            blocks(x, y, _SCALES, [*divisors(len(x)), len(x)])
            if len(x) > 1 and _SCALES.limit < relative_error(x, y)
            else None
        )
        if found:
            return Diagnosis("scale", f"scale: the scales' {told(found, Axis(lines)).cause}; {codes}")
    for shift in (1, -1, 2, -2):
        if _explains(np.roll(right.ravel(), shift).reshape(right.shape), right, stored):
            return Diagnosis("scale", f"scale: the scales are shifted by {shift}; {codes}")
    return Diagnosis(
        "scale", f"scale: its scales are {gain.min():.3g} to {gain.max():.3g} times what they should be; {codes}"
    )


def _explains(moved: Floats, right: Floats, stored: Floats) -> bool:
    return relative_error(moved, stored) < min(0.15 * relative_error(right, stored), 0.02)


def _scales(a: Floats, b: Floats, matrix: QuantizedMatrix, parts: Mapping[str, Array]) -> tuple[Floats, Floats, Floats]:
    """The scales as they are read, what they are times what they should be, and that for each weight."""
    decoder: Any = matrix.decoder
    n, k = a.shape
    if matrix.kind == "nf4":
        block = decoder.scheme.block_size
        scales: Floats = decoder.scales(parts)
        of_block = group_gain(a.reshape(-1, block), b.reshape(-1, block), block)
        shape = (n, k // block) if k % block == 0 else of_block.shape
        return scales.reshape(shape), of_block.reshape(shape), np.repeat(of_block, block, 1).reshape(n, k)
    stored = floats(parts["weight_scale"], "BF16")
    if matrix.kind == "int4":
        groups = group_gain(a, b, decoder.scheme.group_size)
        return stored, groups, np.repeat(groups, decoder.scheme.group_size, 1)
    high, wide = {"channel": (1, k), "tensor": (n, k), "block": (128, 128)}[decoder.scheme.granularity]
    power = np.maximum(_block_sums(a * a, high, wide), 1e-30)
    gain = (_block_sums(a * b, high, wide) / power).astype(np.float32)
    spread = np.repeat(np.repeat(gain, high, 0)[:n], wide, 1)[:, :k]
    return stored.reshape(gain.shape), gain, spread


def _block_sums(x: Floats, high: int, wide: int) -> Floats:
    sums: Floats = np.add.reduceat(
        np.add.reduceat(x, np.arange(0, x.shape[0], high), 0), np.arange(0, x.shape[1], wide), 1
    )
    return sums


def wrong_packing(
    a: Floats, b: Floats, matrix: QuantizedMatrix, parts: Mapping[str, Array], same: Same
) -> Diagnosis | None:
    """Codes in another order within their words, or with another zero."""
    n, k = a.shape
    some = slice(0, 64)
    if matrix.kind != "fp8" and k % 8 == 0:
        for words, order in _WORDS.items():
            for turn in (np.array(order), np.argsort(order)):
                moved = a[some].reshape(-1, k // 8, 8)[:, :, turn].reshape(-1, k)
                if same.near(moved, b[some]) and same(a.reshape(n, k // 8, 8)[:, :, turn].reshape(n, k), b):
                    return Diagnosis("packing", f"packing: the codes lie {words}")
    if matrix.kind == "int4":
        flipped = {**parts, "weight_packed": parts["weight_packed"] ^ np.uint32(0x88888888)}
        if same(a, floats(matrix.decoder.decode(flipped, n, k), "BF16")):
            return Diagnosis(
                "packing", "packing: the codes count from 8 as zero where 0 is meant (unsigned for signed)"
            )
    return None
