"""The manual says what the commands say and do: every option, every default, every field of `--json`."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from llama4_convert.commands import cli, manual
from tests.support import commands, hub_stand_in

REPOSITORY = Path(__file__).resolve().parents[3]
FIELDS = tomllib.loads((REPOSITORY / "llama4_convert" / "commands" / "json_fields.toml").read_text())
MACROS = {"TH", "nh", "ad", "SH", "PP", "TP", "B", "BR", "I", "RS", "RE", "nf", "fi"}


def test_the_committed_manual_is_what_the_commands_say() -> None:
    found = (REPOSITORY / "docs" / "commands.md").read_text()
    assert found == manual.markdown(), "run: python -m llama4_convert.commands.manual docs/commands.md"


def test_every_option_of_every_command_is_in_it_with_a_word_of_help_and_its_default() -> None:
    pages = {page.name: page for page in manual.pages()}
    assert pages.keys() == cli.cli.commands.keys()
    for name, command in cli.cli.commands.items():
        told = {option.names: option for option in pages[name].options}
        for param in command.params:
            if not isinstance(param, click.Option):
                continue
            (option,) = (o for names, o in told.items() if param.opts[0] in re.split(r"[ ,]+", names))
            assert re.search(r"\w", option.help), f"{name} {param.opts[0]} has no help"
            if isinstance(param.default, (str, int, float)) and not param.is_flag:
                assert option.default == str(param.default)
            else:
                assert option.default == ""
        assert any(block.is_examples for block in pages[name].blocks)


def test_the_generator_reads_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    before = manual.markdown()
    option = next(p for p in cli.cli.commands["convert"].params if p.name == "max_memory")
    monkeypatch.setattr(option, "default", "3GiB")
    assert manual.markdown() == before.replace("process. Default: `1GiB`", "process. Default: `3GiB`", 1)


# -------------------- json


# Where the runs below write; LORA and PARITY are there before they are read, REPO is on a Hub on this machine.
PLACES = ("META", "HF", "INT4", "BACK", "LORA", "TUNED", "TEXT", "WHOLE", "FP8", "PARITY")


# Enough of each command to see every field; `demo` is tests/test_docs.py's.
RUNS = [
    ["synth", "META", "--tiny", "--layers", "3", "--experts", "2", "--ranks", "2"],
    ["plan", "META", "--recipe", "int4", "--gpu", "h100-80gb"],
    ["convert", "META", "HF"],
    ["convert", "META", "INT4", "--recipe", "int4"],
    ["plan", "HF", "--adapter", "LORA"],
    ["convert", "HF", "TUNED", "--adapter", "LORA"],
    ["convert", "META", "TEXT", "--text-only"],
    ["plan", "TEXT", "--vision-from", "META"],
    ["convert", "TEXT", "WHOLE", "--vision-from", "META"],
    ["plan", "TEXT", "--config-from", "META"],
    ["export", "HF", "BACK"],
    ["export", "HF", "FP8", "--recipe", "meta-fp8"],
    ["recipes"],
    ["fit", "INT4"],
    ["inspect", "META"],
    ["inspect", "INT4", "--stats"],
    ["explain", "HF", "norm.weight"],
    ["explain", "HF", "language_model.model.norm.weight"],
    ["explain", "HF", "*norm*"],
    ["verify", "HF"],
    ["validate", "HF", "--reference", "META", "--tokens", "4", "--no-cache"],
    ["diff", "META", "HF"],
    ["generate", "HF", "--prompt", "a", "--max-new-tokens", "1"],
    ["card", "HF"],
    ["card", "HF", "--validation", "PARITY", "--write"],
    ["push", "HF", "REPO", "--create", "--yes"],
    ["completion", "bash"],
]


def test_the_fields_are_those_that_are_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: dict[str, dict[str, Any]] = {name: {} for name in FIELDS}
    places = {name: str(tmp_path / name) for name in PLACES} | {"REPO": "me/Llama-4-tiny"}
    with hub_stand_in.reached(monkeypatch):
        for words in RUNS:
            outcome = commands.run(capsys, *(places.get(word, word) for word in words), "--json")
            assert outcome.code == 0, outcome.err
            printed[words[0]] |= outcome.json
            if words[:2] == ["convert", "META"] and not (tmp_path / "LORA").exists():
                commands.write_adapter(tmp_path / "HF", tmp_path / "LORA")
            if words[0] == "validate":
                (tmp_path / "PARITY").write_text(outcome.out)
    assert FIELDS.keys() == cli.cli.commands.keys(), "each command's fields belong into json_fields.toml"
    for name in FIELDS.keys() - {"demo"}:
        assert FIELDS[name].keys() == printed[name].keys(), name


# -------------------- man


@functools.cache
def pages() -> dict[str, str]:
    return manual.man_pages()


def test_a_page_for_each_command_and_one_for_the_program(tmp_path: Path) -> None:
    manual.main(str(tmp_path / "man1"))
    names = {path.name for path in (tmp_path / "man1").iterdir()}
    assert names == {"llama4-convert.1", *(f"llama4-convert-{name}.1" for name in cli.cli.commands)}


@pytest.mark.parametrize("name", sorted(manual.man_pages()))
def test_only_known_macros_begin_a_line(name: str) -> None:
    for line in pages()[name].splitlines():
        assert not line.startswith("'")
        if line.startswith(".") and not line.startswith('.\\"'):
            assert line.split()[0][1:] in MACROS, line


@pytest.mark.parametrize("tool", ["mandoc", "groff"])
def test_readers_of_man_pages_have_nothing_to_complain_of(tmp_path: Path, tool: str) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    command = (
        ["mandoc", "-T", "lint", "-W", "warning"] if tool == "mandoc" else ["groff", "-man", "-ww", "-z", "-Tutf8"]
    )
    for name, text in pages().items():
        (tmp_path / name).write_text(text)
        done = subprocess.run([*command, tmp_path / name], capture_output=True, text=True, check=False)
        # There is no date on purpose: the same program has the same manual.
        said = [line for line in (done.stdout + done.stderr).splitlines() if "missing date" not in line]
        assert said == []


def test_what_is_printed_by_man(tmp_path: Path) -> None:
    if not shutil.which("mandoc"):
        pytest.skip("mandoc is not installed")
    path = tmp_path / "page.1"
    path.write_text(pages()["llama4-convert-explain.1"])
    shown: Callable[..., str] = functools.partial(subprocess.check_output, text=True)
    text = re.sub(r".\x08", "", shown(["mandoc", "-T", "utf8", path]))
    for words in (
        "--recipe NAME|FILE",
        "'*layers.3.*router*'",
        "Default: 5GB.",
        "EXIT STATUS",
        "llama4-convert-convert(1)",
    ):
        assert words in text
