"""SIGKILL at every change of the disk, and at random moments: nothing half-done loads, and the same command completes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import HANG_SECONDS, REPOSITORY

DRIVER = ("-m", "tests.torture.kills")
ALL = bool(os.environ.get("TORTURE"))  # make torture; make test runs a share

CASES: dict[str, dict[str, Any]] = {
    "convert": {"options": {"shard_size": 200_000}},
    "recipe": {"options": {"shard_size": 200_000, "recipe": "nf4"}},
    "overwrite": {
        "options": {"shard_size": 300_000, "overwrite": True},
        "before": {"shard_size": 200_000, "text_only": True},
    },
    "export": {"run": "export", "options": {"ranks": 4}},
    "export over another": {"run": "export", "options": {"ranks": 2, "overwrite": True}, "before": {"ranks": 8}},
}


def tortured(source: Path, folder: Path, **order: Any) -> dict[str, int]:
    command = [sys.executable, *DRIVER, json.dumps({"source": str(source), "folder": str(folder), **order})]
    run = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=REPOSITORY)
    assert run.returncode == 0, run.stderr[-3000:]
    told: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return told


@pytest.mark.parametrize("case", CASES)
def test_a_kill_at_every_change(meta_checkpoint: Callable[..., Any], tmp_path: Path, case: str) -> None:
    source = meta_checkpoint("maverick", 2).src
    told = tortured(source, tmp_path, **CASES[case], every=1 if ALL else 31)
    assert told["at_changes"] > (100 if ALL else 3)


@pytest.mark.parametrize("case", CASES)
def test_a_kill_at_any_moment(meta_checkpoint: Callable[..., Any], tmp_path: Path, case: str) -> None:
    source = meta_checkpoint("scout", 2).src
    count = 100 if ALL else 6
    told = tortured(source, tmp_path, **CASES[case], random=count, seed=len(case))
    assert told["at_random"] == count
