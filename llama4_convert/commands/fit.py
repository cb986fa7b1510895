"""The command `fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llama4_convert.commands import terminal
from llama4_convert.commands.options import as_json, gpu_names, gpus_option
from llama4_convert.errors import CheckFailed


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--gpu",
    metavar="NAME|all",
    default="h100-80gb",
    show_default=True,
    shell_complete=gpu_names,
    help="The GPU; `all`: every one known.",
)
@gpus_option
@click.option(
    "--context", type=click.IntRange(min=1), help="Tokens that must fit. Default: 8,192, and the largest is told."
)
@click.option(
    "--sequences",
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Sequences of that many tokens at a time.",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["bf16", "fp8"]),
    default="bf16",
    show_default=True,
    help="fp8 halves the KV cache where the runtime and the GPU have it.",
)
@as_json
def fit(path: Path, as_json: bool, **options: Any) -> None:
    """Say whether GPUs hold PATH in each runtime, with how much context, and the command that serves it. Reads headers only.

    PATH is a finished output directory, quantized or not; or Meta's directory, of which every built-in recipe is tried. Ends
    with exit code 5 if nothing fits, and says what would.

    \b
    Examples:
      llama4-convert fit scout-int4
      llama4-convert fit scout-fp8 --gpu h100-80gb --gpus 2 --context 131072
      llama4-convert fit Llama-4-Scout-17B-16E-Instruct/original --gpu all
    """
    from llama4_convert.fitting.fit import fit as run
    from llama4_convert.fitting.table import fit_table

    result = run(path, **options)
    terminal.warn(*result.warnings)
    terminal.show(result, as_json, fit_table)
    if not result.fits:
        nearest = result.fit
        raise CheckFailed(f"{path} does not fit, {nearest.name} comes nearest on {nearest.gpu}: {nearest.advice}")
