"""How this package compiles: numba's njit with the options that keep results the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """`function` compiled at its first call: without the GIL, with IEEE division, without fastmath.

    The result is cached beside the source or, where that is read-only, in the user's cache directory (`NUMBA_CACHE_DIR`).
    numba notices a change of the function's own file only: what a kernel calls must stand in the kernel's file.
    """
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # no directory to cache in
        return numba.njit(nogil=True, error_model="numpy")(function)


def part(function: Callable[..., Any]) -> Any:
    """`function` compiled as a part of the kernels that call it: neither callable from Python nor cached alone."""
    no_entry: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(nogil=True, error_model="numpy", **no_entry)(function)
