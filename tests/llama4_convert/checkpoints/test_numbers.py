"""Casts on raw bytes against torch's `.to()`: bit by bit, except that a NaN only has to stay a NaN."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llama4_convert.checkpoints.numbers import cast

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


def fp32_patterns() -> NDArray[np.uint32]:
    """Specials and their neighbours, every half-way point of bf16, every fp16 value and what lies beside it, random bits."""
    specials = np.array(
        [
            *(0, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF),
            *(0x7F7F7FFF, 0x7F7F8000, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x477FF001),
            *(0x33000000, 0x33000001, 0x33800000, 0x387FE000),
        ],
        np.uint32,
    )
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    near_bf16 = np.concatenate([upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    near_fp16 = np.concatenate([halves, halves + 0x0FFF, halves + 0x1000, halves + 0x1001])
    random = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    return np.concatenate([specials, specials | 0x80000000, near_bf16, near_fp16, random])


def patterns(dtype: str) -> NDArray[np.generic]:
    return fp32_patterns() if dtype == "F32" else np.arange(1 << 16, dtype=np.uint16)


def as_torch(bits: NDArray[np.generic], dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int32 if dtype == "F32" else np.int16).copy()).view(DTYPES[dtype])


def bits_of(tensor: torch.Tensor, dtype: str) -> NDArray[np.generic]:
    return tensor.view(torch.int32 if dtype == "F32" else torch.int16).numpy().view(BITS[dtype])


@pytest.mark.parametrize(("source", "target"), list(product(DTYPES, DTYPES)))
def test_every_number_becomes_what_torch_makes_of_it(source: str, target: str) -> None:
    bits = patterns(source)
    before = as_torch(bits, source)
    after = before.to(DTYPES[target])
    data, overflowed = cast(bits.tobytes(), source, target)
    found = np.frombuffer(data, BITS[target])
    nan = before.isnan().numpy()
    np.testing.assert_array_equal(found[~nan], bits_of(after, target)[~nan])
    assert as_torch(found, target).isnan().numpy()[nan].all(), "a NaN became a number"
    assert overflowed == int((before.isfinite() & after.isinf()).sum())
    assert len(data) == len(bits) * BITS[target]().itemsize


@pytest.mark.parametrize(
    ("source", "target", "values", "expected"),
    [
        ("F32", "F16", [65504.0, 65519.996, -65504.0, float("inf"), float("nan")], 0),
        ("F32", "F16", [65520.0, -65520.0, 1e38, 1.0], 3),
        ("BF16", "F16", [65280.0, 65536.0, -3e38], 2),
        ("F32", "BF16", [3.3895313892515355e38, 3.4028234663852886e38, -3.4028234663852886e38], 2),
        ("F16", "BF16", [65504.0], 0),
    ],
)
def test_finite_numbers_that_become_infinite_are_counted(
    source: str, target: str, values: list[float], expected: int
) -> None:
    data = bits_of(torch.tensor(values).to(DTYPES[source]), source).tobytes()
    assert cast(data, source, target)[1] == expected


def test_a_memoryview_will_do_and_nothing_becomes_nothing() -> None:
    data = np.array([1.0, -2.0], np.float32).tobytes()
    assert cast(memoryview(data), "F32", "BF16") == (b"\x80\x3f\x00\xc0", 0)
    assert cast(b"", "F32", "F16") == (b"", 0)
