"""How this package compiles: numba's njit with the options that keep results the same on every machine, and its cache.

numba takes a kernel from its cache as long as the kernel's own file is unchanged; it does not look at the modules from which
the kernel's parts are imported. So the cache lies in a folder that is named by a digest of all sources of this package.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba

_SOURCES = Path(__file__).parent
_UNUSED_SECONDS = 30 * 24 * 3600  # caches of other sources are removed that long after their last use
_config: Any = numba.config  # numba's stubs do not have CACHE_DIR


def compiled(function: Callable[..., Any]) -> Any:
    """`function` compiled at its first call: without the GIL, with IEEE division, without fastmath. Cached in `cache_folder`."""
    folder = cache_folder()
    if folder is None:
        return numba.njit(nogil=True, error_model="numpy")(function)
    # numba looks where to cache as it decorates: others who use numba in this process keep their own setting.
    setting, _config.CACHE_DIR = _config.CACHE_DIR, str(folder)
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    finally:
        _config.CACHE_DIR = setting


def part(function: Callable[..., Any]) -> Any:
    """`function` compiled as a part of the kernels that call it: neither callable from Python nor cached alone."""
    no_entry: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(nogil=True, error_model="numpy", **no_entry)(function)


@functools.cache
def cache_folder() -> Path | None:
    """The folder of the machine code that was made of these very sources; None if no folder can be written.

    It lies in the first of these that can be written: the folder that the user chose for numba (`NUMBA_CACHE_DIR`), the user's
    cache directory, `__pycache__` beside the sources.
    """
    for parent in _parents():
        folder = parent / "llama4-convert" / f"kernels-{_digest()}"
        try:
            is_new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # fails where nothing can be written
            os.utime(folder)
            if is_new:
                _remove_unused(folder.parent)
        except OSError:
            continue
        return folder
    return None


def _parents() -> Iterator[Path]:
    if _config.CACHE_DIR:
        yield Path(_config.CACHE_DIR)
    user = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not user.is_absolute():  # so does the XDG Base Directory Specification say
        user = Path(os.path.expanduser("~"), ".cache")
    if user.is_absolute():
        yield user
    yield _SOURCES / "__pycache__"


def _digest() -> str:
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.glob("*.py")):
        text = source.read_bytes()
        digest.update(f"{source.name} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:16]


def _remove_unused(parent: Path) -> None:
    for folder in parent.glob("kernels-*"):
        if folder.stat().st_mtime < time.time() - _UNUSED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
