"""How far a quantized matrix is from the original: relative mean squared error, and signal to quantization noise in dB."""

from __future__ import annotations

import math


def relative_mse(squared_error: float, squared_sum: float) -> float:
    """Error over power; 0 for a matrix of zeros."""
    return squared_error / squared_sum if squared_sum else 0.0


def sqnr_db(relative: float) -> float | None:
    """Signal to quantization noise, in decibels; None where there is no noise."""
    return -10 * math.log10(relative) if relative > 0 else None
