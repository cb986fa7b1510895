"""What the schemes share: bf16 matrices as kernels read them, arrays for results, and the error of a result."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from quant.kernels.tiles import Source


class Cost:
    """The error of a quantized matrix; each scheme's own result has the two sums as fields."""

    squared_error: float
    squared_sum: float

    @property
    def relative_error(self) -> float:
        """Squared error by squared weights; 0 for a matrix of zeros."""
        return self.squared_error / self.squared_sum if self.squared_sum else 0.0


def source_of(bits: NDArray[np.uint16], in_out: bool) -> Source:
    """bf16 bits, [inputs, outputs] if `in_out`, else [outputs, inputs], as kernels read them: without a copy, read-only.

    Raises ValueError for what is no matrix of bf16, or has rows that are not contiguous.
    """
    if bits.ndim != 2 or bits.dtype != np.uint16:
        raise ValueError(f"bf16 bits are uint16 of two axes, not {bits.dtype} of {bits.ndim}")
    rows, columns = bits.shape
    step, item = bits.strides[0], bits.itemsize
    if (columns > 1 and bits.strides[1] != item) or (rows > 1 and (step % item or step < columns * item)):
        raise ValueError(f"rows of {columns} bf16 must be contiguous; the strides are {bits.strides} bytes")
    stride = step // item if rows > 1 else columns
    length = (rows - 1) * stride + columns if bits.size else 0
    # One type for the kernels, whatever the matrix is a slice of.
    memory = np.lib.stride_tricks.as_strided(bits.view(np.int16), (length,), (item,), writeable=False)
    return Source(memory, stride, in_out)


def results(
    given: tuple[NDArray[Any], NDArray[Any]] | None, *wanted: tuple[tuple[int, ...], DTypeLike]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two arrays for results: `given`, or new ones. `wanted` are their shapes and dtypes.

    Raises ValueError if a given array has another shape or dtype, or is not contiguous.
    """
    if given is None:
        first, second = (np.empty(shape, dtype) for shape, dtype in wanted)
        return first, second
    for array, (shape, dtype) in zip(given, wanted, strict=True):
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(f"{array.dtype} {array.shape}: expected contiguous {np.dtype(dtype)} {shape}")
    return given
