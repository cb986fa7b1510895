"""The manual says what the commands say and do: every option, every default, every field of `--json`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from msgspec import UNSET, Struct, UnsetType

from llama4_convert.commands import cli, manual
from llama4_convert.commands.fields import field_docs, fields_of, result_types, schema
from tests.support import commands, hub_stand_in

REPOSITORY = Path(__file__).resolve().parents[3]
RESULTS = result_types()


def test_the_committed_manual_is_what_the_commands_say() -> None:
    advice = "run: python -m llama4_convert.commands.manual"
    docs = REPOSITORY / "docs"
    assert (docs / "commands.md").read_text() == manual.markdown(), advice
    committed, made = (docs / "results.schema.json").read_text(), json.dumps(schema(), indent=1) + "\n"
    assert _with_sorted_unions(committed) == _with_sorted_unions(made), advice


def _with_sorted_unions(schema: str) -> Any:
    """The schema, with the types of a union in one order: releases of msgspec differ in it, and it means nothing."""
    return json.loads(
        schema, object_hook=lambda o: {k: sorted(v, key=str) if k == "anyOf" else v for k, v in o.items()}
    )


def test_every_field_of_every_result_has_a_docstring_in_the_manual_and_the_schema() -> None:
    for command, kind in RESULTS.items():
        for field in fields_of(kind):
            assert re.search(r"\w", field.doc), f"{command}: {field.name}"
    for name, body in schema()["$defs"].items():
        for field, described in body["properties"].items():
            assert described["description"], f"{name}: {field}"


class Below(Struct):
    a: int
    """of the
    base"""


class Above(Below):
    b: list[Below] | UnsetType = UNSET
    """its own"""


def test_the_docstrings_are_read_from_the_class_that_has_the_field() -> None:
    assert field_docs(Above) == {"a": "of the base", "b": "its own"}
    assert [field.json_type for field in fields_of(Above)] == ["whole number", "list of objects, not always there"]


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
    printed: dict[str, dict[str, Any]] = {name: {} for name in RESULTS}
    places = {name: str(tmp_path / name) for name in PLACES} | {"REPO": "me/Llama-4-tiny"}
    with hub_stand_in.reached(monkeypatch):
        for words in RUNS:
            outcome = commands.run(capsys, *(places.get(word, word) for word in words), "--json")
            assert outcome.code == 0, outcome.err
            msgspec.convert(outcome.json, RESULTS[words[0]], strict=True)  # it is what the type says, in every object
            printed[words[0]] |= outcome.json
            if words[:2] == ["convert", "META"] and not (tmp_path / "LORA").exists():
                commands.write_adapter(tmp_path / "HF", tmp_path / "LORA")
            if words[0] == "validate":
                (tmp_path / "PARITY").write_text(outcome.out)
    assert RESULTS.keys() == cli.cli.commands.keys(), "each command has a result type in commands/fields.py"
    for name in RESULTS.keys() - {"demo"}:
        assert printed[name].keys() == {field.name for field in fields_of(RESULTS[name])}, name
