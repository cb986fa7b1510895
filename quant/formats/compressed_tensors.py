"""compressed-tensors, as vLLM, SGLang and Transformers load it: `pack-quantized` int4.

A Linear [N out, K in] in groups of G inputs becomes `weight_packed` int32 [N, K/8], `weight_scale` bf16 [N, K/G] and
`weight_shape` int64 [2]. A word holds eight neighbouring codes of a row, the first in the lowest four bits, each plus 8.
The packing is `pack_to_int32` of compressed_tensors/compressors/pack_quantized/helpers.py (0.20); the kernels of
`quant.schemes.int4` write the same words directly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CODES_PER_WORD = 8
_BITS = 4
_OFFSET = 8  # codes -8 .. 7 are stored as 0 .. 15
_SHIFTS = np.arange(CODES_PER_WORD, dtype=np.uint32) * np.uint32(_BITS)


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.int32]:
    """Codes -8 .. 7, int8 [N, K], as words, int32 [N, K/8]. K must be a multiple of 8."""
    rows, columns = codes.shape
    if columns % CODES_PER_WORD:
        raise ValueError(f"{columns} codes a row do not fill words of {CODES_PER_WORD}")
    if codes.size and (codes.min() < -_OFFSET or codes.max() >= _OFFSET):
        raise ValueError(f"codes from {codes.min()} to {codes.max()}: 4 bits hold {-_OFFSET} to {_OFFSET - 1}")
    unsigned = (codes.astype(np.int16) + _OFFSET).astype(np.uint32)
    shifted = unsigned.reshape(rows, columns // CODES_PER_WORD, CODES_PER_WORD) << _SHIFTS
    words: NDArray[np.uint32] = np.bitwise_or.reduce(shifted, axis=-1)
    return words.view(np.int32)


def unpack_int4(packed: NDArray[np.int32]) -> NDArray[np.int8]:
    """The inverse of `pack_int4`: int32 [N, K/8] to int8 [N, K]."""
    rows, words = packed.shape
    nibbles = (packed.view(np.uint32)[..., None] >> _SHIFTS) & np.uint32(0xF)
    return (nibbles.astype(np.int8) - np.int8(_OFFSET)).reshape(rows, words * CODES_PER_WORD)


def weight_shape(out_features: int, in_features: int) -> NDArray[np.int64]:
    """`weight_shape` of a Linear, int64 [2]: the words alone do not tell the shape."""
    return np.array([out_features, in_features], np.int64)
