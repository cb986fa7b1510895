"""The same input and options give the same bytes: any number of workers, any memory, any way to the disk, any machine."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama4_convert import convert, synth
from tests.support import HANG_SECONDS, commands

ALL = bool(os.environ.get("TORTURE"))  # make torture; make test runs a share
RECIPES = [None, "int4", "int4-signed", "fp8", "mixed", "nf4"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for groups of 128, several experts, and odd sizes between."""
    path = tmp_path_factory.mktemp("reproducible") / "meta"
    synth(path, tiny=True, layers=2, ranks=2)
    return path


@pytest.fixture(scope="module")
def straight(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], dict[str, str]]:
    made: dict[str | None, dict[str, str]] = {}

    def get(recipe: str | None) -> dict[str, str]:
        if recipe not in made:
            target = tmp_path_factory.mktemp("straight") / "out"
            convert(source, target, recipe=recipe, shard_size=1_000_000)
            made[recipe] = commands.digests(target)
        return made[recipe]

    return get


@pytest.mark.parametrize("recipe", RECIPES)
def test_workers_memory_and_disk(
    recipe: str | None, source: Path, straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"recipe": recipe, "shard_size": 1_000_000}
    for workers in (1, 3, 8):
        with monkeypatch.context() as patch:
            patch.setattr(os, "sched_getaffinity", lambda pid, n=workers: set(range(n)))
            convert(source, tmp_path / f"workers-{workers}", **options)
        assert commands.digests(tmp_path / f"workers-{workers}") == straight(recipe)
    for memory in (300 << 20, 4 << 30):
        convert(source, tmp_path / f"memory-{memory}", max_memory=memory, **options)
        assert commands.digests(tmp_path / f"memory-{memory}") == straight(recipe)
    with monkeypatch.context() as patch:

        def refuses_direct(fd: int, *arguments: Any, opened: Callable[..., Any] = os.open) -> Any:
            if arguments and arguments[0] & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return opened(fd, *arguments)

        patch.setattr(os, "open", refuses_direct)
        convert(source, tmp_path / "through-the-cache", **options)
    assert commands.digests(tmp_path / "through-the-cache") == straight(recipe)


@pytest.mark.parametrize("recipe", RECIPES if ALL else ["mixed"])
def test_another_machine(recipe: str | None, source: Path, straight: Any, tmp_path: Path) -> None:
    """Kernels compiled for a processor without vector extensions beyond SSE2, another hash seed, locale and time zone."""
    elsewhere = {
        **os.environ,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONHASHSEED": "7",
        "LC_ALL": "C",
        "TZ": "Asia/Kathmandu",
        "PYTHONPATH": str(ROOT),
    }
    moved = tmp_path / "elsewhere" / "meta"
    commands.copy(source, moved)
    order = json.dumps({"recipe": recipe, "shard_size": 1_000_000})
    program = "import json, sys; from llama4_convert import convert; convert(*sys.argv[1:3], **json.loads(sys.argv[3]))"
    command = [sys.executable, "-c", program, str(moved), str(tmp_path / "out"), order]
    subprocess.run(command, check=True, env=elsewhere, timeout=HANG_SECONDS)
    assert commands.digests(tmp_path / "out") == straight(recipe)


def test_the_manifest_says_what_decided_the_bytes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", recipe="int4", shard_size=1_000_000)
    manifest = json.loads((tmp_path / "out" / "llama4-convert.json").read_text())
    assert manifest["tool"].startswith("llama4-convert ")
    assert set(manifest["source"]["sha256"]) == {
        "params.json",
        "tokenizer.model",
        *(p.name for p in source.glob("*.pth")),
    }
    assert manifest["options"]["recipe"]["name"] == "int4"
    assert manifest["options"]["shard_size"] == 1_000_000
    text = json.dumps(manifest)
    assert str(source) not in text
    assert str(tmp_path) not in text
