"""What passes: limits by what the candidate is, and from which error on a layer has not merely rounded. docs/validate.md
has the measurements behind each number."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from llama4_convert.errors import UsageError


@dataclass(frozen=True)
class Kind:
    """Candidates that err alike: by the dtype that both models compute in, or by the coarsest scheme that quantized one."""

    gates: Mapping[str, float]  # largest value that passes; of top1_agreement and cosine the smallest
    local_nmse: float  # a layer that was given the reference's input, and strays further, has an error of its own
    near_tie: float  # nats between the two likeliest tokens, below which either may come first


EXACT: Mapping[str, Kind] = {
    "float32": Kind({"top1_agreement": 0.999, "kl_mean": 1e-6, "kl_p999": 1e-5, "nmse": 1e-8}, 1e-8, 1e-4),
    "bfloat16": Kind({"top1_agreement": 0.9, "kl_mean": 5e-3, "kl_p999": 0.5, "nmse": 1e-2}, 1e-3, 0.05),
    "float16": Kind({"top1_agreement": 0.97, "kl_mean": 3e-4, "kl_p999": 0.05, "nmse": 5e-4}, 1e-5, 0.01),
}
# Whatever dtype they compute in; the coarsest scheme first.
QUANTIZED: Mapping[str, Kind] = {
    "int4": Kind({"top1_agreement": 0.4, "kl_mean": 0.2, "kl_p999": 3.0, "nmse": 0.3}, 0.15, 0.3),
    "nf4": Kind({"top1_agreement": 0.4, "kl_mean": 0.2, "kl_p999": 3.0, "nmse": 0.3}, 0.15, 0.3),
    "fp8": Kind({"top1_agreement": 0.7, "kl_mean": 0.02, "kl_p999": 1.0, "nmse": 0.05}, 0.01, 0.1),
}
AT_LEAST = ("top1_agreement", "cosine")
GATE_NAMES = ("top1_agreement", "kl_mean", "kl_median", "kl_p999", "nmse", "max_abs_diff", "cosine")
DTYPES = tuple(EXACT)


def kind_of(dtype: str, schemes: Collection[str]) -> tuple[str, Kind]:
    """The candidate's kind and its name: "exact", or the coarsest of the schemes that it has and the reference has not."""
    for name, kind in QUANTIZED.items():
        if name in schemes:
            return name, kind
    return "exact", EXACT[dtype]


def check(dtype: str, overrides: Mapping[str, float]) -> None:
    """Raises UsageError for an unknown dtype or gate, or a limit that is not finite."""
    if dtype not in EXACT:
        raise UsageError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    for name in overrides:
        if name not in GATE_NAMES:
            raise UsageError(f"unknown gate {name!r}: choose one of {', '.join(GATE_NAMES)}")
        if not math.isfinite(overrides[name]):
            raise UsageError(f"gate {name} must be a finite number, not {overrides[name]}")


def within(name: str, value: float | int | None, limit: float) -> bool:
    """Whether a metric passes; None, which stands for NaN and infinities, never does."""
    if value is None:
        return False
    return value >= limit if name in AT_LEAST else value <= limit
