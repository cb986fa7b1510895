"""The command `validate`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama4_convert.commands import terminal
from llama4_convert.commands.options import SEED, Size, as_json, dtype_option, file_path
from llama4_convert.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from llama4_convert.validation.results import Validation


class Gate(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        name, _, limit = value.partition("=")
        try:
            return name, float(limit)
        except ValueError:
            self.fail(f"{value!r}: write a metric and its limit, kl_mean=0.01", param, ctx)


@click.command()
@click.argument("path", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--reference", required=True, metavar="SRC", type=click.Path(path_type=Path), help="What DST was made from."
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Random tokens to try, and if the model sees a tile of noise.",
)
@click.option("--prompts", type=file_path, help="Try the lines of a text file instead, one prompt a line.")
@click.option("--token-ids", type=file_path, help="Try token ids: a JSON list of lists, or one prompt a line.")
@click.option("--image", "images", type=file_path, multiple=True, help="Try a picture instead; may be repeated.")
@click.option(
    "--with",
    "runner",
    type=click.Choice(["llama4", "transformers"]),
    default="llama4",
    show_default=True,
    help="What runs DST: our own reference model, or Transformers (any directory that it loads).",
)
@click.option(
    "--reference-with",
    "reference_runner",
    type=click.Choice(["llama4", "transformers"]),
    default="llama4",
    show_default=True,
    help="What runs SRC.",
)
@dtype_option
@click.option("--gate", "gates", type=Gate(), multiple=True, help="Another limit: kl_mean=0.01. May be repeated.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random tokens.")
@click.option(
    "--max-memory",
    type=Size(),
    default="4GiB",
    show_default=True,
    help="Bound on the memory of the process; Transformers holds its whole model besides.",
)
@click.option(
    "--cache",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where a run keeps what it needs to go on, and what SRC computes for the next DST. Default: ~/.cache/llama4-convert.",
)
@click.option(
    "--html",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the report with its pictures.",
)
@click.option("--no-cache", is_flag=True, help="Keep nothing.")
@as_json
def validate(
    path: Path,
    as_json: bool,
    gates: tuple[tuple[str, float], ...],
    html: Path | None,
    cache: Path | None,
    no_cache: bool,
    **options: Any,
) -> None:
    """Check that DST says, holds and computes what SRC does.

    What is quantized is held against the error that its scheme can make.

    Every field of config.json is held against params.json, every tensor bit by bit against SRC's, and the logits of the same
    prompts against our reference model's. What is wrong is named: the field, the tensor, the first layer that strays.

    It needs 4 GiB of memory whatever the model's size, and an interrupted run goes on with the same command.

    \b
    Examples:
      llama4-convert validate scout-hf --reference Llama-4-Scout-17B-16E-Instruct/original
      llama4-convert validate scout-int4 --reference Llama-4-Scout-17B-16E-Instruct/original --html report.html
      llama4-convert validate scout-hf --reference Llama-4-Scout-17B-16E-Instruct/original --with transformers
    """

    from llama4_convert.reports.validation import validate_verdict
    from llama4_convert.validation.cache import default_folder
    from llama4_convert.validation.validate import validate as run

    if no_cache and cache is not None:
        raise UsageError("--cache and --no-cache contradict each other: leave one out")
    if html is not None:
        _check_place(html)
    if cache is not None and not cache.name:
        raise UsageError("--cache has no folder: name one, or leave it out")
    with terminal.ProgressBar("validate", as_json) as bar:
        result = run(
            path,
            gates=dict(gates),
            cache=None if no_cache else cache or default_folder(),
            warn=terminal.warn,
            start=bar.start,
            progress=bar.advance,
            at=bar.at,
            **options,
        )
    terminal.show(result, as_json, _summary)
    if html is not None:
        from llama4_convert.reports.html.report import write_report

        write_report(result, html)
        terminal.say(f"{html} has the pictures")
    if not result.passed:
        raise CheckFailed(f"{path} is not what {result.reference} is: {validate_verdict(result)}")


def _summary(result: Validation) -> str:
    """The result in words, on a terminal within its width and with a verdict that is seen from afar."""
    from llama4_convert.reports.validation import validate_summary, wrapped

    text = validate_summary(result)
    if not sys.stdout.isatty():
        return text
    verdict, color = ("PASSED", "green") if result.passed else ("FAILED", "red")
    text = wrapped(text, shutil.get_terminal_size().columns)
    return click.style(verdict, fg=color, bold=True) + text.removeprefix(verdict)


def _check_place(html: Path) -> None:
    """Refuses before the run, not after hours, what a report cannot be written to."""
    if not html.name:
        raise UsageError("--html has no file: name one, or leave it out")
    if html.exists() and not html.is_file():
        raise UsageError(f"{html} is no regular file: give another FILE to --html")
    try:
        with tempfile.TemporaryFile(dir=html.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"{html.parent} is no folder that can be written ({error.strerror}): give another FILE to --html"
        ) from error
