"""One tensor of two checkpoints: equal bit by bit, or within what its quantization may lose; and a sketch of the reference's."""

from __future__ import annotations

import hashlib
import math
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama4.weights import BindingError, Bits, LogicalTensor, Rows, ShapeError
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.validation.diagnosis.quantized_faults import QuantizedPair, suspicion
from llama4_convert.validation.diagnosis.sketches import Shape, sketch, sketch_of_rows
from llama4_convert.validation.diagnosis.tensor_pairs import FLOATS, SLICED, TensorPairs, cast, slices
from llama4_convert.validation.diagnosis.tolerance import Floats, as_matrix, floats, listed

if TYPE_CHECKING:
    from hashlib import _Hash as Digest

# Relative squared errors. No scheme of ours errs so much on any weights that are trained: docs/validate.md. A wrong tensor errs
# by 1 to 2.
LARGEST_LOSS = {"int4": 0.2, "fp8": 0.005, "nf4": 0.1}
# Nor does any in one output: a group of 128 int4 codes errs by no more than 128 * (1 / 15) ** 2 of its largest weight's square.
_LARGEST_ROW_LOSS = 0.6
_NUMBERS_SUBTRACTED = 1 << 18  # at a time
# Bytes that a number of a quantized matrix takes while it is compared, measured: as float32 on both sides, and errors.
_BYTES_QUANTIZED = 22


class TensorComparison(NamedTuple):
    """What comparing one tensor found."""

    cause: str | None = None  # how it differs, in words; None if it is right
    largest: float | None = (
        None  # difference of two numbers: NaN where either side has one, None where none can be taken
    )
    relative_mse: float | None = None  # of a quantized matrix
    digest: str | None = None  # of the bits of a tensor that is right, if asked for
    sketch: tuple[Shape, Floats] | None = None  # of the reference's tensor
    reference_was_read: bool = True  # False where the digest was known


def memory_needed(pairs: TensorPairs) -> int:
    """Bytes that the hungriest tensor takes while it is compared."""
    return max((_bytes_needed(pairs, name) for name in pairs.names), default=1)


def _bytes_needed(pairs: TensorPairs, name: str) -> int:
    """Gate and up of a fused expert are read together; of two dtypes either is rounded to the other, and put together."""
    ours, found = pairs.ours[name], pairs.theirs[name]
    dtypes = {tensor.dtype: ITEM_SIZES[tensor.dtype] for tensor in (ours, found) if tensor.keys}
    a_number = 4 * sum(dtypes.values()) + 3
    if found.keys and found.keys[0] in pairs.lossy:
        a_number = max(a_number, _BYTES_QUANTIZED)
    return pairs.numbers(name) * a_number


def compare_tensor(pairs: TensorPairs, name: str, known_digest: str | None, *, with_digest: bool) -> TensorComparison:
    """One tensor bit by bit in the candidate's dtype, or within the loss of its scheme.

    One whose bits have `known_digest` is right, and the reference's is not read. Raises BindingError where a tensor cannot be
    read; one that is missing or has another shape is a result.
    """
    ours, found, shape = pairs.ours[name], pairs.theirs[name], pairs.shapes[name]
    scheme = pairs.lossy.get(found.keys[0]) if found.keys else None
    made = None
    try:
        if scheme is None and known_digest is not None and digest_of(found, shape) == known_digest:
            return TensorComparison(digest=known_digest, reference_was_read=False)
        whole = None if name in SLICED and scheme is None else ours.load(None)
        made = sketch_of(ours, whole, shape)
        if scheme is not None:
            assert whole is not None
            compared = _compare_quantized(pairs, whole, ours, found, scheme)
        else:
            digest = hashlib.sha256() if with_digest else None
            compared = _compare_bits(pairs, name, whole, digest)
            if digest and compared.cause is None:
                compared = compared._replace(digest=digest.hexdigest())
    except BindingError as error:
        if found.keys and not isinstance(error, ShapeError):
            raise
        compared = TensorComparison(str(error))
    return compared._replace(sketch=made)


