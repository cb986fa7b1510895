"""What is printed is printable, and no stream changes what a run does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import UNSET, Struct, UnsetType

from llama4_convert import convert, synth
from llama4_convert.commands import terminal
from llama4_convert.errors import one_line, printable
from tests.support import HANG_SECONDS, REPOSITORY, commands

Run = Callable[..., commands.Outcome]
HOSTILE = "a\n\x1b[31mPASSED\r\u202eb\udcff"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: commands.run(capsys, *arguments)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "source"
    synth(path, tiny=True, layers=2, experts=2, ranks=2)
    return path


@pytest.fixture(scope="module")
def output(source: Path) -> Path:
    convert(source, source.parent / "output")
    return source.parent / "output"


def lines(text: str) -> list[str]:
    assert text.endswith("\n")
    found = text[:-1].split("\n")
    assert all(line.isprintable() for line in found), found
    return found


def test_text_is_a_line_of_characters_that_show() -> None:
    assert printable(HOSTILE) == r"a\n\x1b[31mPASSED\r\u202eb\udcff"
    assert one_line(ValueError("a\n  b\x1b")) == r"a b\x1b"
    assert printable("größer 数 😀") == "größer 数 😀"
    assert printable("x" * 400) == "x" * 300 + " ..."


class Inner(Struct, frozen=True, kw_only=True):
    name: str


class Result(Struct, frozen=True, kw_only=True):
    names: list[str]
    by_name: dict[str, tuple[Inner, int]]
    left_out: str | UnsetType = UNSET


def test_every_text_of_a_result_is_printable_however_deep(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result(names=[HOSTILE], by_name={HOSTILE: (Inner(name=HOSTILE), 1)})
    terminal.show(
        result, False, lambda r: f"{r.names[0]}\n{r.left_out!r} {[f'{k} {v[0].name}' for k, v in r.by_name.items()]}"
    )
    assert len(lines(capsys.readouterr().out)) == 2
    terminal.show(result, True, str)
    out = capsys.readouterr().out
    assert len(lines(out)) == 1
    read = json.loads(out)
    read_text = json.dumps(read, ensure_ascii=False)
    assert read_text.encode()  # no lone surrogate, which strict readers refuse
    assert read["names"] == [HOSTILE.replace("\udcff", r"\udcff")]


def test_names_from_a_checkpoint_forge_no_line(run: Run, source: Path, output: Path, tmp_path: Path) -> None:
    named = commands.copy(output, tmp_path / HOSTILE)
    for command in (["inspect", "--tensors"], ["verify"], ["fit"], ["card"], ["explain", "layers.0.attention.q"]):
        expected, found = (run(command[0], path, *command[1:]) for path in (output, named))
        assert found.code == expected.code
        assert len(lines(found.out)) == len(lines(expected.out)), command
    body = json.loads((named / commands.INDEX).read_text())
    body["weight_map"][HOSTILE] = next(iter(body["weight_map"].values()))
    (named / commands.INDEX).write_text(json.dumps(body))
    refused = run("inspect", named)
    assert refused.code == 3
    assert r"\x1b[31mPASSED" in refused.error
    assert lines(refused.err)
    warned = run("diff", source, named)
    assert warned.code == 3
    assert lines(warned.err)


SHELL = {
    "stdout closed": (">&-", 0),
    "stderr closed": ("2>&-", 0),
    "all closed": ("<&- >&- 2>&-", 0),
    "stdout full": (">/dev/full", 4),
    "stderr full": ("2>/dev/full", 0),
    "both full": (">/dev/full 2>/dev/full", 4),
    "reader gone": ("> >(true)", 0),
}


@pytest.mark.parametrize("name", SHELL)
def test_a_stream_never_changes_what_a_run_does(name: str, source: Path, output: Path, tmp_path: Path) -> None:
    redirection, code = SHELL[name]
    command = f'"$0" -m llama4_convert convert "$1" "$2" {redirection}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, source, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert commands.digests(tmp_path / "out") == commands.digests(output)
    assert "Traceback" not in done.stderr
    if code and "2>" not in redirection:
        assert "stdout did not take its result (No space left on device)" in lines(done.stderr)[-1]


def test_a_verdict_stays_where_it_cannot_be_printed(source: Path, output: Path, tmp_path: Path) -> None:
    """And the report is written."""
    other = commands.copy(output, tmp_path / "other")
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 0.5'))
    command = '"$0" -m llama4_convert validate "$1" --reference "$2" --no-cache --html "$3" > /dev/full'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, other, source, tmp_path / "page.html"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    assert (tmp_path / "page.html").stat().st_size


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_encoding_refuses_a_character(encoding: str, source: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/gr\xc3\xb6\xe2\x82\xac\xff"
    done = subprocess.run(
        [os.fsencode(sys.executable), b"-m", b"llama4_convert", b"convert", os.fsencode(source), name],
        capture_output=True,
        timeout=HANG_SECONDS,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = {"ascii": r"gr\xf6\u20ac\udcff", "latin-1": r"grö\u20ac\udcff", "utf-8": r"grö€\udcff"}[encoding]
    assert shown in done.stdout.decode(encoding)
