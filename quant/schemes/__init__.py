"""Schemes: pure functions from weights to codes and scales, each with its inverse. And what can be wrong with weights."""

from __future__ import annotations


class NotFinite(ValueError):
    """Weights that are NaN or infinite have no scale."""

    def __init__(self, count: int, total: int) -> None:
        super().__init__(
            f"{count:,} of {total:,} weights are NaN or infinite and cannot be quantized: leave this one as it is"
        )
        self.count = count


class Indivisible(ValueError):
    """The inputs of a matrix are no multiple of the group size."""

    def __init__(self, inputs: int, group_size: int) -> None:
        super().__init__(
            f"{inputs:,} inputs do not divide by the group size {group_size} ({inputs % group_size} are left over): "
            "take a smaller group, or leave this matrix as it is"
        )