def _compare_bits(pairs: TensorPairs, name: str, whole: Bits | None, digest: Digest | None) -> TensorComparison:
    """`whole`: the reference's bits, None of a tensor that is read in slices. `digest` takes the bits that were found."""
    ours, found = pairs.ours[name], pairs.theirs[name]
    differing, elements, largest = 0, 0, 0.0
    for rows in slices(name, pairs.shapes[name][0]):
        a = ours.load(rows) if whole is None else whole
        b = found.load(rows)
        if a.shape != b.shape:
            return TensorComparison(_shape_cause(a, b, rows))
        if digest:
            _feed(digest, found.dtype, b)
        elements += a.size
        rounded = a
        if ours.dtype != found.dtype:
            if not {ours.dtype, found.dtype} <= FLOATS:
                return TensorComparison(f"its dtype is {found.dtype}, not {ours.dtype}")
            rounded = cast(a, ours.dtype, found.dtype)
        if np.array_equal(rounded, b):
            continue
        unequal = rounded != b
        if pairs.either_way and ours.dtype != found.dtype:
            unequal &= cast(b, found.dtype, ours.dtype) != a
        n = int(np.count_nonzero(unequal))
        if n:
            differing += n
            difference = _largest_difference(rounded, b, unequal, found.dtype)
            largest = float(np.maximum(largest, difference))  # NaN stays
    if not differing:
        return TensorComparison()
    size = "" if np.isnan(largest) else f", by up to {largest:.3g}"  # where a NaN comes from, the diagnosis says
    return TensorComparison(f"{differing:,} of {elements:,} elements differ{size}", largest)


def _compare_quantized(
    pairs: TensorPairs, a: Bits, ours: LogicalTensor, found: LogicalTensor, scheme: str
) -> TensorComparison:
    """The relative squared error against what the scheme makes; `a`: the reference's bits."""
    b = found.load(None)
    if a.shape != b.shape:
        return TensorComparison(_shape_cause(a, b))
    x, y = floats(a, ours.dtype), floats(b, found.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = y - x
        error, power = (np.einsum("nk,nk->n", z, z).astype(np.float64) for z in (difference, x))
        theirs = np.einsum("nk,nk->n", y, y).astype(np.float64) if pairs.both_quantized else power
    del difference
    whole, power = float(min(power.sum(), theirs.sum())), np.minimum(power, theirs)
    relative = float(error.sum()) / whole if whole else 0.0 if not error.any() else math.inf
    rows = np.flatnonzero(error > _LARGEST_ROW_LOSS * power)
    key, limit, cause = found.keys[0], pairs.limits[scheme], None
    if not relative <= limit:
        cause = f"a relative squared error of {relative:.3g}: {scheme} makes no more than {limit:g}"
    elif len(rows):
        cause = f"a relative squared error of {float((error[rows] / power[rows]).max()):.3g} in row {listed(rows)}"
    elif pairs.reader is not None and key in pairs.reader.quantized:  # Meta's own codes are not looked into
        few = suspicion(QuantizedPair(x, y, pairs.reader.quantized[key], pairs.reader.read_parts(key)))
        cause = f"{few.cause}; a relative squared error of {relative:.3g} on the whole" if few else None
    if cause is None:
        return TensorComparison(relative_mse=relative)
    with np.errstate(invalid="ignore", over="ignore"):
        return TensorComparison(cause, float(np.abs(y - x).max()), relative)


def _shape_cause(a: Bits, b: Bits, rows: Rows | None = None) -> str:
    if rows is not None and a.shape[1:] == b.shape[1:]:
        return f"it has {'fewer' if len(b) < len(a) else 'more'} rows than the reference's"
    return f"its shape is {list(b.shape)}, not {list(a.shape)}"


def digest_of(tensor: LogicalTensor, shape: tuple[int, ...]) -> str | None:
    """SHA-256 of a tensor's bits, as `compare_tensor` returns it; None if it cannot be read."""
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


def sketch_of(tensor: LogicalTensor, whole: Bits | None, shape: tuple[int, ...]) -> tuple[Shape, Floats] | None:
    """The sketch of a tensor of the reference and its shape as a matrix; None if it has no floats.

    `whole`: its bits; None of a tensor that is read in slices.
    """
    if whole is None:
        return (shape[0], shape[1]), sketch_of_rows(tensor, (shape[0], shape[1]))
    x = as_matrix(whole)
    if tensor.dtype not in FLOATS or not x.size:
        return None
    return (x.shape[0], x.shape[1]), sketch(x, tensor.dtype)


def _largest_difference(a: Bits, b: Bits, where: NDArray[np.bool_], dtype: str) -> float:
    """Some rows at a time: as float64, numbers take four times what they do as they lie. NaN if there is one."""
    from llama4.loading import to_tensor

    largest, step = 0.0, max(1, _NUMBERS_SUBTRACTED // max(1, prod(a.shape[1:])))
    for start in range(0, len(a), step):
        some = slice(start, start + step)
        x, y = (to_tensor(bits[some][where[some]], dtype).double() for bits in (a, b))
        if x.numel():
            largest = float(np.maximum(largest, float((x - y).abs().max())))  # NaN stays
    return largest
