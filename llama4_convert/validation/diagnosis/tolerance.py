"""What all hypotheses share: when two arrays hold the same numbers, and how a finding is worded. Pure, on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]
_BAND_NUMBERS = 1 << 22  # whose differences are summed up together
# Half a unit in the last place, of numbers near a power of two.
ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-24}


@dataclass(frozen=True)
class Diagnosis:
    """How a tensor is wrong: a word for programs and a sentence for people."""

    kind: str
    cause: str

    def together(self) -> Diagnosis:
        """Found on a gate and an up projection that were fused."""
        return Diagnosis(self.kind, f"{self.cause}, gate and up together")


class Ambiguous(Exception):
    """Several causes explain the numbers equally, as where experts, heads or rows are equal: none is claimed."""


@dataclass(frozen=True)
class Tolerance:
    """When two arrays hold the same numbers: bit by bit, or within a relative squared error of `limit`."""

    limit: float = 0.0

    def __call__(self, x: Array, y: Array) -> bool:
        return self._within(x, y, self.limit)

    def near(self, x: Array, y: Array) -> bool:
        """For a sample, whose error is not the whole's."""
        return self._within(x, y, 2 * self.limit)

    def _within(self, x: Array, y: Array, limit: float) -> bool:
        if x.shape != y.shape:
            return False
        return relative_error(x, y) <= limit if self.limit else np.array_equal(x, y)


EXACT = Tolerance()


def relative_error(x: Array, y: Array) -> float:
    """Squared difference over x squared, of numbers; infinite where x is zero and y is not."""
    error = power = 0.0
    # Some rows at a time, so that a matrix of float32 needs no third one beside the two.
    step = max(1, _BAND_NUMBERS // max(1, prod(x.shape[1:])))
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(x), step):
            some = x[start : start + step]
            difference = (y[start : start + step] - some).ravel()
            error, power = error + float(np.vdot(difference, difference)), power + float(np.vdot(some, some))
    return error / power if power else (0.0 if error == 0 else np.inf)


def floats(x: Array, dtype: str) -> Floats:
    """Raw bits as float32; numbers as they are."""
    from llama4.loading import to_tensor

    if x.dtype == np.float32:
        return x
    numbers: Floats = to_tensor(np.ascontiguousarray(x), dtype).float().numpy()
    return numbers


def as_matrix(x: Array) -> Array:
    """A vector as a column; a matrix as it is."""
    return x.reshape(-1, 1) if x.ndim < 2 else x.reshape(x.shape[0], prod(x.shape[1:]))


def some_of(size: int, count: int) -> NDArray[np.intp]:
    """Up to `count` of `size` indices, always the same ones, ascending."""
    if size <= count:
        return np.arange(size)
    return np.unique(np.random.default_rng(0).integers(size, size=count))


def divisors(n: int, most: int = 64) -> list[int]:
    """From 2 on, ascending, n itself left out."""
    return [d for d in range(2, min(n - 1, most) + 1) if n % d == 0]


def listed(numbers: Sequence[int] | NDArray[np.intp], most: int = 8) -> str:
    """3, 5 or 0..7, short."""
    numbers = [int(n) for n in numbers]
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return ", ".join(map(str, numbers[:most])) + (f" and {len(numbers) - most} more" if len(numbers) > most else "")
