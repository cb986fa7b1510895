"""An interrupted conversion goes on with the same command and ends with the same bytes; a finished one is left alone."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama4_convert import convert, verify
from llama4_convert.conversion.convert import bind
from llama4_convert.conversion.request import Request
from llama4_convert.errors import BadInput, EnvironmentFailed, UsageError
from llama4_convert.files import LOCK_NAME, locked
from llama4_convert.streaming import execution, writer
from tests.support import HANG_SECONDS, commands

REPOSITORY = Path(__file__).resolve().parents[3]
MANIFEST = "llama4-convert.json"


def partials(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


def no_data_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "FileWriter", lambda *_: pytest.fail("tensor data was written again"))


# -------------------- faults


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (("posix_fallocate",), errno.ENOSPC),
        (("pwrite",), errno.ENOSPC),
        (("pwrite",), errno.EIO),
        (("fsync",), errno.EIO),
        (("replace",), errno.EIO),
        (("ftruncate",), errno.EIO),
        (("posix_fallocate", "pwrite", "fsync", "replace", "ftruncate"), errno.EDQUOT),
    ],
    ids=str,
)
def test_a_fault_at_any_call_ends_in_exit_4_and_the_next_run_completes(
    source: Path,
    straight: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...],
    code: int,
) -> None:
    faults = commands.Faults(monkeypatch, names, code)
    messages = []
    for n in [*range(1, 8), *range(9, 2000, 23)]:
        target = tmp_path / f"{n}"
        faults.left = n
        try:
            convert(source, target, shard_size=commands.SHARD)
        except EnvironmentFailed as error:
            messages.append(str(error))
        if faults.left > 0:  # fewer calls than that: all have had their turn
            break
        faults.left = -1
        # A folder that cannot be synced is no reason to fail: the rename has happened.
        assert not partials(target)
        convert(source, target, shard_size=commands.SHARD)
        assert commands.digests(target) == straight
    assert len(messages) > 3
    assert all(os.strerror(code) in text and "run the same command again" in text for text in messages)


def test_repeated_faults_make_progress(
    source: Path, straight: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every run fails after one more file; none starts from the beginning."""
    target = tmp_path / "out"
    commit, committed = writer.FileWriter.commit, []

    def only_once(self: writer.FileWriter) -> str:
        if self.path.name in committed or stop:
            raise OSError(errno.ENOSPC, "full")
        stop.append(True)
        committed.append(self.path.name)
        return commit(self)

    monkeypatch.setattr(writer.FileWriter, "commit", only_once)
    for _ in range(100):
        stop: list[bool] = []
        try:
            convert(source, target, shard_size=commands.SHARD)
        except EnvironmentFailed:
            assert not commands.loads_as_a_model(target)
            continue
        break
    assert commands.digests(target) == straight
    assert len(committed) == sum(name.endswith(".safetensors") for name in straight)


def test_a_resume_inside_any_record_of_any_spelling(
    meta_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor a file, and a stop behind every third: records that feed several tensors are still checked whole."""
    commit, count = writer.FileWriter.commit, itertools.count(1)

    class Stopped(BaseException):
        pass

    def stopping(self: writer.FileWriter) -> str:
        if next(count) % 4 == 0:
            raise Stopped
        return commit(self)

    for geometry, spelling, layout in (("scout", "mixed", "plain"), ("odd", "module", "views")):
        source = meta_checkpoint(geometry, 2, spelling, layout=layout).src
        convert(source, tmp_path / "straight" / geometry, shard_size=1)
        target, done = tmp_path / geometry, False
        with monkeypatch.context() as patch:
            patch.setattr(writer.FileWriter, "commit", stopping)
            while not done:
                with contextlib.suppress(Stopped):
                    convert(source, target, shard_size=1)
                    done = True
        assert commands.digests(target) == commands.digests(tmp_path / "straight" / geometry)


# -------------------- kills


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "llama4_convert.commands.cli", *map(str, arguments)]


def test_a_killed_run_goes_on(source: Path, straight: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "out"
    chance = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(command("convert", source, target, "--shard-size", commands.SHARD), cwd=REPOSITORY)
        files = chance.randrange(1, 12)
        while process.poll() is None and len(list(target.glob("model*"))) < files:
            time.sleep(0.001)
        process.kill()
        process.wait()
        if (target / commands.INDEX).exists():  # it was quicker than the signal: then it is complete
            assert commands.digests(target) == straight
    last = subprocess.run(
        command("convert", source, target, "--shard-size", commands.SHARD),
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    assert b"warning" not in last.stderr
    assert commands.digests(target).keys() - {LOCK_NAME} == straight.keys()
    assert {n: d for n, d in commands.digests(target).items() if n != LOCK_NAME} == straight


def test_ctrl_c_exits_130_with_a_hint(source: Path, straight: dict[str, str], tmp_path: Path) -> None:
    # Shells start background jobs with SIGINT ignored, and children inherit that: undone here, as on a terminal.
    slow = (
        "import signal, time; from llama4_convert.commands import cli; from llama4_convert.streaming import source\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "check = source.Source.check\n"
        "def slowly(*a): print('begun', flush=True); time.sleep(3600); check(*a)\n"
        "source.Source.check = slowly; cli.main()"
    )
    arguments = ["convert", str(source), str(tmp_path / "out"), "--shard-size", str(commands.SHARD)]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "interrupted: the same command goes on where it stopped"
    assert b"Traceback" not in err
    assert not commands.loads_as_a_model(tmp_path / "out")
    assert not partials(tmp_path / "out")
    convert(source, tmp_path / "out", shard_size=commands.SHARD)
    assert commands.digests(tmp_path / "out") == straight


def test_leftovers_do_not_count_as_used_space(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run leaves its preallocated file: the resumed one must not call the disk full for that."""
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        commands.Faults(patch, ("posix_fallocate",), errno.ENOSPC).left = 1
        with pytest.raises(EnvironmentFailed):
            convert(source, target, shard_size=commands.SHARD)
    leftover = next(iter(bind(Request(source, shard_size=commands.SHARD)).job.plan.files)).name + ".partial"
    (target / leftover).write_bytes(b"x")
    seen = []
    statvfs = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda p: (seen.append((target / leftover).exists()), statvfs(p))[1])
    convert(source, target, shard_size=commands.SHARD)
    assert seen == [False]


