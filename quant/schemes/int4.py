"""int4, symmetric, one bf16 scale for each group of neighbouring inputs of an output (W4A16).

A weight is stored as code q in -8 .. 7 and read as scale * q. Three ways to the scale:

plain    amax / 7.5, all in bf16, divided in bf16: what compressed-tensors and llm-compressor do, bit for bit
         (calculate_qparams and quantize of compressed_tensors 0.20, min-max observer). A scale of 0 becomes bf16's epsilon.
search   For fixed codes q of weights x the error |x - s q|^2 is least at s = <x,q> / <q,q>, and is then
         <x,x> - <x,q>^2 / <q,q>. So seven clips c * amax / 7.5 only propose codes, the largest <x,q>^2 / <q,q> wins, and
         is refined by its neighbours below and above, twice. The winner's s is rounded to bf16 and the codes follow from
         it: the nearest to x / scale, ties to even. Where amax / 7.5 does better in the end it is taken.
signed   The same with five times the clips, for the group and for its mirror image: a mirrored group has a negative
         scale, and its extreme on the side where there is one code more. The least error of all, in more than
         twice the time; legal in the format, but kernels with int8 activations of some runtimes mishandle negative scales.

Relative squared error (|w - dequantized|^2 / |w|^2), groups of 128: Gaussian weights .0123, .0102, .0093; Student's t with
5 degrees of freedom .0264, .0217, .0195. `search` is within 0.1 % of every bf16 scale tried, `signed` within 0.02 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from quant.kernels import int4 as kernels
from quant.kernels.bands import share
from quant.kernels.tiles import LANES
from quant.schemes import Indivisible, NotFinite
from quant.schemes.arrays import Cost, results, source_of

Method = Literal["plain", "search", "signed"]
GROUP_SIZES = (32, 64, 128)

DTYPES = (np.int32, np.uint16)  # of words and of scales
CODES_PER_WORD = int(kernels.CODES_PER_WORD)
_LANES = int(LANES)
_BAND_INPUTS = 1024  # inputs of a band; with LANES outputs the unit that threads share
_PLAIN_RANGE = 7.5  # half of what 16 codes span
_SYMMETRIC = _PLAIN_RANGE / 7  # the extreme on code 7 or -7: finds weights again that were int4 without -8 before
# Clips as parts of amax / 7.5, an even number; a negative one is for the mirror image of what it is proposed for. The
# kernel itself tries 1 for search; signed has its extreme on -8, not on 7.5.
PROPOSALS = {
    "plain": np.zeros(0, np.float32),
    "search": np.array([*np.linspace(0.64, 0.94, 5), _SYMMETRIC], np.float32),
    "signed": np.array([*np.linspace(0.55, 1, 20), *-np.linspace(0.6, _SYMMETRIC, 14)], np.float32),
}
# Then, one after the other, how far below and above the best clip so far: half the distance of the clips, and a quarter.
STEPS = {
    "plain": np.zeros(0, np.float32),
    "search": np.array([0.03, 0.015], np.float32),
    "signed": np.array([0.012, 0.006], np.float32),
}


@dataclass(frozen=True, eq=False)
class Quantized(Cost):
    """A matrix of N outputs and K inputs in int4, and what that cost."""

    packed: NDArray[np.int32]  # [N, K/8], see quant.formats.compressed_tensors
    scale: NDArray[np.uint16]  # [N, K/group], bf16 bits
    squared_error: float  # sum of (weight - scale * code)^2, the product not rounded to bf16
    squared_sum: float  # sum of weight^2


@dataclass(frozen=True)
class Int4:
    """The scheme: a group size of 32, 64 or 128 and a method of the module's docstring."""

    group_size: int = 128
    method: Method = "search"

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size {self.group_size}: int4 has groups of {', '.join(map(str, GROUP_SIZES))}")
        if self.method not in get_args(Method):
            raise ValueError(f"method {self.method!r}: int4 knows {', '.join(get_args(Method))}")

    def shapes(self, outputs: int, inputs: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the packed words and of the scales. Raises Indivisible."""
        if inputs % self.group_size:
            raise Indivisible(inputs, self.group_size)
        return (outputs, inputs // CODES_PER_WORD), (outputs, inputs // self.group_size)

    def quantize(
        self,
        bits: NDArray[np.uint16],
        *,
        in_out: bool,
        threads: int = 1,
        pool: Executor | None = None,
        out: tuple[NDArray[np.int32], NDArray[np.uint16]] | None = None,
    ) -> Quantized:
        """Quantizes bf16 bits, [K, N] if `in_out` (Meta's and fused experts) and else [N, K]; the result is [N, ...] of both.

        `bits` may be a slice as long as its last axis is contiguous. `out`: arrays for the words and the scales (int32, uint16,
        contiguous), instead of new ones. `threads` threads share the work, of `pool` if one is given (never the
        pool that the call itself runs in: it would wait for itself); the result is the same bytes for any number of them,
        on any machine. Needs 0.2 MB a thread besides the result. The first call on a machine compiles for some seconds.

        Raises Indivisible if K is no multiple of the group size and NotFinite, having looked at all of the matrix.
        """
        source = source_of(bits, in_out)
        inputs, outputs = bits.shape if in_out else bits.shape[::-1]
        packed, scale = results(out, *zip(self.shapes(outputs, inputs), DTYPES, strict=True))
        groups, band = inputs // self.group_size, _BAND_INPUTS // self.group_size
        bands = [(n, g) for g in range(0, groups, band) for n in range(0, outputs, _LANES)]
        search = kernels.Search(PROPOSALS[self.method], STEPS[self.method], self.method == "signed")
        sums = np.zeros((len(bands), 3))  # each band's own, added up in their order

        def work(drawn: Iterator[int]) -> None:
            buffers = kernels.buffers(self.group_size)
            for number in drawn:
                n, g = bands[number]
                kernels.quantize_band(
                    source, n, min(_LANES, outputs - n), g, min(g + band, groups), self.group_size, search,
                    packed, scale, sums[number], buffers,
                )  # fmt: skip

        share(work, len(bands), threads, pool)
        if bad := int(sums[:, 2].sum()):
            raise NotFinite(bad, bits.size)
        return Quantized(packed, scale, math.fsum(sums[:, 0]), math.fsum(sums[:, 1]))

    def dequantize(
        self,
        packed: NDArray[np.int32],
        scale: NDArray[np.uint16] | NDArray[np.float32],
        *,
        dtype: Literal["BF16", "F32"] = "BF16",
        threads: int = 1,
        pool: Executor | None = None,
    ) -> NDArray[Any]:
        """What runtimes compute with: scale * code as bf16 bits (uint16) or as float32, exact of bf16 scales, [N, K].

        `packed` and `scale` as `quantize` returns them, or rows of these; the scales may be float32.
        """
        outputs, words = packed.shape
        inputs = words * CODES_PER_WORD
        dtypes = (np.int32, np.float32 if scale.dtype == np.float32 else np.uint16)
        packed, scale = results((packed, scale), *zip(self.shapes(outputs, inputs), dtypes, strict=True))
        if scale.dtype != np.float32:
            scale = (scale.astype(np.uint32) << np.uint32(16)).view(np.float32)
        packed, scale = packed.view(), scale.view()
        packed.flags.writeable = scale.flags.writeable = False  # one type for the kernel, whatever was given
        result = np.empty((outputs, inputs), np.uint16 if dtype == "BF16" else np.float32)

        def work(drawn: Iterator[int]) -> None:
            for number in drawn:
                rows = slice(number * _LANES, (number + 1) * _LANES)
                kernels.dequantize(packed[rows], scale[rows], self.group_size, result[rows])

        share(work, -(-outputs // _LANES), threads, pool)
        return result
