"""Nothing in the documentation can rot: its commands and its Python are run, its links and options are looked up.

The names that the documentation uses (`Llama-4-Scout-17B-16E-Instruct/original`, `scout-hf` …) exist here, as small as can be.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from llama4_convert import convert, synth, validate
from llama4_convert.commands import cli
from llama4_convert.commands.terminal import json_text
from llama4_convert.samples.demo import Demonstration
from tests.support import commands

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "llama4_convert").rglob("*.md")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
SCOUT = "Llama-4-Scout-17B-16E-Instruct/original"
OUTPUTS = {"target", "folder", "html"}  # parameters that name what a command writes
OUTPUT_FILES = {"report.html"}  # the same in Python
INPUT_FILES = {"tree.json", "parity.json"}  # click looks for these while it parses
# What makes an example small enough to be run; `demo` is compared with its transcript instead. Nothing is sent anywhere.
SMALLER = {
    "synth": ["--tiny"],
    "validate": ["--tokens", "16"],
    "generate": ["--max-new-tokens", "4"],
    "push": ["--dry-run"],
}
TOKENS = {"200000": "1000", "6864": "686"}  # the small model's vocabulary has fewer


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def command_lines(block: Block) -> Iterator[list[str]]:
    """The words of each `llama4-convert ...` in it, without the program and without where the output is sent."""
    for line in block.text.replace("\\\n", " ").splitlines():
        found = re.match(r"(?:\$ )?llama4-convert (.+)", line)
        if found:
            words = shlex.split(found[1], comments=True)
            yield words[: words.index(">")] if ">" in words else words


COMMANDS = list(
    {
        shlex.join(words): words
        for block in BLOCKS
        if block.language in ("", "sh", "console")
        for words in command_lines(block)
        if words[0] != "demo"
    }.values()
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For models as small as these, threads cost more than they do."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small things under the names of the documentation; each is made when it is first asked for."""
    folder = tmp_path_factory.mktemp("shelf")

    def digests(path: Path) -> None:
        path.write_text("".join(f"{sha} {name}\n" for name, sha in commands.digests(get("scout-fp8")).items()))

    def parity(path: Path) -> None:
        path.write_text(json_text(validate(get("scout-int4"), reference=get(SCOUT), tokens=16)))

    make: dict[str, Callable[[Path], Any]] = {
        SCOUT: lambda path: synth(path, geometry="scout", tiny=True, experts=6),
        "scout-hf": lambda path: convert(get(SCOUT), path),
        "scout-int4": lambda path: convert(get(SCOUT), path, recipe="int4"),
        "scout-fp8": lambda path: convert(get(SCOUT), path, recipe="fp8"),
        "my-lora": lambda path: commands.write_adapter(get("scout-hf"), path),
        "my-tune": lambda path: convert(get(SCOUT), path),
        "my-text-tune": lambda path: convert(get(SCOUT), path, text_only=True),
        "tree.json": digests,
        "parity.json": parity,
        "result.json": lambda path: path.symlink_to(get("parity.json")),
    }

    @functools.cache
    def get(name: str) -> Path:
        assert name in make, f"{name} is in the documentation: say here what small thing stands for it"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make[name](path)
        return path

    return get


def put(shelf: Callable[[str], Path], name: str, is_changed: bool = False) -> None:
    """Puts it into the working directory: a link, or a copy of what will be changed."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    if is_changed:
        commands.copy(shelf(name), Path(name))
    else:
        Path(name).symlink_to(shelf(name))


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters of a command, by click; it raises for options that do not exist and arguments that are missing."""
    command = cli.cli.commands[words[0]]
    program = click.Context(cli.cli, **cli.cli.context_settings)  # click keeps a command's first help option
    with command.make_context(words[0], list(words[1:]), parent=program) as context:
        return context.params


# -------------------- what can be run


