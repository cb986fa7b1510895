"""Commands that write checkpoints: plan, convert, export, recipes."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from llama4_convert.commands import terminal
from llama4_convert.commands.options import (
    as_json,
    gpu_names,
    gpus_option,
    max_memory_option,
    overwrite_option,
    recipe_names,
    request_options,
    source_argument,
)
from llama4_convert.errors import UsageError
from llama4_convert.reports import summaries


@click.command()
@source_argument
@request_options
@click.option(
    "--gpu",
    metavar="NAME",
    shell_complete=gpu_names,
    help="Say whether the result fits onto this GPU, in which runtimes: h100-80gb (`--gpu list` lists the names).",
)
@gpus_option
@click.option("--context", type=click.IntRange(min=1), help="Tokens of context that must fit as well.")
@as_json
def plan(source: Path, as_json: bool, **request: Any) -> None:
    """Show what `convert` would write, how large, and in how much memory. Reads no tensor data.

    \b
    Examples:
      llama4-convert plan Llama-4-Scout-17B-16E-Instruct/original
      llama4-convert plan Llama-4-Scout-17B-16E-Instruct/original --recipe int4 --gpu h100-80gb --context 131072
    """
    from llama4_convert.conversion.convert import plan as run

    result = run(source, **request)
    terminal.warn(*result.warnings)
    terminal.show(result, as_json, summaries.plan_summary)


@click.command()
@source_argument
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@request_options
@max_memory_option("1GiB")
@click.option(
    "--max-error",
    type=click.FloatRange(min=0),
    help="Stop (exit 5) at a matrix whose relative squared error by quantization is larger.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where a recipe computes: cpu, cuda, cuda:1. The bytes are the same.",
)
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Plan only; write nothing.")
@as_json
def convert(
    source: Path,
    target: Path,
    max_memory: int,
    max_error: float | None,
    device: str,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **request: Any,
) -> None:
    """Convert Meta's checkpoint SRC (consolidated.NN.pth, params.json) to a Transformers directory DST.

    With --recipe it is quantized on the way, with --adapter a LoRA adapter is merged into it. SRC may then be a Transformers
    directory, and with --vision-from it is a text-only one, which becomes whole again. --config-from repairs its config.json.

    Meta's quantized originals (fp8_scales_N.pt or int4_scales_N.pt beside the rank files) are dequantized to bf16, or keep
    their bits where a recipe has the same rows (fp8) or groups (int4).

    An interrupted conversion goes on with the same command. Until its index file is there, DST does not load as a model.

    \b
    Examples:
      llama4-convert convert Llama-4-Scout-17B-16E-Instruct/original scout-hf
      llama4-convert convert Llama-4-Scout-17B-16E-Instruct/original scout-int4 --recipe int4
      llama4-convert convert scout-hf scout-tuned --adapter my-lora
      llama4-convert convert my-text-tune scout-tuned --vision-from scout-hf
      llama4-convert convert my-tune scout-tuned --config-from scout-hf
    """
    from llama4_convert.conversion.convert import convert as run
    from llama4_convert.streaming.bounds import Bounds

    if dry_run:
        Bounds(max_memory)  # refused as the run would
        click.get_current_context().invoke(plan, source=source, as_json=as_json, device=device, **request)
        return
    with terminal.ProgressBar("convert", as_json) as bar, _with_overwrite():
        result = run(
            source,
            target,
            max_memory=max_memory,
            max_error=max_error,
            device=device,
            overwrite=overwrite,
            warn=terminal.warn,
            start=bar.start,
            progress=bar.advance,
            **request,
        )
    terminal.show(result, as_json, summaries.convert_summary)


@click.command()
@source_argument
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--ranks",
    type=click.IntRange(1, 128),
    help="Number of rank files. Default: as many as SRC was made from, or has; else 8.",
)
@click.option(
    "--recipe",
    metavar="meta-fp8|FILE",
    shell_complete=recipe_names,
    help="Write the experts as Meta's quantize script writes them for FP8, and fp8_scales_N.pt. Default: as SRC has them, in bf16"
    " where they are quantized.",
)
@click.option(
    "--allow-rank-mismatch",
    is_flag=True,
    help="Where ranks of SRC disagree on a replicated tensor, take the first rank's.",
)
@max_memory_option("1GiB")
@overwrite_option
@as_json
def export(source: Path, target: Path, as_json: bool, **options: Any) -> None:
    """Write SRC, in either layout, to DST in Meta's: consolidated.NN.pth, params.json, tokenizer.model.

    From a Transformers directory it is the way back from `convert`: every tensor bit by bit, without what that drops. From
    Meta's it changes the number of ranks. An interrupted export goes on with the same command. Until params.json is there, DST
    is no model.

    --recipe meta-fp8 writes what Meta's own quantize script writes for FP8 (llama4/scripts/quantize.py, fp8_mixed), by its
    formula: routed experts of all layers but the first and the last as float8_e4m3fn under their keys in consolidated.NN.pth,
    their scales, one for each output of a rank, in fp8_scales_N.pt. Meta's code loads them; it needs a GPU to run.

    \b
    Examples:
      llama4-convert export scout-hf scout-meta --ranks 8
      llama4-convert export Llama-4-Scout-17B-16E-Instruct/original scout-one-file --ranks 1
      llama4-convert export scout-hf scout-meta-fp8 --recipe meta-fp8
    """
    from llama4_convert.conversion.to_meta import export as run

    with terminal.ProgressBar("export", as_json) as bar, _with_overwrite():
        result = run(source, target, warn=terminal.warn, start=bar.start, progress=bar.advance, **options)
    terminal.show(result, as_json, summaries.export_summary)


@contextlib.contextmanager
def _with_overwrite() -> Iterator[None]:
    """Tells the command that replaces what is in the way."""
    from llama4_convert.streaming.output_directory import NeedsOverwrite

    try:
        yield
    except NeedsOverwrite as error:
        command = shlex.join(["llama4-convert", *sys.argv[1:], "--overwrite"])
        raise UsageError(f"{error}; to go on with that one give its options, to replace it: {command}") from error


@click.command()
@as_json
def recipes(as_json: bool) -> None:
    """List the built-in recipes. A file of your own in the same form is taken as well.

    \b
    Example:
      llama4-convert recipes
    """
    from llama4_convert.commands.results import BuiltInRecipe, Recipes
    from quant.recipe import built_in

    found = built_in()
    result = Recipes(recipes=[BuiltInRecipe(name=r.name, format=r.format, summary=r.summary) for r in found.values()])
    terminal.show(result, as_json, lambda result: "\n".join(f"{r.name:14} {r.summary}" for r in result.recipes))