def test_a_leftover_that_is_a_link_is_not_written_through(source: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    target = tmp_path / "out"
    target.mkdir()
    (target / "model-00001-of-00001.safetensors.partial").symlink_to(victim)
    convert(source, target)
    assert victim.read_text() == "precious"


# -------------------- the finished one


def test_a_finished_conversion_is_left_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    assert commands.run(capsys, "convert", source, target).code == 0
    before = {n: t for n, t in commands.times(target).items() if n != "."}
    no_data_is_written(monkeypatch)
    outcome = commands.run(capsys, "convert", source, target)
    assert outcome.code == 0
    assert "complete already: nothing was touched" in outcome.out
    assert {n: t for n, t in commands.times(target).items() if n != "."} == before


def test_where_the_source_lies_makes_no_difference(source: Path, tmp_path: Path) -> None:
    """A copy, links into a download cache: the same source by content."""
    convert(source, tmp_path / "out", variant="instruct")
    links = tmp_path / "links"
    links.mkdir()
    for file in source.iterdir():
        (links / file.name).symlink_to(file)
    assert convert(links, tmp_path / "out", variant="instruct").status == "already complete"
    convert(links, tmp_path / "again", variant="instruct")
    assert commands.digests(tmp_path / "again") == commands.digests(tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "original/params.json", "model-00002-of-*.safetensors"]
)
def test_a_file_that_is_gone_is_made_again(source: Path, straight: dict[str, str], tmp_path: Path, name: str) -> None:
    target = tmp_path / "out"
    convert(source, target, shard_size=commands.SHARD)
    next(target.glob(name)).unlink()
    assert convert(source, target, shard_size=commands.SHARD).status == "converted"
    assert commands.digests(target) == straight


def test_a_config_that_somebody_edited_stays(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(source, target)
    (target / "config.json").write_text("{}")
    assert convert(source, target).status == "already complete"
    assert (target / "config.json").read_text() == "{}"
    assert not verify(target).ok


# -------------------- what else lies there


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "float32"], "no dtype there, float32 now"),
        (["--shard-size", "300kB"], "shard-size 5000000000 there, 300000 now"),
        (["--text-only"], "no text-only there, True now"),
        (["--variant", "instruct"], "variant base there, instruct now"),
    ],
)
def test_other_options_are_refused_with_the_command_to_proceed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    target = tmp_path / "out"
    convert(source, target)
    before = commands.digests(target)
    outcome = commands.run(capsys, "convert", source, target, *options)
    assert outcome.code == 2
    assert words in outcome.error
    assert outcome.error.endswith(f"llama4-convert convert {source} {target} {' '.join(options)} --overwrite")
    assert commands.digests(target) == before

    assert commands.run(capsys, "convert", source, target, *options, "--overwrite").code == 0
    assert commands.run(capsys, "convert", source, tmp_path / "fresh", *options).code == 0
    assert commands.digests(target) == commands.digests(tmp_path / "fresh")


