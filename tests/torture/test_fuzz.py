"""The fuzz target runs, reaches the readers, and finds nothing in a few seconds. `make fuzz` lets it go on."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import HANG_SECONDS, REPOSITORY

TARGET = ("-m", "tests.torture.fuzz")
RUNS = 50_000 if os.environ.get("TORTURE") else 1_500


def test_the_fuzz_target(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    # The kernel counts a process's peak from before its exec on: this process's own is in it.
    limit = 2048 + (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
    here = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *TARGET, f"-rss_limit_mb={limit}", f"-runs={RUNS}", "-seed=1", tmp_path / "corpus"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=tmp_path, env=here)
    assert run.returncode == 0, run.stderr[-3000:]
    covered = [int(n) for n in re.findall(r"cov: (\d+)", run.stderr)]
    assert covered[-1] > covered[0] > 100
    assert not list(tmp_path.glob("crash-*"))
