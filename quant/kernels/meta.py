# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Compiled inner loops of Meta's own formats; `quant/formats/meta.py` says what they compute and calls them.

A matrix lies as checkpoints have it, [inputs, outputs], and a row of it is read and written front to back: one vector lane an
output. Sums of squares run over the inputs in their order, so that they do not depend on the machine's vector width.
"""

from __future__ import annotations

import numpy as np

from quant.kernels.jit import compiled, part

_LARGEST = np.float32(448)  # of e4m3
_LARGEST_BITS = np.uint32(0x43E00000)
_LEAST_SCALE = np.float32(1) / np.float32(448 * 512)
# A magnitude plus the float32 whose last bit is worth e4m3's there is rounded to e4m3, ties to even.
_TO_ROUNDER = np.uint32((23 - 3) << 23)
_LEAST_ROUNDER = np.uint32(0x46800000)  # 2**14: multiples of 2**-9, e4m3's smallest
_OFFSET = np.uint32(0x468)
_TOP, _EXPONENT = np.uint32(0x80000000), np.uint32(0x7F800000)
_INFINITY = np.uint16(0x7F80)


@part
def _widened(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@part
def _to_bf16(value):
    """Bits of a float32 rounded to bf16, ties to even; NaN stays NaN, as its lower bits are those of a bf16."""
    wide = np.float32(value).view(np.uint32)
    return np.uint16((wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def dequantize_fp8(codes, scales, values, result):
    """bf16 bits of value * scale; codes and result [rows, outputs], scales [outputs]."""
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            result[i, j] = _to_bf16(values[codes[i, j]] * scales[j])


@compiled
def dequantize_rows(codes, scales, values, result):
    """The same with the outputs first: codes and result [outputs, inputs], scales [outputs]."""
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            result[i, j] = _to_bf16(values[codes[i, j]] * scales[i])


@compiled
def dequantize_int4(packed, scales, first, group, result):
    """The same of bytes of two codes, the first input's in the low half: packed [rows, outputs], result [2 * rows, outputs].

    `scales` [groups, outputs]; `first` is the input that the first row of the result belongs to.
    """
    for i in range(packed.shape[0]):
        of_group = scales[(first + 2 * i) // group]
        for j in range(packed.shape[1]):
            byte = packed[i, j]
            low = np.int32(np.int8(byte << np.uint8(4))) >> np.int32(4)
            high = np.int32(np.int8(byte)) >> np.int32(4)
            result[2 * i, j] = _to_bf16(np.float32(low) * of_group[j])
            result[2 * i + 1, j] = _to_bf16(np.float32(high) * of_group[j])


@compiled
def quantize_fp8(bits, codes, scales, errors, powers):
    """bf16 bits [inputs, outputs] to codes in the same order and scales [outputs]; returns how many are not finite.

    `errors` and `powers` [outputs], float64: sums of the squared errors and of the squared weights.
    """
    inputs, outputs = bits.shape
    bad = 0
    largest = np.zeros(outputs, np.uint16)
    for i in range(inputs):
        for j in range(outputs):
            magnitude = bits[i, j] & np.uint16(0x7FFF)
            largest[j] = max(largest[j], magnitude)
            bad += magnitude >= _INFINITY
    if bad:
        return bad
    for j in range(outputs):
        scales[j] = max(_widened(largest[j]) / _LARGEST, _LEAST_SCALE)
        errors[j] = powers[j] = 0.0
    for i in range(inputs):
        for j in range(outputs):
            weight = _widened(bits[i, j])
            quotient = np.float32(weight / scales[j]).view(np.uint32)
            sign = np.uint32(quotient & _TOP)
            total = np.uint32(min(np.uint32(quotient & ~_TOP), _LARGEST_BITS))
            rounder = np.uint32(max(np.uint32(np.uint32(total & _EXPONENT) + _TO_ROUNDER), _LEAST_ROUNDER))
            rounded = np.float32(total.view(np.float32) + rounder.view(np.float32))
            code = np.uint32(np.uint32(rounder >> np.uint32(20)) + np.uint32(rounded.view(np.uint32) - rounder))
            codes[i, j] = np.uint8(np.uint32(code - _OFFSET) | np.uint32(sign >> np.uint32(24)))
            value = np.uint32(np.float32(rounded - rounder.view(np.float32)).view(np.uint32) | sign)
            error = np.float64(weight) - np.float64(value.view(np.float32)) * np.float64(scales[j])
            errors[j] += error * error
            powers[j] += np.float64(weight) * np.float64(weight)
    return bad