def test_another_source_is_refused(
    source: Path, meta_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(source, tmp_path / "out")
    outcome = commands.run(capsys, "convert", meta_checkpoint("scout", 2).src, tmp_path / "out")
    assert outcome.code == 2
    assert "another source" in outcome.error


def test_overwrite_removes_model_files_only(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (target / "model.safetensors").write_text("readers would prefer this one")
    outcome = commands.run(capsys, "convert", source, target)
    assert outcome.code == 2
    assert "--overwrite" in outcome.error
    assert commands.run(capsys, "convert", source, target, "--overwrite").code == 0
    assert (target / "notes.txt").read_text() == "mine"
    assert not (target / "model.safetensors").exists()
    assert verify(target).ok


def test_overwrite_goes_on_too_when_it_was_interrupted(
    source: Path, straight: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    convert(source, target)
    with monkeypatch.context() as patch:
        commands.Faults(patch, ("replace",), errno.EIO).left = 25
        with pytest.raises(EnvironmentFailed):
            convert(source, target, shard_size=commands.SHARD, overwrite=True)
    assert not commands.loads_as_a_model(target)
    result = convert(source, target, shard_size=commands.SHARD, overwrite=True)
    assert result.files_kept_from_earlier_run > 0
    assert commands.digests(target) == straight


def test_overwrite_of_a_finished_one_writes_it_anew(source: Path, straight: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(source, target, shard_size=commands.SHARD)
    file = sorted(target.glob("*.safetensors"))[1]
    commands.flip(file, file.stat().st_size - 1)
    assert not verify(target).ok
    assert convert(source, target, shard_size=commands.SHARD, overwrite=True).files_kept_from_earlier_run == 0
    assert commands.digests(target) == straight


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"version": 1}', '{"version": 99}', "[" * 100_000, '{"version": 1, "files": {"../x": {}}}'],
)
def test_a_damaged_manifest(source: Path, tmp_path: Path, content: str) -> None:
    target = tmp_path / "out"
    convert(source, target)
    (target / MANIFEST).write_text(content)
    with pytest.raises(BadInput, match=r"is damaged .* --overwrite"):
        convert(source, target)
    convert(source, target, overwrite=True)
    assert verify(target).ok


def test_a_manifest_reaches_no_file_outside(source: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    target = tmp_path / "out"
    convert(source, target)
    text = (target / MANIFEST).read_text()
    (target / MANIFEST).write_text(text.replace('"config.json"', '"../precious"'))
    convert(source, target, overwrite=True)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_never_the_target(source: Path, tmp_path: Path, overwrite: bool) -> None:
    """Nor is the folder around a source called `original`, where the output keeps params.json."""
    original = commands.copy(source, tmp_path / "model" / "original")
    before = commands.digests(tmp_path)
    for target in (original, tmp_path / "model"):
        with pytest.raises(UsageError, match="would overwrite the source"):
            convert(original, target, overwrite=overwrite)
    assert commands.digests(tmp_path) == before


# -------------------- the machine


def test_one_owner_at_a_time(source: Path, straight: dict[str, str], tmp_path: Path) -> None:
    """Eight at once: the others are told who owns the directory, at once."""
    target = tmp_path / "out"
    target.mkdir()
    with locked(target):
        others = [
            subprocess.Popen(
                command("convert", source, target, "--shard-size", commands.SHARD),
                cwd=REPOSITORY,
                stderr=subprocess.PIPE,
            )
            for _ in range(7)
        ]
        for process in others:
            _, err = process.communicate(timeout=HANG_SECONDS)
            assert process.returncode == 4
            assert f"is being written by process {os.getpid()} on " in err.decode()
            assert err.count(b"\n") == 1
        assert list(target.iterdir()) == [target / LOCK_NAME]
    convert(source, target, shard_size=commands.SHARD)
    assert commands.digests(target) == straight


def test_the_lock_is_taken_before_the_source_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits for the owner"))
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(EnvironmentFailed, match="is being written by"):
        convert(tmp_path / "a source that takes long to read", tmp_path / "out")


def test_a_full_disk_is_seen_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full:
        f_bavail, f_frsize, f_files, f_favail = 1000, 4096, 0, 0

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    outcome = commands.run(capsys, "convert", source, tmp_path / "out")
    assert outcome.code == 4
    assert "0.0 GB free, 0.1 GB are needed" in outcome.error
    assert not (tmp_path / "out").exists()


def test_too_few_inodes_are_seen_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Crowded:
        f_bavail, f_frsize, f_files, f_favail = 1 << 40, 4096, 1000, 7

    monkeypatch.setattr(os, "statvfs", lambda _: Crowded)
    outcome = commands.run(capsys, "convert", source, tmp_path / "out")
    assert outcome.code == 4
    assert "has 7 inodes free, 33 are needed" in outcome.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_no_permission(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    outcome = commands.run(capsys, "convert", source, tmp_path / "out")
    assert outcome.code == 4
    assert os.strerror(code) in outcome.error


@pytest.fixture
def umask() -> Iterator[Callable[[int], object]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_modes_that_the_umask_allows(
    source: Path, tmp_path: Path, umask: Callable[[int], object], mask: int
) -> None:
    umask(mask)
    convert(source, tmp_path / "out")
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert modes == {0o666 & ~mask}
