"""The limits that a caller sets for a run. Imports nothing heavy: an output directory is locked before numpy is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from llama4_convert.errors import UsageError

DEFAULT_MEMORY_BYTES = 1 << 30

# Below this, buffers and interpreter leave no room for anything (measured: 52 MiB at the smallest buffers, no tokenizer).
LEAST_MEMORY_BYTES = 64 << 20


@dataclass(frozen=True)
class Bounds:
    """`max_memory`: bytes of own memory above an idle interpreter. `max_error`: largest relative squared error of a matrix.

    `overwrite` replaces another model in the output directory.
    """

    max_memory: int = DEFAULT_MEMORY_BYTES
    max_error: float | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.max_memory < LEAST_MEMORY_BYTES:
            raise UsageError(f"max-memory must be at least {LEAST_MEMORY_BYTES >> 20} MiB")
