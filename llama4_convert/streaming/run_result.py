"""What a run found out while it wrote: errors of quantized matrices, NaN and infinities, overflows of a cast."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llama4_convert.checkpoints.numbers import NonFinite


@dataclass
class RunResult:
    """Collected while files are written; `count` and `taken_nonfinite` are called file by file."""

    overflows: dict[str, int] = field(default_factory=dict)  # finite numbers that a cast made infinite, by tensor
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # by module: sums of squares, error and weight
    nonfinite: dict[str, NonFinite] = field(default_factory=dict)  # by tensor, where there are any
    scales: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # by key, for the file that is written next

    def count(self, name: str, found: NonFinite) -> None:
        """Add to the NaN and infinities of the tensor `name`."""
        if any(found):
            before = self.nonfinite.get(name, NonFinite())
            self.nonfinite[name] = NonFinite(before.nan + found.nan, before.inf + found.inf)

    def taken_nonfinite(self) -> dict[str, NonFinite]:
        """The counts since the last call, by tensor; the next call begins anew."""
        taken, self.nonfinite = self.nonfinite, {}
        return taken
