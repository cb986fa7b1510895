"""NF4 with double quantization, as bitsandbytes' quantize_4bit does it (0.50.2; Dettmers et al., arXiv 2305.14314).

The matrix is read row after row, [N, K], in blocks of 64 weights; blocks go on over the end of a row. A block's scale is
its largest magnitude, a weight's code the nearest of 16 values to weight / scale (computed as weight * (1 / scale) in
float32, what lies on a midpoint goes down), two codes to a byte, the first in the high half.

Double quantization stores the scales in 8 bits: their mean ("offset") is subtracted, blocks of 256 of them are divided by
their largest magnitude, and the code of one is the nearest of the 256 values of the "dynamic map". bitsandbytes finds it in
a table of 65,536 steps from -1 to 1, in half a percent of the scales a neighbour of the nearest; so do we. A scale is then
read as value * nested scale + offset, a weight as NF4 value * scale, all in float32, at last rounded to bf16.

Everything is equal bit for bit to what bitsandbytes writes on x86, with one exception: the mean. torch.mean adds in
float32, in an order that depends on the number of threads and on the vector width, and thus is no function of the weights
alone. We take the float32 nearest to the mean, with sums of float64 in a fixed order. The offset is stored, so this is as
legal; given our offset, bitsandbytes' own functions give our codes and nested scales.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quant.kernels import nf4 as kernels
from quant.kernels.bands import share
from quant.kernels.tiles import LANES
from quant.schemes import NotFinite
from quant.schemes.arrays import Cost, source_of

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256  # scales that share a nested scale
NF4 = kernels.NF4
_LANES = int(LANES)
_BAND_WEIGHTS = 1024  # weights of a row in a band; with LANES rows the unit that threads share
_FLAT_BAND_ROWS = 16 * _LANES  # rows in a band if they are blocks
_NESTED_BAND_SCALES = 64 * NESTED_BLOCK  # scales in a band
_TABLE_STEPS = 65536  # steps of the table that finds a scale's code
_CODES_PER_BYTE, _CODES_PER_WORD = 2, 8


class UnfilledBlock(ValueError):
    """The weights of a matrix do not fill blocks."""

    def __init__(self, outputs: int, inputs: int, block: int) -> None:
        super().__init__(
            f"{outputs:,} x {inputs:,} weights do not fill blocks of {block} ({outputs * inputs % block} are left over): "
            "take a smaller block, or leave this matrix as it is"
        )


@functools.cache
def dynamic_map() -> NDArray[np.float32]:
    """The 256 values of a scale's code, ascending: `create_dynamic_map` of bitsandbytes.functional.

    Seven decades, each with twice the values of the one below, evenly spaced; and 0 and 1.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        means = _midpoints(_linspace(2**decade + 1)) * np.float32(10.0 ** (decade - 6))
        found += [*means.tolist(), *(-means).tolist()]
    values = np.array(sorted(found), np.float32)
    values.flags.writeable = False
    return values


@functools.cache
def _table() -> NDArray[np.uint8]:
    """The code of each of 65,536 steps from -1 to 1: build_quantize_lut of bitsandbytes' csrc/cpu_ops.cpp."""
    steps = np.float32(-1) + np.arange(0, 2 * _TABLE_STEPS, 2).astype(np.float32) / np.float32(_TABLE_STEPS - 1)
    return np.searchsorted(_midpoints(dynamic_map()), steps, side="left").astype(np.uint8)


def _midpoints(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return (values[:-1] + values[1:]) * np.float32(0.5)


def _linspace(count: int) -> NDArray[np.float32]:
    """torch.linspace(0.1, 1, count): from both ends, with a fused multiply-add, which float64 does exactly before it rounds."""
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)


@dataclass(frozen=True)
class Quantized(Cost):
    """A matrix of N outputs and K inputs in NF4, and what that cost."""

    packed: NDArray[np.uint8]  # [N * K / 2, 1]
    absmax: NDArray[Any]  # [N * K / block]: the scales as float32, or their codes as uint8
    nested_absmax: NDArray[np.float32] | None  # [N * K / block / 256, rounded up]; none without double quantization
    offset: float | None  # a float32
    squared_error: float  # sum of (weight - NF4 value * scale as read)^2, the product not rounded to bf16
    squared_sum: float  # sum of weight^2


