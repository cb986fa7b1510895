"""One tensor of two checkpoints: equal bit by bit, or within what its quantization may lose; and the sketch kept of it."""

from __future__ import annotations

import hashlib
import math
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama4.weights import BindingError, Bits, LogicalTensor
from llama4_convert.checkpoints.quantized import QuantizedReader
from llama4_convert.validation.diagnosis.changed_values import floats
from llama4_convert.validation.diagnosis.moved_values import as_matrix, listed
from llama4_convert.validation.diagnosis.sketches import Sketches, sketch, sketch_of_rows
from llama4_convert.validation.diagnosis.tensor_pairs import FLOATS, SLICED, cast, slices

if TYPE_CHECKING:
    from hashlib import _Hash as Digest

# No scheme of ours errs so much on any weights that are trained: docs/validate.md. A wrong tensor errs by 1 to 2.
LARGEST_LOSS = {"int4": 0.2, "fp8": 0.005, "nf4": 0.1}
# Nor does any in one output: a group of 128 int4 codes errs by no more than 128 * (1 / 15) ** 2 of its largest weight's square.
_LARGEST_ROW_LOSS = 0.6
_DIFFERENCES = 1 << 18  # numbers that are subtracted at a time


class Outcome(NamedTuple):
    """What a comparison found: in words, None if the tensor is right, and the largest difference of a number."""

    cause: str | None = None
    largest: float | None = None  # NaN where either side has one; None where numbers cannot be held against each other
    relative_mse: float | None = None  # of what is quantized


def compare_bits(
    ours: LogicalTensor,
    found: LogicalTensor,
    shape: tuple[int, ...],
    sketches: Sketches,
    either_way: bool,
    digest: Digest | None = None,
) -> Outcome:
    """Bit by bit in the dtype of `found`, of which `digest` is told. Raises BindingError if there is no such tensor.

    `either_way`: of two dtypes it is enough that rounding one gives the other.
    """
    differing, elements, largest = 0, 0, 0.0
    if ours.name in SLICED:
        take_sketch(ours, None, shape, sketches)
    for rows in slices(ours.name, shape[0]):
        a = ours.load(rows)
        if ours.name not in SLICED:
            take_sketch(ours, a, shape, sketches)
        b = found.load(rows)
        if a.shape != b.shape:
            if rows is not None and a.shape[1:] == b.shape[1:]:
                return Outcome(f"it has {'fewer' if len(b) < len(a) else 'more'} rows than the reference's")
            return Outcome(_other_shape(a, b))
        if digest:
            _feed(digest, found.dtype, b)
        elements += a.size
        rounded = a
        if ours.dtype != found.dtype:
            if not {ours.dtype, found.dtype} <= FLOATS:
                return Outcome(f"its dtype is {found.dtype}, not {ours.dtype}")
            rounded = cast(a, ours.dtype, found.dtype)
        if np.array_equal(rounded, b):
            continue
        unequal = rounded != b
        if either_way and ours.dtype != found.dtype:
            unequal &= cast(b, found.dtype, ours.dtype) != a
        n = int(np.count_nonzero(unequal))
        if n:
            differing += n
            difference = _largest_difference(rounded, b, unequal, found.dtype)
            largest = float(np.maximum(largest, difference))  # NaN stays
    if not differing:
        return Outcome()
    size = "" if np.isnan(largest) else f", by up to {largest:.3g}"  # what a NaN is there, the cause says
    return Outcome(f"{differing:,} of {elements:,} elements differ{size}", largest)


def digest_of(tensor: LogicalTensor, shape: tuple[int, ...]) -> str | None:
    """What `compare_bits` feeds a digest of a tensor that is right; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        for rows in slices(tensor.name, shape[0]):
            _feed(digest, tensor.dtype, tensor.load(rows))
    except BindingError:
        return None
    return digest.hexdigest()


def _feed(digest: Digest, dtype: str, bits: Bits) -> None:
    """In the order in which they lie: that of experts differs between layouts, which are then compared once more."""
    is_turned = bits.flags.f_contiguous and not bits.flags.c_contiguous
    digest.update(f"{dtype} {bits.shape} {is_turned} ".encode())
    digest.update(np.ascontiguousarray(bits.T if is_turned else bits).data)


def compare_quantized(
    ours: LogicalTensor,
    found: LogicalTensor,
    kind: str,
    limit: float,
    reader: QuantizedReader | None,
    sketches: Sketches,
    both_quantized: bool,
) -> Outcome:
    """The relative squared error against what the scheme `kind` makes; `reader` has the codes and scales of `found`.

    With `both_quantized` neither has the true numbers, and the error is relative to the smaller ones.
    """
    from llama4_convert.validation.diagnosis.quantized_faults import suspicion

    a = ours.load(None)
    take_sketch(ours, a, a.shape, sketches)
    b = found.load(None)
    if a.shape != b.shape:
        return Outcome(_other_shape(a, b))
    x, y = floats(a, ours.dtype), floats(b, found.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = y - x
        error, power = (np.einsum("nk,nk->n", z, z).astype(np.float64) for z in (difference, x))
        theirs = np.einsum("nk,nk->n", y, y).astype(np.float64) if both_quantized else power
    del difference
    whole, power = float(min(power.sum(), theirs.sum())), np.minimum(power, theirs)
    loss = float(error.sum()) / whole if whole else 0.0 if not error.any() else math.inf
    rows = np.flatnonzero(error > _LARGEST_ROW_LOSS * power)
    cause = None
    if not loss <= limit:
        cause = f"a relative squared error of {loss:.3g}: {kind} makes no more than {limit:g}"
    elif len(rows):
        cause = f"a relative squared error of {float((error[rows] / power[rows]).max()):.3g} in row {listed(rows)}"
    elif (
        reader is not None and found.keys[0] in reader.quantized
    ):  # not Meta's own codes, whose parts are not looked into
        few = suspicion(x, y, reader.quantized[found.keys[0]], reader.read_parts(found.keys[0]))
        cause = f"{few.cause}; a relative squared error of {loss:.3g} on the whole" if few else None
    if cause is None:
        return Outcome(relative_mse=loss)
    with np.errstate(invalid="ignore", over="ignore"):
        return Outcome(cause, float(np.abs(y - x).max()), loss)


def _other_shape(a: Bits, b: Bits) -> str:
    return f"its shape is {list(b.shape)}, not {list(a.shape)}"


def take_sketch(tensor: LogicalTensor, bits: Bits | None, shape: tuple[int, ...], sketches: Sketches) -> None:
    """Of a tensor of the reference. `bits`: the whole of it; None of one that is not read whole."""
    if bits is None:
        sketches.add(tensor.name, (shape[0], shape[1]), sketch_of_rows(tensor, (shape[0], shape[1])))
        return
    x = as_matrix(bits)
    if tensor.dtype in FLOATS and x.size:
        sketches.add(tensor.name, (x.shape[0], x.shape[1]), sketch(x, tensor.dtype))


def _largest_difference(a: Bits, b: Bits, where: NDArray[np.bool_], dtype: str) -> float:
    """Some rows at a time: as float64, numbers take four times what they do as they lie. NaN if there is one."""
    from llama4.loading import to_tensor

    largest, step = 0.0, max(1, _DIFFERENCES // max(1, prod(a.shape[1:])))
    for start in range(0, len(a), step):
        some = slice(start, start + step)
        x, y = (to_tensor(bits[some][where[some]], dtype).double() for bits in (a, b))
        if x.numel():
            largest = float(np.maximum(largest, float((x - y).abs().max())))  # NaN stays
    return largest
