"""Weights to quantize, in bf16 made by hand: numpy has no such type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quant.schemes.nf4 import dynamic_map


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


def bitsandbytes() -> Any:
    """Its functions, with a map for nested scales that was rounded as on nearly all processors: see `test_nf4`."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="pip install --no-deps bitsandbytes==0.50.2")
    functional.name2qmap["dynamic"] = pytest.importorskip("torch").tensor(dynamic_map())
    return functional
