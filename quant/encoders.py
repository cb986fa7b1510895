"""A scheme in a format: the tensors that a matrix becomes, and how they become a matrix again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from quant.encoding import Bits, Encoded, Encoder, Output
from quant.formats.compressed_tensors import weight_shape
from quant.recipe import Scheme
from quant.schemes.fp8 import Fp8
from quant.schemes.int4 import Int4

if TYPE_CHECKING:
    from quant.schemes.nf4 import Nf4

_S = TypeVar("_S", Int4, Fp8, "Nf4")


def encoder_for(scheme: Scheme, device: str = "cpu") -> Encoder:
    """The encoder of a rule's scheme. No scheme is written in two formats, so the scheme decides.

    `device`: "cpu" for the compiled kernels; "cuda", "cuda:1" and so on for the same bytes from a GPU; "torch-cpu" for the
    GPU's code without a GPU (slow, for tests). Raises ValueError for a device that torch does not have.
    """
    if scheme.kind == "int4":
        return PackQuantized(_on(device, Int4(scheme.group_size, scheme.method)))
    if scheme.kind == "fp8":
        return FloatQuantized(_on(device, Fp8(scheme.granularity, scheme.method)))  # type: ignore[arg-type]  # not "signed"
    from quant.formats.bitsandbytes import Nf4Matrix

    matrix = Nf4Matrix(scheme.block_size, scheme.double_quant)
    matrix.scheme = _on(device, matrix.scheme)
    return matrix


def _on(device: str, scheme: _S) -> _S:
    if device == "cpu":
        return scheme
    from quant.torch_backend import on_device  # and with it torch

    return on_device(scheme, device)


class PackQuantized:
    """int4 in compressed-tensors: words of eight codes, a bf16 scale for each group, and the shape of the matrix."""

    def __init__(self, scheme: Int4) -> None:
        self.scheme = scheme

    def outputs(self, n: int, k: int) -> tuple[Output, ...]:
        packed, scale = self.scheme.shapes(n, k)
        return (
            Output("weight_packed", "I32", packed),
            Output("weight_scale", "BF16", scale),
            Output("weight_shape", "I64", (2,), weight_shape(n, k).tobytes()),
        )

    def encode(self, bits: Bits, in_out: bool, threads: int) -> Encoded:
        made = self.scheme.quantize(bits, in_out=in_out, threads=threads)
        return Encoded((made.packed, made.scale), made.squared_error, made.squared_sum)

    def decode(self, parts: Mapping[str, NDArray[Any]], n: int, k: int, threads: int = 1) -> Bits:
        """bf16 bits [n, k], or the rows of which `parts` holds the words and scales, which may be float32."""
        packed, scale = parts["weight_packed"].view(np.int32), parts["weight_scale"]
        if scale.itemsize == 4:
            scale = scale.view(np.float32)
        result: Bits = self.scheme.dequantize(packed, scale, threads=threads)
        return result


class FloatQuantized:
    """FP8 in compressed-tensors: a byte for each code, and bf16 scales."""

    def __init__(self, scheme: Fp8) -> None:
        self.scheme = scheme

    def outputs(self, n: int, k: int) -> tuple[Output, ...]:
        codes, scale = self.scheme.shapes(n, k)
        return Output("weight", "F8_E4M3", codes), Output("weight_scale", "BF16", scale)

    def encode(self, bits: Bits, in_out: bool, threads: int) -> Encoded:
        made = self.scheme.quantize(bits, in_out=in_out, threads=threads)
        return Encoded((made.codes, made.scale), made.squared_error, made.squared_sum)

    def decode(self, parts: Mapping[str, NDArray[Any]], n: int, k: int, threads: int = 1) -> Bits:
        """bf16 bits [n, k], or the rows of which `parts` holds codes and scales, where each row has its own."""
        result: Bits = self.scheme.dequantize(parts["weight"], parts["weight_scale"], threads=threads)
        return result
