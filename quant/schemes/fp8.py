"""FP8 e4m3 (float8_e4m3fn), symmetric, one bf16 scale for each output, for blocks of 128 x 128, or for the whole matrix.

A weight is stored as the 8 bits of an e4m3 number and read as scale * number, with a bf16 scale like the weights
(compressed_tensors/quantization/lifecycle/initialize.py); vLLM widens it to float32 as it loads it. Two ways to the scale:

plain    amax / 448 rounded to bf16, bf16's epsilon instead of 0; weight / scale rounded to bf16, limited to +-448 and rounded
         to e4m3, both times ties to even. All of it as compressed-tensors and llm-compressor do it, bit for bit
         (calculate_qparams and quantize of compressed_tensors 0.20, min-max observer, with the zero point of 0 they pass along).
search   The best of the 128 bf16 scales of the octave that begins with plain's: e4m3 by twice the scale is the same again, but
         for the smallest numbers. The errors of all of them are known from one pass over the weights
         (quant/kernels/fp8_search.py), but for weights below about a 10,000th of the largest; what these might lose by another
         scale is bounded, and one is taken only if it gains more. So none is worse than plain. weight / scale is rounded to
         e4m3 at once, not by way of bf16, which is worth 0.7% of the error. Plain's scale stays if it is below 2**-122, or if
         weights reach 2**127.

Who reads which granularity (`compressed_tensors_args` is what the configuration says of it):

channel  compressed-tensors (Transformers) and vLLM, both linears and experts, activations per token as they come.
block    The same. vLLM wants blocks of 128 x 128, the outputs of gate and up divisible by 128 (and what tensor
         parallelism leaves of them), and activations in groups of 128 (compressed-tensors' FP8_BLOCK).
tensor   compressed-tensors, and linears in vLLM. Experts vLLM 0.32 loads if the activations are per tensor too, gives gate
         and up the larger scale of both, and then needs a kernel for weights by tensor and activations by 128, which only
         its Humming backend has (CompressedTensorsW8A8Fp8MoEMethod): take channel for experts.

Relative squared error (|w - dequantized|^2 / |w|^2) of [1024, 4096] weights, plain and search; a search of all bf16 scales
from amax / 640 to amax / 224 finds nothing lower. What is gained is the scale's place between two powers of two, and chance:
more of it the fewer weights share a scale.

          Gaussian          Student's t, 5 degrees of freedom
channel   .000708 .000659   .000698 .000639
block     .000709 .000680   .000703 .000669
tensor    .000706 .000698   .000705 .000698
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from quant.kernels import fp8 as kernels
from quant.kernels import fp8_search
from quant.kernels.bands import share
from quant.kernels.tiles import Source
from quant.schemes import NotFinite
from quant.schemes.arrays import Cost, results, source_of

Granularity = Literal["channel", "tensor", "block"]
Method = Literal["plain", "search"]
DTYPES = (np.uint8, np.uint16)  # of codes and of scales
BLOCK = int(kernels.BLOCK)  # outputs and inputs that share a scale

_BAND_ROWS = 64  # rows of the source in a band, where the scale of the whole matrix is looked for
_KERNEL = {"channel": kernels.CHANNEL, "block": kernels.BY_BLOCK, "tensor": kernels.TENSOR}
_CODES_PER_WORD = 4  # of the words that the kernel writes
_MANTISSA, _BIAS = 8, 7


def _values() -> NDArray[np.float32]:
    """The number that each code stands for: float8_e4m3fn, which has no infinities, and NaN in 0x7F and 0xFF alone."""
    codes = np.arange(128)
    exponent, mantissa = codes // _MANTISSA, codes % _MANTISSA
    small = mantissa / _MANTISSA * 2.0 ** (1 - _BIAS)
    positive = np.where(exponent == 0, small, (1 + mantissa / _MANTISSA) * 2.0 ** (exponent - _BIAS))
    positive[-1] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)


VALUES = _values()
VALUES.flags.writeable = False


@dataclass(frozen=True)
class Quantized(Cost):
    """A matrix of N outputs and K inputs in FP8, and what that cost."""

    codes: NDArray[np.uint8]  # [N, K], the bits of float8_e4m3fn: `weight`
    scale: NDArray[np.uint16]  # bf16 bits: `weight_scale`; see `Fp8.shapes`
    squared_error: float  # sum of (weight - scale * code)^2, the product not rounded to bf16
    squared_sum: float  # sum of weight^2


@dataclass(frozen=True)
class Fp8:
    """The scheme: which weights share a scale, and a method of the module's docstring."""

    granularity: Granularity = "channel"
    method: Method = "search"

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"granularity {self.granularity!r}: FP8 knows {', '.join(get_args(Granularity))}")
        if self.method not in get_args(Method):
            raise ValueError(f"method {self.method!r}: FP8 knows {', '.join(get_args(Method))}")

    def shapes(self, outputs: int, inputs: int) -> tuple[tuple[int, int], tuple[int, ...]]:
        """Shapes of the codes and of the scales: [N, 1], [1] or [N/128, K/128], both rounded up."""
        scale = {"channel": (outputs, 1), "tensor": (1,), "block": (-(-outputs // BLOCK), -(-inputs // BLOCK))}
        return (outputs, inputs), scale[self.granularity]

    def compressed_tensors_args(self) -> dict[str, dict[str, Any]]:
        """`weights` and `input_activations` of a config group of compressed-tensors, format `float-quantized`."""
        common = {"num_bits": 8, "type": "float", "symmetric": True}
        weights = {**common, "strategy": self.granularity, "dynamic": False}
        if self.granularity == "block":
            weights["block_structure"] = [BLOCK, BLOCK]
        activations: dict[str, dict[str, Any]] = {
            "channel": {"strategy": "token"},
            "tensor": {"strategy": "tensor"},
            "block": {"strategy": "group", "group_size": BLOCK},
        }
        dynamic = {**common, **activations[self.granularity], "dynamic": True}
        return {"weights": weights, "input_activations": dynamic}

    def quantize(
        self,
        bits: NDArray[np.uint16],
        *,
        in_out: bool,
        threads: int = 1,
        pool: Executor | None = None,
        out: tuple[NDArray[np.uint8], NDArray[np.uint16]] | None = None,
    ) -> Quantized:
        """Quantizes bf16 bits, [K, N] if `in_out` (Meta's and fused experts) and else [N, K]; the result is [N, K] of both.

        `bits` may be a slice as long as its last axis is contiguous. `out`: arrays for the codes and the scales (uint8, uint16,
        contiguous), instead of new ones. `threads` threads share the work, those of `pool` if one is given; the result
        is the same bytes for any number of them, on any machine. Needs 256 bytes an input and 0.7 MB a thread besides
        the result. The first call on a machine compiles for some seconds.

        Raises NotFinite, having looked at all of the matrix.
        """
        source = source_of(bits, in_out)
        inputs, outputs = bits.shape if in_out else bits.shape[::-1]
        codes, scale = results(out, *zip(self.shapes(outputs, inputs), DTYPES, strict=True))
        words = -(-inputs // _CODES_PER_WORD)
        whole = inputs % _CODES_PER_WORD == 0
        packed = codes.view(np.int32) if whole else np.empty((outputs, words), np.int32)
        scales = scale.reshape(-1, 1) if self.granularity == "tensor" else scale
        given, search = np.uint16(0), self.method == "search"
        if self.granularity == "tensor":
            given = scale[0] = _scale_of_all(source, bits.shape, search, threads, pool)
        bands = -(-outputs // BLOCK)
        sums = np.zeros((bands, 3))  # each band's own, added up in their order

        def work(drawn: Iterator[int]) -> None:
            buffers = kernels.buffers(inputs)
            for number in drawn:
                n = number * BLOCK
                kernels.quantize_band(
                    source, n, min(BLOCK, outputs - n), inputs, _KERNEL[self.granularity], search, given,
                    packed, scales, sums[number], buffers,
                )  # fmt: skip

        share(work, bands, threads, pool)
        if bad := int(sums[:, 2].sum()):
            raise NotFinite(bad, bits.size)
        if not whole:
            codes[...] = packed.view(np.uint8)[:, :inputs]
        return Quantized(codes, scale, math.fsum(sums[:, 0]), math.fsum(sums[:, 1]))

    def dequantize(
        self,
        codes: NDArray[np.uint8],
        scale: NDArray[np.uint16],
        *,
        dtype: Literal["BF16", "F32"] = "BF16",
        threads: int = 1,
        pool: Executor | None = None,
    ) -> NDArray[Any]:
        """scale * code as Transformers computes it, rounded to bf16 (uint16), or exact as float32, [N, K].

        vLLM multiplies codes and scales its sums: that is the exact product. `codes` and `scale` as `quantize` returns them.
        """
        outputs, inputs = codes.shape
        codes, scale = results((codes, scale), *zip(self.shapes(outputs, inputs), DTYPES, strict=True))
        codes, scales = codes.view(), scale.view() if scale.ndim == 2 else scale.reshape(1, 1)
        codes.flags.writeable = scales.flags.writeable = False  # one type for the kernel, whatever was given
        result = np.empty((outputs, inputs), np.uint16 if dtype == "BF16" else np.float32)
        per_scale = {"channel": 1, "block": BLOCK, "tensor": max(outputs, 1)}[self.granularity]

        def work(drawn: Iterator[int]) -> None:
            for number in drawn:
                rows = slice(number * BLOCK, (number + 1) * BLOCK)
                kernels.dequantize(codes[rows], scales, rows.start, per_scale, VALUES, result[rows])

        share(work, -(-outputs // BLOCK), threads, pool)
        return result


def _scale_of_all(
    source: Source, shape: tuple[int, ...], search: bool, threads: int, pool: Executor | None
) -> np.uint16:
    """The scale of the whole matrix. Raises NotFinite."""
    rows, columns = shape
    bands = -(-rows // _BAND_ROWS)
    found = np.zeros((bands, 2), np.int64)

    def work(drawn: Iterator[int]) -> None:
        for number in drawn:
            first = number * _BAND_ROWS
            found[number] = kernels.largest_magnitude(source, first, min(first + _BAND_ROWS, rows), columns)

    share(work, bands, threads, pool)
    if bad := int(found[:, 1].sum()):
        raise NotFinite(bad, rows * columns)
    plain = np.uint16(kernels.scale_bits(np.int16(found[:, 0].max(initial=0))))
    if not search:
        return plain
    powers = np.zeros((bands, int(fp8_search.MANTISSAS)), np.int64)

    def count(drawn: Iterator[int]) -> None:
        counts = fp8_search.counters()
        for number in drawn:
            first, last = number * _BAND_ROWS, min(number * _BAND_ROWS + _BAND_ROWS, rows)
            fp8_search.powers_of_rows(source, first, last, columns, plain, powers[number], counts)

    share(count, bands, threads, pool)
    return np.uint16(fp8_search.best_scale(powers.sum(0), plain, rows * columns))
