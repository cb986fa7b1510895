"""Commands that read checkpoints and tell: inspect, verify."""

from __future__ import annotations

from pathlib import Path

import click

from llama4_convert import formatting
from llama4_convert.commands import terminal
from llama4_convert.commands.options import as_json
from llama4_convert.errors import CheckFailed
from llama4_convert.reports import summaries


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option(
    "--stats", is_flag=True, help="Read every number: range, mean, spread, zeros, NaN, a histogram by tensor."
)
@as_json
def inspect(path: Path, tensors: bool, stats: bool, as_json: bool) -> None:
    """Show what a checkpoint in either layout holds. Without --stats it reads no tensor data.

    Geometry, parameters (and those that a token meets), bytes by kind, dtypes, how Meta's keys are spelled, what is quantized
    and how, and what the manifest of an output tells. Tensors with NaN or infinities are named, where a conversion has
    counted them, and with --stats.

    \b
    Examples:
      llama4-convert inspect scout-hf --tensors
      llama4-convert inspect scout-hf --stats
    """
    from llama4_convert.inspection.inspect import inspect as run
    from llama4_convert.reports.inspection import inspect_summary

    with terminal.ProgressBar("inspect", as_json) as bar:
        result = run(path, stats=stats, start=bar.start, progress=bar.advance)
    terminal.warn(*result.warnings)
    terminal.show(result, as_json, lambda r: inspect_summary(r, tensors))


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--ids",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="What the files should be: JSON from the Hub's API, or lines of a digest (SHA-256, git id, MD5) and a path.",
)
@as_json
def verify(path: Path, as_json: bool, ids: Path | None) -> None:
    """Read every byte of PATH again and compare it with what was promised.

    An output directory is held against the SHA-256 of its manifest; Meta's directory against the CRCs inside its archives,
    files of scales included, and against checklist.chk where there is one; any download from the Hub against the ids that
    the downloader has left there.

    \b
    Examples:
      llama4-convert verify scout-hf
      llama4-convert verify Llama-4-Scout-17B-16E-Instruct/original
      llama4-convert verify scout-fp8 --ids tree.json
    """
    from llama4_convert.inspection.verify import verify as run

    with terminal.ProgressBar("verify", as_json) as bar:
        result = run(path, ids=ids, start=bar.start, progress=bar.advance)
    terminal.show(result, as_json, summaries.verify_summary)
    if not result.ok:
        bad = [file.file for file in result.files if not file.ok]
        raise CheckFailed(
            f"{path}: {formatting.differ(len(bad), 'file')} from what was promised, first {bad[0]}: {result.advice}"
        )
