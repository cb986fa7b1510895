"""Compiled kernels are cached between processes, and never taken from the cache when one of their sources has changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import quant

# A kernel of each module, which round 1.006 to bf16 by a part that they share; and where they were cached.
PROGRAM = """
import numpy as np
from quant.kernels import fp8, int4, jit, meta, nf4
made, kernels = np.zeros((4, 16), np.uint16), (int4.dequantize, fp8.dequantize, nf4.dequantize, meta.dequantize_fp8)
weight, values, code = np.float32(1.006), np.full(256, 1.006, np.float32), np.zeros((1, 1), np.uint8)
int4.dequantize(np.full((1, 1), 9, np.int32), np.full((1, 1), weight), 8, made[:1])
fp8.dequantize(code, np.full((1, 1), 0x3F80, np.uint16), 0, 1, values, made[1:2])
nf4.dequantize(np.full(8, 0xFF, np.uint8), np.full(1, weight), 16, 0, made[2])
meta.dequantize_fp8(code, np.ones(1, np.float32), values, made[3:])
print(*made[:, 0], *(sum(kernel.stats.cache_hits.values()) for kernel in kernels), jit.cache_folder())
"""
ROUNDED, TRUNCATED = [0x3F81] * 4, [0x3F80] * 4


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package to edit."""
    shutil.copytree(Path(quant.__file__).parent, tmp_path / "code/quant", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "code"


def output(code: Path, program: str, **environment: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    made = subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, "PYTHONPATH": str(code), **environment},
        cwd=code,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not made.stderr
    return made.stdout.split()


def run(code: Path, **environment: str) -> tuple[list[int], list[int], str]:
    """What each kernel made, how often each was found in the cache, and the cache's folder."""
    *numbers, folder = output(code, PROGRAM, **environment)
    return [int(bits) for bits in numbers[:4]], [int(hits) for hits in numbers[4:]], folder


def cache_folder(code: Path, **environment: str) -> str:
    return output(code, "from quant.kernels import jit; print(jit.cache_folder())", **environment)[0]


def test_an_edited_part_that_kernels_share_is_compiled_anew_in_each_of_them(copy: Path, tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    made, hits, folder = run(copy, **cache)
    assert (made, hits) == (ROUNDED, [0] * 4)
    assert Path(folder).parent == tmp_path / "cache/llama4-convert"
    assert run(copy, **cache) == (ROUNDED, [1] * 4, folder)

    shared = copy / "quant/kernels/bf16.py"
    text = shared.read_text()
    edited = text.replace("wide + np.uint32(0x7FFF)", "wide + np.uint32(0)")
    assert edited != text
    shared.write_text(edited)
    made, hits, other_folder = run(copy, **cache)
    assert (made, hits) == (TRUNCATED, [0] * 4)
    assert other_folder != folder

    shared.write_text(text)
    assert run(copy, **cache) == (ROUNDED, [1] * 4, folder)


def test_the_users_own_folder_is_taken_and_stays_the_setting_of_others(copy: Path, tmp_path: Path) -> None:
    mine = str(tmp_path / "mine")
    program = "import numba; from quant.kernels import jit, meta; print(numba.config.CACHE_DIR, jit.cache_folder())"
    setting, folder = output(copy, program, NUMBA_CACHE_DIR=mine, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert setting == mine
    assert Path(folder).is_relative_to(mine)
    assert not (tmp_path / "cache").exists()


def test_where_the_users_cache_cannot_be_written_it_lies_beside_the_sources_or_nowhere(
    copy: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    nowhere = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    beside = copy / "quant/kernels/__pycache__"
    assert Path(cache_folder(copy, **nowhere)).is_relative_to(beside)
    shutil.rmtree(beside)
    beside.touch()
    assert cache_folder(copy, **nowhere) == "None"
    assert run(copy, **nowhere)[0] == ROUNDED


def test_caches_of_other_sources_go_a_month_after_their_last_use(copy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache/llama4-convert"
    for name, days in (("kernels-old", 31), ("kernels-used", 29), ("others", 31)):
        (cache / name).mkdir(parents=True)
        (cache / name / "file").touch()
        os.utime(cache / name, (time.time() - days * 24 * 3600,) * 2)
    folder = Path(cache_folder(copy, XDG_CACHE_HOME=str(cache.parent)))
    assert {path.name for path in cache.iterdir()} == {"kernels-used", "others", folder.name}
