"""Weights to quantize, in bf16 made by hand: numpy has no such type."""

from __future__ import annotations

from typing import Any

import numpy as np


def bf16(values: Any) -> np.ndarray:
    """Bits of finite numbers rounded to bf16, ties to even."""
    wide = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def weights(kind: str, outputs: int, inputs: int, seed: int = 0, *, span: int = 30) -> np.ndarray:
    """[N, K] bf16 bits; of kind "any" each output has a magnitude of its own, 10 ** -span to 10 ** span."""
    random = np.random.default_rng(seed)
    drawn = {
        "gaussian": lambda: random.standard_normal((outputs, inputs)) / 32,
        "t5": lambda: random.standard_t(5, (outputs, inputs)) / 32,
        "any": lambda: random.standard_normal((outputs, inputs)) * 10.0 ** random.integers(-span, span, (outputs, 1)),
    }
    return bf16(drawn[kind]())
