# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Compiled inner loops of Meta's own formats; `quant/formats/meta.py` says what they compute and calls them.

A matrix lies as checkpoints have it, [inputs, outputs], and a row of it is read and written front to back: one vector lane an
output. Sums of squares run over the inputs in their order, so that they do not depend on the machine's vector width.
"""

from __future__ import annotations

import numpy as np

from quant.kernels import e4m3
from quant.kernels.bf16 import INFINITY, to_bf16, widened
from quant.kernels.jit import compiled

_LEAST_SCALE = np.float32(1) / np.float32(448 * 512)
_OFFSET = np.uint32(e4m3.OFFSET)


@compiled
def dequantize_fp8(codes, scales, values, result):
    """bf16 bits of value * scale; codes and result [rows, outputs], scales [outputs]."""
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            result[i, j] = to_bf16(values[codes[i, j]] * scales[j])


@compiled
def dequantize_rows(codes, scales, values, result):
    """bf16 bits of value * scale with the outputs first: codes and result [outputs, inputs], scales [outputs]."""
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            result[i, j] = to_bf16(values[codes[i, j]] * scales[i])


@compiled
def dequantize_int4(packed, scales, first, group, result):
    """bf16 bits of code * scale from bytes of two codes, the first input's in the low half.

    `packed` [rows, outputs], `result` [2 * rows, outputs], `scales` [groups, outputs]; `first` is the input that the first row
    of the result belongs to.
    """
    for i in range(packed.shape[0]):
        group_scales = scales[(first + 2 * i) // group]
        for j in range(packed.shape[1]):
            byte = packed[i, j]
            low = np.int32(np.int8(byte << np.uint8(4))) >> np.int32(4)
            high = np.int32(np.int8(byte)) >> np.int32(4)
            result[2 * i, j] = to_bf16(np.float32(low) * group_scales[j])
            result[2 * i + 1, j] = to_bf16(np.float32(high) * group_scales[j])


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
            bad += magnitude >= INFINITY
    if bad:
        return bad
    for j in range(outputs):
        scales[j] = max(widened(largest[j]) / e4m3.LARGEST, _LEAST_SCALE)
        errors[j] = powers[j] = 0.0
    for i in range(inputs):
        for j in range(outputs):
            weight = widened(bits[i, j])
            quotient = np.float32(weight / scales[j])
            rounder = e4m3.rounder(e4m3.magnitude(quotient))
            total = np.float32(e4m3.magnitude(quotient) + rounder)
            sign = e4m3.sign(quotient)
            codes[i, j] = np.uint8(np.uint32(e4m3.code(total, rounder) - _OFFSET) | np.uint32(sign >> np.uint32(24)))
            value = np.uint32(np.float32(total - rounder).view(np.uint32) | sign)
            error = np.float64(weight) - np.float64(value.view(np.float32)) * np.float64(scales[j])
            errors[j] += error * error
            powers[j] += np.float64(weight) * np.float64(weight)
    return bad
