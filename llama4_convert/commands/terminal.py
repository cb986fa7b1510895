"""What commands print: lines on stdout, warnings on stderr, and a progress bar where a person looks on."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from llama4_convert.formatting import gigabytes


def say(text: str) -> None:
    click.echo(text, err=True)


def warn(*texts: str) -> None:
    for text in texts:
        click.echo(click.style("warning: ", fg="yellow") + text, err=True)


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

            self._bar = tqdm(desc=self.what, total=total, initial=done, unit="B", unit_scale=True, smoothing=0.1)

    def at(self, what: str) -> None:
        """What is under way: "layers.3"."""
        self._at = f" ({what})"
        if self._bar is not None:
            self._bar.set_description(self.what + self._at)

    def advance(self, n: int) -> None:
        self._done += n
        if self._bar is not None:
            self._bar.update(n)
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
        if self._bar is not None:
            self._bar.close()
