"""Ten thousand damaged files: each is read or refused, in bounded time and memory, and none makes us do anything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from llama4_convert import synth
from tests.support import HANG_SECONDS, REPOSITORY

DRIVER = ("-m", "tests.torture.mutants")
COUNT = 100_000 if os.environ.get("TORTURE") else 10_000


def test_mutants(tmp_path: Path) -> None:
    synth(tmp_path / "source", tiny=True, layers=2, experts=2, ranks=2)
    order = {"source": str(tmp_path / "source"), "folder": str(tmp_path), "seed": 0, "count": COUNT}
    run = subprocess.run(
        [sys.executable, *DRIVER, json.dumps(order)],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        cwd=REPOSITORY,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert not told["broken"], "\n".join(told["broken"])
    assert told["count"] == COUNT
    for kind, outcomes in told["outcomes"].items():
        assert outcomes.get("refused", 0) > COUNT / 500, (kind, outcomes)  # the damage did reach the reader