@dataclass(frozen=True)
class Nf4:
    """The scheme: weights that share a scale, and whether the scales are quantized too."""

    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block size {self.block_size}: NF4 has blocks of {', '.join(map(str, BLOCK_SIZES))}")

    def shapes(self, outputs: int, inputs: int) -> tuple[tuple[int, int], tuple[int], tuple[int]]:
        """Shapes of the bytes, of the scales and of the nested scales. Raises UnfilledBlock."""
        blocks, left = divmod(outputs * inputs, self.block_size)
        if left:
            raise UnfilledBlock(outputs, inputs, self.block_size)
        return (outputs * inputs // _CODES_PER_BYTE, 1), (blocks,), (-(-blocks // NESTED_BLOCK),)

    def quantize(
        self, bits: NDArray[np.uint16], *, in_out: bool, threads: int = 1, pool: Executor | None = None
    ) -> Quantized:
        """Quantizes bf16 bits, [K, N] if `in_out` (Meta's and fused experts) and else [N, K]; the result is of [N, K].

        `bits` may be a slice as long as its last axis is contiguous. `threads` threads share the work, of `pool` if one is
        given; the result is the same bytes for any number of them, on any machine. Needs 16 bytes a block besides the
        result, and a copy of the matrix if blocks go on over the ends of rows that are not contiguous in the source.

        Raises UnfilledBlock if N * K is no multiple of the block and NotFinite, having looked at all of the matrix.
        """
        inputs, outputs = bits.shape if in_out else bits.shape[::-1]
        packed_shape, scales, nested_scales = self.shapes(outputs, inputs)
        packed, absmax = np.empty(packed_shape, np.uint8), np.empty(scales, np.float32)
        sums = np.empty((*scales, kernels.SUMS), np.float32)
        self._encode(bits, in_out, packed, absmax, sums, threads, pool)

        offset, codes, nested = np.float32(0), np.empty(0, np.uint8), np.empty(0, np.float32)
        starts = range(0, len(absmax), _NESTED_BAND_SCALES)
        ends = [min(start + _NESTED_BAND_SCALES, len(absmax)) for start in starts]
        if self.double_quant:
            codes, nested = np.empty(scales, np.uint8), np.empty(nested_scales, np.float32)
            total = math.fsum(kernels.add_up(absmax, *band) for band in zip(starts, ends, strict=True))
            offset = np.float32(total / max(len(absmax), 1))
        errors = np.zeros((len(starts), 2))

        def work(drawn: Iterator[int]) -> None:
            for number in drawn:
                kernels.nest(
                    absmax, sums, starts[number], ends[number], offset, NESTED_BLOCK, _table(), dynamic_map(), codes,
                    nested, errors[number],
                )  # fmt: skip

        share(work, len(starts), threads, pool)
        error, power = math.fsum(errors[:, 0]), math.fsum(errors[:, 1])
        if not self.double_quant:
            return Quantized(packed, absmax, None, None, error, power)
        return Quantized(packed, codes, nested, float(offset), error, power)

    def _encode(
        self,
        bits: NDArray[np.uint16],
        in_out: bool,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
        sums: NDArray[np.float32],
        threads: int,
        pool: Executor | None,
    ) -> None:
        """Codes, scales and sums of all blocks. Raises NotFinite."""
        block = self.block_size
        divides = bits.shape[0 if in_out else 1] % block == 0
        if in_out and not divides:
            bits, in_out = np.ascontiguousarray(bits.T), False
        if not in_out and (bits.flags.c_contiguous or not divides):
            bits = np.ascontiguousarray(bits).reshape(-1, block)  # rows of one block each
        source = source_of(bits, in_out)
        inputs, rows = bits.shape if in_out else bits.shape[::-1]
        groups = inputs // block
        high, wide = (_LANES, max(_BAND_WEIGHTS // block, 1)) if groups > 1 else (_FLAT_BAND_ROWS, 1)
        bands = [(n, g) for g in range(0, groups, wide) for n in range(0, rows, high)]
        words = packed.reshape(-1).view(np.int32).reshape(rows, inputs // _CODES_PER_WORD)
        scales, block_sums = absmax.reshape(rows, groups), sums.reshape(rows, groups, kernels.SUMS)
        bad = np.zeros((len(bands), 1), np.int64)

        def work(drawn: Iterator[int]) -> None:
            buffers = kernels.buffers(block)
            for number in drawn:
                n, g = bands[number]
                kernels.quantize_band(
                    source, n, min(n + high, rows), g, min(g + wide, groups), block, words, scales, block_sums,
                    bad[number], buffers,
                )  # fmt: skip

        share(work, len(bands), threads, pool)
        if count := int(bad.sum()):
            raise NotFinite(count, bits.size)

    def scales(
        self,
        absmax: NDArray[Any],
        nested_absmax: NDArray[np.float32] | None = None,
        offset: float | None = None,
        nested_map: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """The scales as they are read, float32 [N * K / block]: of the codes with double quantization.

        `nested_map`: the values of the codes, float32 [256], if others than `dynamic_map`.
        """
        if nested_absmax is None or offset is None:
            return absmax.astype(np.float32, copy=False)
        values = dynamic_map() if nested_map is None else nested_map
        nested = np.repeat(nested_absmax, NESTED_BLOCK)[: len(absmax)]
        scales: NDArray[np.float32] = values[absmax] * nested + np.float32(offset)
        return scales

    def dequantize(
        self,
        packed: NDArray[np.uint8],
        scales: NDArray[np.float32],
        shape: tuple[int, int],
        *,
        dtype: Literal["BF16", "F32"] = "BF16",
        threads: int = 1,
        pool: Executor | None = None,
    ) -> NDArray[Any]:
        """What bitsandbytes' dequantize_4bit gives: bf16 bits (uint16) or float32, [N, K] = `shape`.

        `packed` as `quantize` returns it and the scales that `scales` makes. Raises ValueError if they do not fit.
        """
        expected, blocks, _ = self.shapes(*shape)
        for array, dims, kind in ((packed, expected, np.uint8), (scales, blocks, np.float32)):
            if array.shape != dims or array.dtype != kind or not array.flags.c_contiguous:
                raise ValueError(f"{array.dtype} {array.shape}: expected contiguous {np.dtype(kind)} {dims}")
        flat, scales = packed.reshape(-1), scales.view()
        flat.flags.writeable = scales.flags.writeable = False  # one type for the kernel, whatever was given
        result = np.empty(shape, np.uint16 if dtype == "BF16" else np.float32)
        to = result.reshape(-1)
        band = _FLAT_BAND_ROWS * self.block_size

        def work(drawn: Iterator[int]) -> None:
            for number in drawn:
                first, last = number * band, (number + 1) * band
                some = flat[first // _CODES_PER_BYTE : last // _CODES_PER_BYTE]
                kernels.dequantize(some, scales, self.block_size, first, to[first:last])

        share(work, -(-to.size // band), threads, pool)
        return result
