"""Many runs on one output directory: one owns it, the others say so and leave at once; a dead owner's lock is free."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama4_convert import convert, synth, verify
from tests.support import HANG_SECONDS, commands

ROOT = Path(__file__).resolve().parents[2]
RUNS = 8
# Holds the lock, says so, and goes on when it is told to.
OWNER = """
import sys
from llama4_convert import convert
def wait(total, done):
    print("owner", flush=True)
    sys.stdin.readline()
convert(*sys.argv[1:3], start=wait)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("concurrency") / "meta"
    synth(path, tiny=True, ranks=2)
    return path


def started(*command: object) -> subprocess.Popen[str]:
    everything = [sys.executable, *map(str, command)]
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(everything, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def owner_of(source: Path, target: Path) -> subprocess.Popen[str]:
    owner = started("-c", OWNER, source, target)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "owner\n"
    return owner


def test_seven_others_leave_while_it_works_and_say_who_owns_it(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    owner = owner_of(source, target)
    others = [started("-m", "llama4_convert", "convert", source, target) for _ in range(RUNS - 1)]
    told = [other.communicate(timeout=HANG_SECONDS) for other in others]
    for other, (out, err) in zip(others, told, strict=True):
        assert other.returncode == 4
        assert out == ""
        assert re.fullmatch(rf"error: {re.escape(str(target))} is being written by process {owner.pid} on .+\n", err)
    owner.communicate("\n", timeout=HANG_SECONDS)
    assert owner.returncode == 0
    assert verify(target).ok


def test_a_dead_owners_lock_is_taken_over(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    owner = owner_of(source, target)
    owner.send_signal(signal.SIGKILL)
    owner.communicate(timeout=HANG_SECONDS)
    assert (target / ".llama4-convert.lock").exists()
    convert(source, target)
    assert not (target / ".llama4-convert.lock").exists()
    assert verify(target).ok


def test_eight_at_once(source: Path, tmp_path: Path) -> None:
    """Started together: whoever comes first converts; later ones are refused, or find it complete."""
    target = tmp_path / "out"
    runs = [started("-m", "llama4_convert", "convert", source, target, "--json") for _ in range(RUNS)]
    said = []
    for run in runs:
        out, err = run.communicate(timeout=HANG_SECONDS)
        assert run.returncode in (0, 4), err
        assert run.returncode or not err.startswith("error")
        if run.returncode == 0:
            said.append(json.loads(out)["status"])
    assert said.count("converted") == 1
    convert(source, tmp_path / "straight")
    assert commands.digests(target) == commands.digests(tmp_path / "straight")
