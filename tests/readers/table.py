"""readers.toml and results.json, and the page that both make: docs/readers.md."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct, convert, to_builtins

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "readers.md"
RESULTS = HERE / "results.json"
# Nats a token between a reader's logits and the reference's, of the same directory. Formats with FP8 activations, and bf16
# kernels, differ by rounding; an expert in another's place or a field that is lost costs more than a tenth.
LIMIT, LIMIT_QUANTIZED = 1e-6, 2e-3


class Reader(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A program, or a release of one, that reads our directories."""

    requires: list[str]
    """what pip installs, beside numpy, pillow and the pinned torch"""
    script: str
    """of scripts/; it answers as scripts/prompts.py says"""
    reads: list[str]
    """the directories of subjects.py that it is given"""
    fails: dict[str, str] = {}
    """directory -> why the reader does not read it"""
    pictures: str = ""
    """why it reads texts only; empty: it sees pictures, too"""
    without: list[str] = []
    """packages that are taken out after pip has installed them"""
    source: str = ""
    """a package that is built from its source, which the script finds beside its environment"""
    processes: int = 1
    """of `torchrun`; 1: without it"""
    computes: str = "float32"
    """the dtype, which decides how near its logits are"""

    def limit(self, directory: str) -> float:
        exact = self.computes == "float32" and directory not in ("int4", "fp8", "mixed", "nf4")
        return LIMIT if exact else LIMIT_QUANTIZED

    def failure(self, directory: str, prompt: str) -> str:
        """Why it is expected to fail; empty: it is expected to be right."""
        return self.fails.get(directory) or (self.pictures if prompt == "picture" else "")


class Run(Struct, frozen=True, kw_only=True):
    """What a reader made of its directories, once."""

    date: str
    versions: dict[str, str]
    """of the packages that it is made of"""
    found: dict[str, dict[str, float | str]]
    """directory -> prompt -> KL in nats a token, or the error"""


def readers() -> dict[str, Reader]:
    return convert(tomllib.loads((HERE / "readers.toml").read_text()), dict[str, Reader])


def results() -> dict[str, Run]:
    return convert(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}, dict[str, Run])


def record(name: str, run: Run) -> None:
    """Keep a reader's newest run, and write the page anew."""
    runs = {**results(), name: run}
    ordered = {name: to_builtins(runs[name]) for name in readers() if name in runs}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    write_page()


def write_page() -> None:
    head, _, _ = PAGE.read_text().partition(START)
    PAGE.write_text(head + START + "\n" + "\n".join(page(readers(), results())) + "\n")


def surprises(reader: Reader, run: Run) -> Iterator[str]:
    """Where a run is not what the table says."""
    for directory, found in run.found.items():
        for prompt, what in found.items():
            is_right = isinstance(what, float) and what < reader.limit(directory)
            if is_right == bool(reader.failure(directory, prompt)):
                yield f"{directory}, {prompt}: {'reads it now' if is_right else what}"


START = "<!-- From here on `make readers` writes. -->"


def page(table: Mapping[str, Reader], runs: Mapping[str, Run]) -> Iterator[str]:
    """The lines of the table, and of its notes."""
    columns = list(dict.fromkeys(directory for reader in table.values() for directory in reader.reads))
    notes: list[str] = []
    yield ""
    yield f"| reader | run on | {' | '.join(columns)} |"
    yield "|---|---|" + "---|" * len(columns)
    for name, run in runs.items():
        cells = [_cell(table[name], run.found.get(directory), directory, notes) for directory in columns]
        versions = [f"{package} {version}" for package, version in run.versions.items() if version not in name]
        beside = f" ({', '.join(versions)})" if versions else ""
        yield f"| {name}{beside} | {run.date} | {' | '.join(cells)} |"
    yield ""
    for number, note in enumerate(notes, 1):
        yield f"{number}. {note}"


def _cell(reader: Reader, found: Mapping[str, float | str] | None, directory: str, notes: list[str]) -> str:
    if not found:
        return ""
    reasons = list(dict.fromkeys(filter(None, (reader.failure(directory, prompt) for prompt in found))))
    notes += [why for why in reasons if why not in notes]
    numbers = "".join(f" ({notes.index(why) + 1})" for why in reasons)
    right = [kl for prompt, kl in found.items() if not reader.failure(directory, prompt) and isinstance(kl, float)]
    if not right:
        return f"no{numbers}"
    return f"{max(right):.0e}{', no pictures' if reasons else ''}{numbers}"