def test_there_is_something_to_run() -> None:
    assert {words[0] for words in COMMANDS} == cli.cli.commands.keys() - {"demo"}
    assert len(PYTHON) >= 2


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_commands_run(
    words: list[str],
    shelf: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHELL", "/bin/bash")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for word in INPUT_FILES & set(words):
        put(shelf, word)
    for name, value in parsed(words).items():
        if isinstance(value, Path) and name not in OUTPUTS and not value.is_symlink():
            put(shelf, str(value), is_changed="--write" in words)
    outcome = commands.run(capsys, *words, *SMALLER.get(words[0], []))
    assert outcome.code == 0, outcome.err
    assert outcome.out


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(
    block: Block, shelf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ast.walk(ast.parse(block.text)):
        if not (isinstance(text, ast.Constant) and isinstance(text.value, str)) or text.value in OUTPUT_FILES:
            continue
        if not Path(text.value).exists():
            put(shelf, text.value)
    code = re.sub(r"\b\d+\b", lambda number: TOKENS.get(number[0], number[0]), block.text)
    exec(compile(code, str(block), "exec"), {})


def test_the_transcript_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """README's, but for the figures; and the fields that the manual names."""
    (block,) = (block for block in blocks(ROOT / "README.md") if block.text.startswith("$ llama4-convert demo"))
    command, _, transcript = block.text.partition("\n")
    monkeypatch.chdir(tmp_path)
    outcome = commands.run(capsys, *shlex.split(command)[2:], "--json")
    assert outcome.code == 0, outcome.err

    def without_figures(text: str) -> list[str]:
        return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", text).splitlines()

    said = "\n".join(line for line in outcome.err.splitlines() if not line.startswith("warning: "))
    assert without_figures(said) == without_figures(transcript)
    msgspec.convert(outcome.json, Demonstration, strict=True)


# -------------------- what can be looked up


def spans(page: Path) -> list[str]:
    """What stands in backticks, outside of blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def options(command: click.Command) -> set[str]:
    return {"--help", *(opt for param in command.params for opt in param.opts if opt.startswith("--"))}


BENCHMARKS = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
OF_RUNTIMES = re.findall(
    r"--[a-z-]+", (ROOT / "llama4_convert" / "fitting" / "runtimes.toml").read_text(encoding="utf-8")
)
ALL_OPTIONS = {"--version", *re.findall(r'"(--[a-z-]+)"', BENCHMARKS), *OF_RUNTIMES}.union(
    *(options(command) for command in cli.cli.commands.values())
)
OTHERS = {"pip", "make", "python", "curl", "git", "vllm"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_that_are_spoken_of_exist(page: Path) -> None:
    for span in spans(page):
        words = span.removeprefix("llama4-convert ").split()
        if words[0] in OTHERS or span == "-":
            continue
        command = cli.cli.commands.get(words[0])
        known = options(command) if command else ALL_OPTIONS
        said = re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)
        assert set(said) <= known, f"{page.name}: {span}"
        if span.startswith("llama4-convert ") and not words[0].startswith(("-", "<")):
            assert command, f"{page.name}: {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_programs_that_are_spoken_of_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for span in [*spans(page), *(line for block in blocks(page) for line in block.text.splitlines())]:
        if target := re.match(r"(?:\$ )?make ([a-z-]+)$", span):
            assert re.search(rf"^{target[1]}:", makefile, re.MULTILINE), span
        if script := re.match(r"(?:\$ )?python ([\w/]+\.py)\b", span):
            assert (ROOT / script[1]).is_file(), span
        if module := re.match(r"(?:\$ )?python -m (llama4_convert[\w.]*|benchmarks[\w.]*)", span):
            assert importlib.util.find_spec(module[1]), span


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives to headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target}"


def test_the_design_lists_every_folder_and_no_other() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    tree = text.partition("## The packages\n\n```\n")[2].partition("\ntests/")[0]
    listed, above = set[str](), [""] * 4
    for indent, name in re.findall(r"^( *)(\w+)/ ", tree, re.MULTILINE):
        depth = len(indent) // 2
        above[depth] = name
        listed.add("/".join(above[: depth + 1]))
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for package in ("mappings", "llama4", "quant", "llama4_convert")
        for pattern in ("__init__.py", "*.toml")
        for path in (ROOT / package).rglob(pattern)
    }
    assert listed == folders


def test_a_wrong_example_is_noticed() -> None:
    with pytest.raises(click.UsageError):
        parsed(["convert", "SRC", "DST", "--no-such-option"])
    with pytest.raises(click.UsageError):
        parsed(["convert", "SRC"])
