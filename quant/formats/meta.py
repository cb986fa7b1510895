"""Meta's own quantized checkpoints: what `llama4/scripts/quantize.py` of llama-models writes for a layer's routed experts.

A rank's experts stay under their keys, as codes of type float8_e4m3fn, and their scales come in a file of their own beside
the rank's, `fp8_scales_N.pt` or `int4_scales_N.pt`, under `layers.L.feed_forward.experts.w1` (gate), `.w3` (up) and `.w2`
(down). With an expert of K inputs and N outputs on this rank, stored [K, N]:

fp8    codes [E * K, N], bytes of e4m3; scales float32 [E, N]. One scale an output: max(largest magnitude / 448, 1 / (448 * 512)),
       and a code is weight / scale rounded to e4m3, ties to even, limited to +-448. That is `quantize_fp8_per_row` of
       FBGEMM's gen_ai (fbgemm_gpu/experimental/gen_ai/src/quantize/quantize.cu), which is given the transposed experts.
int4   two codes -8 .. 7 a byte, inputs 2j and 2j + 1 of one output, the first in the low half: [E * K / 2, N], called
       float8_e4m3fn although they are none; scales float32 [E, K / 128, N], one for each group of 128 inputs.

A rank's outputs of w2 are sums over its own slice of F: each rank has scales of its own for the same output, and what they
scale cannot be joined before it is dequantized. Layer 0, the last one, dense layers and shared experts stay as they are: Meta's
loader expects it so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quant.encoding import Bits, Encoded, Output, transposed
from quant.formats.compressed_tensors import CODES_PER_WORD, weight_shape
from quant.schemes import Indivisible, NotFinite

# The last part of an experts' key, in the published spelling or in that of Meta's modules -> the last part of its scales' key.
_PUBLISHED = {"moe_w_in_eD_F": "w1", "moe_w_swiglu_eD_F": "w3", "moe_w_out_eF_D": "w2"}
SCALE_NAMES = _PUBLISHED | {name: name for name in _PUBLISHED.values()}


def scale_key(key: str) -> str | None:
    """The key of the scales that belong to an experts' key; None for any other key."""
    prefix, _, name = key.rpartition(".")
    return f"{prefix}.{SCALE_NAMES[name]}" if prefix.endswith(".experts") and name in SCALE_NAMES else None


class MetaFp8:
    """Meta's FP8: codes of e4m3, one row for each input."""

    kind = "fp8"  # the scheme's name in recipes
    inputs_a_row = 1  # of the codes
    scales_file = "fp8_scales_{}.pt"  # with a place for the rank

    def scales_shape(self, k: int, n: int) -> tuple[int, ...]:
        """The shape of the scales of an expert with `k` inputs and `n` outputs."""
        return (n,)

    def decode(self, codes: NDArray[np.uint8], scales: NDArray[np.float32], first: int, result: Bits) -> None:
        """Rows of codes [rows, n] of one expert into `result`, bf16 bits [rows * inputs_a_row, n].

        `scales` are all of the expert's; `first` is the input that the first row of the result belongs to. Each number is
        scale * code in float32, rounded to bf16.
        """
        from quant.kernels.meta import dequantize_fp8
        from quant.schemes.fp8 import VALUES

        dequantize_fp8(codes, scales, VALUES, result)


class MetaInt4:
    """Meta's int4: a byte has the codes of two inputs."""

    kind = "int4"
    inputs_a_row = 2
    scales_file = "int4_scales_{}.pt"
    group_size = 128

    def scales_shape(self, k: int, n: int) -> tuple[int, ...]:
        """The shape of the scales of an expert with `k` inputs and `n` outputs. Raises Indivisible."""
        if k % self.group_size:
            raise Indivisible(k, self.group_size)
        return (k // self.group_size, n)

    def decode(self, codes: NDArray[np.uint8], scales: NDArray[np.float32], first: int, result: Bits) -> None:
        """Rows of codes [k / 2, n] of one expert into `result`, bf16 bits [k, n]; see `MetaFp8.decode`."""
        from quant.kernels.meta import dequantize_int4

        dequantize_int4(codes, scales, first, self.group_size, result)


MetaFormat = MetaFp8 | MetaInt4
FORMATS: tuple[MetaFormat, ...] = (MetaFp8(), MetaInt4())


class MetaRows:
    """Codes and scales of Meta's in compressed-tensors, with the scales in float32: codes [N, K], scales [N, 1]."""

    def decode(self, parts: Mapping[str, NDArray[Any]], n: int, k: int, threads: int = 1) -> Bits:
        """bf16 bits [n, k], or the rows of which `parts` holds codes and scales: the float32 product, rounded."""
        from quant.kernels.meta import dequantize_rows
        from quant.schemes.fp8 import VALUES

        codes, scales = parts["weight"], parts["weight_scale"].view(np.float32)
        result = np.empty(codes.shape, np.uint16)
        dequantize_rows(codes, scales.reshape(-1), VALUES, result)
        return result


class MetaWords:
    """Meta's int4 codes in compressed-tensors; their scales, in float32, are copied beside them: no number is changed."""

    def outputs(self, n: int, k: int) -> tuple[Output, ...]:
        return (
            Output("weight_packed", "I32", (n, k // CODES_PER_WORD)),
            Output("weight_shape", "I64", (2,), weight_shape(n, k).tobytes()),
        )

    def encode(self, bits: NDArray[Any], in_out: bool, threads: int) -> Encoded:
        """`bits`: codes as Meta's files have them, [k / 2, n]."""
        assert in_out
        # Neighbours share a byte in either format, the first in the low half; -8 .. 7 is stored as it is there, and plus 8 here.
        return Encoded(((transposed(bits) ^ np.uint8(0x88)).view("<i4"),), 0.0, 0.0)


class Quantized(NamedTuple):
    """An expert's matrix on one rank, [K inputs, N outputs], in FP8, and the error in sums of squares."""

    codes: NDArray[np.uint8]  # [K, N]
    scales: NDArray[np.float32]  # [N]
    squared_error: float
    squared_sum: float


def quantize_fp8(bits: Bits) -> Quantized:
    """An expert's matrix on one rank, bf16 bits [K, N], as Meta's script quantizes it. Raises NotFinite."""
    from quant.kernels import meta as kernels

    inputs, outputs = bits.shape
    codes, scales = np.empty((inputs, outputs), np.uint8), np.empty(outputs, np.float32)
    errors, powers = np.zeros(outputs), np.zeros(outputs)
    found: Any = kernels.quantize_fp8(np.ascontiguousarray(bits), codes, scales, errors, powers)
    if found:
        raise NotFinite(int(found), bits.size)
    return Quantized(codes, scales, math.fsum(errors), math.fsum(powers))
