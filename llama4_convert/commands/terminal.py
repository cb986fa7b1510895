"""What commands print: results on stdout, messages on stderr, and a progress bar where a person looks on.

Nothing here raises: a stream that is closed, full, broken or of another encoding never changes what a run does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import click

from llama4_convert.errors import EnvironmentFailed, one_line, printable
from llama4_convert.formatting import gigabytes

_MAX_TEXT = 2000  # characters of a name or a message: a screenful
_COLORS = {"error": "red", "warning": "yellow"}
_lost: list[OSError] = []  # why results did not reach stdout


def open_streams() -> None:
    """To be called first: what is closed goes to /dev/null, lest a file of the run get its number; no character is refused."""
    _lost.clear()
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def check_output() -> None:
    """To be called last. Raises EnvironmentFailed if a result could not be printed."""
    if _lost:
        why = os.strerror(_lost[0].errno or 0)
        raise EnvironmentFailed(
            f"the run is complete, but stdout did not take its result ({why}): print it somewhere else"
        )


def print_out(text: str, nl: bool = True) -> None:
    """On stdout, as it is. That the reader has gone (`| head`) is no failure."""
    if (error := _echo(text, sys.stdout, nl)) and not isinstance(error, BrokenPipeError):
        _lost.append(error)


def print_text(text: str, nl: bool = True) -> None:
    """On stdout: lines that a model wrote, or with names in them. Joiners stay, which some scripts are written with."""
    print_out(printable(text, len(text), keep="\n\t\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"), nl)


def show(result: Any, as_json: bool, summary: Callable[[Any], str]) -> None:
    """A command's result, a struct: as one line of JSON, or in words."""
    print_out(json_text(result) if as_json else summary(_with_texts(result, lambda text: printable(text, _MAX_TEXT))))


def json_text(result: Any) -> str:
    """A result as one line of JSON in ASCII. A lone surrogate, of a name that is no UTF-8, is text that spells its escape."""
    from msgspec import to_builtins

    value = _with_texts(to_builtins(result), lambda text: text.encode("utf-8", "backslashreplace").decode())
    return json.dumps(value, allow_nan=False)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same with every text in it changed, keys of dictionaries included."""
    from msgspec import Struct, structs

    match value:
        case str():
            return change(value)
        case Struct():
            return structs.replace(
                value, **{f: _with_texts(getattr(value, f), change) for f in value.__struct_fields__}
            )
        case dict():
            return {_with_texts(key, change): _with_texts(item, change) for key, item in value.items()}
        case list() | tuple():
            return type(value)(_with_texts(item, change) for item in value)
    return value


def say(text: str) -> None:
    """Lines on stderr."""
    _echo(printable(text, len(text), keep="\n"), sys.stderr)


def warn(*texts: str) -> None:
    for text in texts:
        message("warning", text)


def message(kind: str, text: object) -> None:
    """A line on stderr, after its kind: "error" or "warning"."""
    _echo(click.style(f"{kind}: ", fg=_COLORS[kind]) + one_line(text, _MAX_TEXT), sys.stderr)


def _echo(text: str, stream: TextIO, nl: bool = True) -> OSError | None:
    """Prints; what it cannot print, and all that follows, goes to /dev/null, and the reason is returned."""
    try:
        click.echo(text, file=stream, nl=nl)
    except OSError as error:
        with contextlib.suppress(OSError):  # a stream without a number, of a caller from Python
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


class ProgressBar:
    """Bytes done, rate and time left on stderr: a tqdm bar on a terminal, else a plain line every few seconds.

    With `--json` the plain lines are left out.
    """

    def __init__(self, what: str, as_json: bool) -> None:
        self.what, self.as_json = what, as_json
        self._bar: Any = None
        self._at = ""
        self._total = self._done = 0
        self._began = self._printed = time.monotonic()

    def start(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._began = self._printed = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm  # type: ignore[import-untyped]

            with contextlib.suppress(OSError):
                self._bar = tqdm(desc=self.what, total=total, initial=done, unit="B", unit_scale=True, smoothing=0.1)

    def at(self, what: str) -> None:
        """What is under way: "layers.3"."""
        self._at = f" ({printable(what)})"
        self._draw(lambda bar: bar.set_description(self.what + self._at))

    def advance(self, n: int) -> None:
        self._done += n
        if self._bar is not None:
            self._draw(lambda bar: bar.update(n))
        elif not self.as_json and time.monotonic() - self._printed > 5:
            self._printed = time.monotonic()
            rate = self._done / max(self._printed - self._began, 1e-9)
            left = (self._total - self._done) / max(rate, 1)
            say(
                f"{self.what}{self._at}: {gigabytes(self._done)} of {gigabytes(self._total)}, {gigabytes(int(rate))}/s,"
                f" {left:.0f} s left"
            )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._draw(lambda bar: bar.close())

    def _draw(self, change: Callable[[Any], object]) -> None:
        """On a terminal that has gone there is no bar any more."""
        try:
            if self._bar is not None:
                change(self._bar)
        except OSError:
            self._bar = None
