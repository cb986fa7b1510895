"""One flipped bit in any byte that is used is found: in a source while it is converted, in an output when it is verified."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama4_convert import convert, export, verify
from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.errors import BadInput, EnvironmentFailed
from tests.support import commands

ALL = bool(os.environ.get("TORTURE"))  # make torture; make test runs a share


def places(size: int, chance: random.Random) -> Iterator[int]:
    """First, last, and some between."""
    some = [chance.randrange(size) for _ in range(6)] if ALL else [chance.randrange(size)]
    yield from sorted({0, size - 1, *some} if ALL else some)


RUNS: dict[str, Callable[..., Any]] = {
    "convert": convert,
    "recipe": functools.partial(convert, recipe="nf4"),
    "export": functools.partial(export, ranks=4),
}


@pytest.mark.parametrize("run", RUNS)
def test_in_every_record_of_a_source(meta_checkpoint: Callable[..., Any], tmp_path: Path, run: str) -> None:
    """All records: those that are streamed, replicas on other ranks, transposed routers, and what is dropped."""
    chance = random.Random(0)
    source = commands.copy(meta_checkpoint("maverick", 2).src, tmp_path / "source")
    found = 0
    for path in sorted(source.glob("*.pth")):
        records = [record for record in PthIndex.read(path).records if record.size]
        for record in records[:: 1 if ALL else 9]:
            for at in places(record.size, chance):
                bit = chance.randrange(8)
                commands.flip(path, record.offset + at, bit)
                with pytest.raises(BadInput, match=path.name.replace(".", r"\.")):
                    RUNS[run](source, tmp_path / "out")
                assert not commands.loads_as_a_model(tmp_path / "out")
                assert not (tmp_path / "out" / "params.json").exists()
                commands.flip(path, record.offset + at, bit)
                shutil.rmtree(tmp_path / "out", ignore_errors=True)
                found += 1
    assert found > (500 if ALL else 10)
    RUNS[run](source, tmp_path / "out")


def test_in_every_byte_of_a_pickle(meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    chance = random.Random(1)
    path = Path(shutil.copy(meta_checkpoint("scout", 2).src / "consolidated.00.pth", tmp_path))
    begin = commands.data_offset(path, "data.pkl")
    size = len(PthIndex.read(path).tensors) * 40  # a lower bound of the pickle's length
    for at in range(begin, begin + size, 1 if ALL else 11):
        bit = chance.randrange(8)
        commands.flip(path, at, bit)
        with pytest.raises(BadInput):
            PthIndex.read(path)
        commands.flip(path, at, bit)
    PthIndex.read(path)


@pytest.mark.parametrize("run", RUNS)
def test_in_every_file_of_an_output(meta_checkpoint: Callable[..., Any], tmp_path: Path, run: str) -> None:
    chance = random.Random(2)
    out = tmp_path / "out"
    RUNS[run](meta_checkpoint("maverick", 2).src, out)
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "llama4-convert.json"]
    assert len(files) > 5
    for path in files:
        for at in [*places(path.stat().st_size, chance), *(chance.randrange(64) for _ in range(2))]:
            bit = chance.randrange(8)
            commands.flip(path, at, bit)
            bad = [one.file for one in verify(out).files if not one.ok]
            assert bad == [path.relative_to(out).as_posix()]
            commands.flip(path, at, bit)
    assert verify(out).ok


def test_anywhere_in_a_file_that_a_checklist_names(meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """Headers, padding, dates of the archive: bytes that no CRC covers."""
    chance = random.Random(3)
    source = commands.copy(meta_checkpoint("scout", 2).src, tmp_path / "source")
    names = [path.name for path in sorted(source.iterdir())]
    digests = [hashlib.md5((source / name).read_bytes()).hexdigest() for name in names]
    (source / "checklist.chk").write_text("".join(f"{d}  {n}\n" for d, n in zip(digests, names, strict=True)))
    assert verify(source).ok
    for _ in range(300 if ALL else 20):
        name = chance.choice(names)
        at, bit = chance.randrange((source / name).stat().st_size), chance.randrange(8)
        commands.flip(source / name, at, bit)
        assert [one.file for one in verify(source).files if not one.ok] == [name]
        commands.flip(source / name, at, bit)


def test_in_the_manifest_itself(meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """It is refused, or it accuses a file, or the bit carries nothing that verify promises."""
    chance = random.Random(4)
    out = tmp_path / "out"
    convert(meta_checkpoint("scout", 2).src, out)
    manifest = out / "llama4-convert.json"
    begin = manifest.read_text().index('"files"')
    end = manifest.read_text().index('"meta_keys"')
    accused = 0
    for _ in range(200 if ALL else 30):
        at, bit = chance.randrange(begin, end), chance.randrange(8)
        commands.flip(manifest, at, bit)
        try:
            accused += not verify(out).ok
        except (BadInput, EnvironmentFailed):
            accused += 1
        commands.flip(manifest, at, bit)
    assert accused > 10
