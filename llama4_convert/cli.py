"""The command line. Heavy modules are imported by the commands that need them, so that `--help` is quick."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from llama4_convert import report
from llama4_convert.errors import CheckFailed, ConvertError, EnvironmentFailed, UsageError, from_os_error
from llama4_convert.version import VERSION

EXIT_CODES = """
\b
Exit codes: 0 done, 1 a bug of ours, 2 usage, 3 bad input, 4 environment
(disk full, no permission, busy), 5 a check failed, 130 interrupted.
"""


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, prog_name="llama4-convert")
def cli() -> None:
    """Meta's original Llama 4 checkpoints to Transformers directories: planned, streamed in bounded memory, checked."""


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return report.parse_size(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda function: functools.reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there."
)
source_argument = click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
request_options = _options(
    click.option(
        "--recipe",
        metavar="NAME|FILE",
        help="Quantize on the way: a built-in recipe (`llama4-convert recipes` lists them) or a TOML file.",
    ),
    click.option(
        "--allow-nonfinite",
        is_flag=True,
        help="Quantize matrices with NaN or infinities, too: as 0 and as the largest magnitude. Default: refused.",
    ),
    click.option(
        "--variant",
        type=click.Choice(["base", "instruct", "guard"]),
        help="Kind of model: decides chat template, stop tokens and context. Default: concluded from the checkpoint.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float16", "float32"]),
        help="Cast every tensor. Default: each stays as it is.",
    ),
    click.option("--text-only", is_flag=True, help="Leave the vision tower out: a Llama4ForCausalLM directory."),
    click.option(
        "--shard-size",
        type=Size(),
        default="5GB",
        show_default=True,
        help="Largest size of an output file: 5GB, 512MiB.",
    ),
    click.option(
        "--max-position-embeddings", type=int, help="Context length for config.json. Default: as published by variant."
    ),
    click.option(
        "--allow-rank-mismatch",
        is_flag=True,
        help="Where ranks disagree on a replicated tensor, take the first rank's.",
    ),
)


@cli.command("plan")
@source_argument
@request_options
@click.option(
    "--gpu",
    metavar="NAME",
    help="Say whether the result fits onto this GPU, in which runtimes: h100-80gb (`--gpu list` lists the names).",
)
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="How many of them.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens of context that must fit as well.")
@as_json
def plan_command(source: Path, as_json: bool, **request: Any) -> None:
    """Show what `convert` would write, how large, and in how much memory. Reads no tensor data.

    \b
    Examples:
      llama4-convert plan Llama-4-Scout-17B-16E-Instruct/original
      llama4-convert plan Llama-4-Scout-17B-16E-Instruct/original --recipe int4 --gpu h100-80gb --context 131072
    """
    from llama4_convert import plan

    result = plan(source, **request)
    for text in result["warnings"]:
        report.warn(text)
    _show(result, as_json, report.plan_summary)


@cli.command()
@source_argument
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@request_options
@click.option(
    "--max-memory", type=Size(), default="1GiB", show_default=True, help="Bound on the memory of the process."
)
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
@click.option("--overwrite", is_flag=True, help="Replace what DST holds.")
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

    With --recipe it is quantized on the way, and SRC may be a Transformers directory.

    An interrupted conversion goes on with the same command. Until its index file is there, DST does not load as a model.

    \b
    Examples:
      llama4-convert convert Llama-4-Scout-17B-16E-Instruct/original scout-hf
      llama4-convert convert Llama-4-Scout-17B-16E-Instruct/original scout-int4 --recipe int4
    """
    from llama4_convert.conversion import convert as run

    if dry_run:
        click.get_current_context().invoke(plan_command, source=source, as_json=as_json, **request)
        return
    with report.ProgressBar("convert", quiet=as_json and not sys.stderr.isatty()) as bar, _with_overwrite():
        result = run(
            source,
            target,
            max_memory=max_memory,
            max_error=max_error,
            device=device,
            overwrite=overwrite,
            warn=report.warn,
            start=bar.start,
            progress=bar.advance,
            **request,
        )
    _show(result, as_json, report.convert_summary)


@cli.command()
@source_argument
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--ranks",
    type=click.IntRange(1, 128),
    help="Number of rank files. Default: as many as SRC was made from, or has; else 8.",
)
@click.option(
    "--allow-rank-mismatch",
    is_flag=True,
    help="Where ranks of SRC disagree on a replicated tensor, take the first rank's.",
)
@click.option(
    "--max-memory", type=Size(), default="1GiB", show_default=True, help="Bound on the memory of the process."
)
@click.option("--overwrite", is_flag=True, help="Replace what DST holds.")
@as_json
def export(source: Path, target: Path, as_json: bool, **options: Any) -> None:
    """Write SRC, in either layout, to DST in Meta's: consolidated.NN.pth, params.json, tokenizer.model.

    From a Transformers directory it is the way back from `convert`: every tensor bit by bit, without what that drops. From
    Meta's it changes the number of ranks. An interrupted export goes on with the same command. Until params.json is there, DST
    is no model.

    \b
    Examples:
      llama4-convert export scout-hf scout-meta --ranks 8
      llama4-convert export Llama-4-Scout-17B-16E-Instruct/original scout-one-file --ranks 1
    """
    from llama4_convert import export as run

    with report.ProgressBar("export", quiet=as_json and not sys.stderr.isatty()) as bar, _with_overwrite():
        result = run(source, target, warn=report.warn, start=bar.start, progress=bar.advance, **options)
    _show(result, as_json, report.export_summary)


@contextlib.contextmanager
def _with_overwrite() -> Iterator[None]:
    """Tells the command that replaces what is in the way."""
    from llama4_convert.execution import NeedsOverwrite

    try:
        yield
    except NeedsOverwrite as error:
        command = shlex.join(["llama4-convert", *sys.argv[1:], "--overwrite"])
        raise UsageError(f"{error}; to go on with that one give its options, to replace it: {command}") from error


@cli.command()
@as_json
def recipes(as_json: bool) -> None:
    """List the built-in recipes. A file of your own in the same form is taken as well.

    \b
    Example:
      llama4-convert recipes
    """
    from quant.recipe import built_in

    found = built_in()
    body = {"recipes": [{"name": r.name, "format": r.format, "summary": r.summary} for r in found.values()]}
    _show(body, as_json, lambda b: "\n".join(f"{r['name']:14} {r['summary']}" for r in b["recipes"]))


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option(
    "--stats", is_flag=True, help="Read every number: range, mean, spread, zeros, NaN, a histogram by tensor."
)
@as_json
def inspect(path: Path, tensors: bool, stats: bool, as_json: bool) -> None:
    """Show what a checkpoint in either layout holds: geometry, sizes, tensors. Without --stats it reads no tensor data.

    Tensors with NaN or infinities are named, where a conversion has counted them, and with --stats.

    \b
    Examples:
      llama4-convert inspect scout-hf --tensors
      llama4-convert inspect scout-hf --stats
    """
    from llama4_convert import inspect as run

    with report.ProgressBar("inspect", quiet=as_json and not sys.stderr.isatty()) as bar:
        result = run(path, stats=stats, start=bar.start, progress=bar.advance)
    _show(result, as_json, lambda r: report.inspect_summary(r, tensors))


@cli.command()
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
    and against checklist.chk where there is one; any download from the Hub against the ids that the downloader has left there.

    \b
    Examples:
      llama4-convert verify scout-hf
      llama4-convert verify Llama-4-Scout-17B-16E-Instruct/original
      llama4-convert verify scout-fp8 --ids tree.json
    """
    from llama4_convert import verify as run

    with report.ProgressBar("verify", quiet=as_json and not sys.stderr.isatty()) as bar:
        result = run(path, ids=ids, start=bar.start, progress=bar.advance)
    _show(result, as_json, report.verify_summary)
    if not result["ok"]:
        bad = [f["file"] for f in result["files"] if not f["ok"]]
        raise CheckFailed(f"{path}: {len(bad)} file(s) are not what they should be, first {bad[0]}: {result['advice']}")


class Gate(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        name, _, limit = value.partition("=")
        try:
            return name, float(limit)
        except ValueError:
            self.fail(f"{value!r}: write a metric and its limit, kl_mean=0.01", param, ctx)


SEED = click.IntRange(min=-(1 << 63), max=(1 << 63) - 1)
dtype_option = click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True
)
file_path = click.Path(path_type=Path, dir_okay=False, exists=True)


@cli.command()
@click.argument("path", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--reference", required=True, metavar="SRC", type=click.Path(path_type=Path), help="What DST was made from."
)
@click.option("--tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Random tokens to try.")
@click.option("--prompts", type=file_path, help="Try the lines of a text file instead, one prompt a line.")
@click.option("--token-ids", type=file_path, help="Try token ids: a JSON list of lists, or one prompt a line.")
@click.option("--image", "images", type=file_path, multiple=True, help="Try a picture; may be repeated.")
@click.option(
    "--with",
    "runner",
    type=click.Choice(["llama4", "transformers"]),
    default="llama4",
    show_default=True,
    help="What runs DST. SRC always runs in our own reference model.",
)
@dtype_option
@click.option("--gate", "gates", type=Gate(), multiple=True, help="Another limit: kl_mean=0.01. May be repeated.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random tokens.")
@as_json
def validate(path: Path, as_json: bool, gates: tuple[tuple[str, float], ...], **options: Any) -> None:
    """Check that DST says, holds and computes what SRC does.

    What is quantized is held against the error that its scheme can make.

    Every field of config.json is held against params.json, every tensor bit by bit against SRC's, and the logits of the same
    prompts against our reference model's. What is wrong is named: the field, the tensor, the first layer that strays.

    \b
    Example:
      llama4-convert validate scout-hf --reference Llama-4-Scout-17B-16E-Instruct/original
    """
    from llama4_convert import validate as run

    with report.ProgressBar("validate", quiet=as_json and not sys.stderr.isatty()) as bar:
        result = run(path, gates=dict(gates), warn=report.warn, start=bar.start, progress=bar.advance, **options)
    _show(result, as_json, report.validate_summary)
    if not result["passed"]:
        raise CheckFailed(f"{path} is not what {result['reference']} is: {report.validate_verdict(result)}")


@cli.command()
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to go on from; <|image|> in it is where the picture goes.")
@click.option("--image", type=file_path, help="A picture to look at.")
@click.option("--chat", is_flag=True, help="Take the prompt as a user's message, and write the answer.")
@click.option("--max-new-tokens", type=click.IntRange(min=0), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: greedy.")
@click.option(
    "--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True, help="Nucleus."
)
@click.option("--seed", type=SEED, help="Repeat a sampled text.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: the checkpoint's.")
@as_json
def generate(path: Path, as_json: bool, **options: Any) -> None:
    """Go on from a prompt with our reference model, from Meta's layout or Transformers'.

    \b
    Example:
      llama4-convert generate scout-hf --prompt "The capital of France is"
    """
    from llama4_convert import generate as run

    result = run(path, say=(lambda text: None) if as_json else functools.partial(_print, nl=False), **options)
    _print(json.dumps(result) if as_json else "")
    if result["tokens"] and not result["text"]:
        report.warn(f"the model wrote {len(result['tokens'])} tokens, none of which is text (random weights do that)")


@cli.command()
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--geometry", type=click.Choice(["scout", "maverick", "guard"]), default="scout", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="Number of layers. Default: as published.")
@click.option("--experts", type=click.IntRange(min=1), help="Number of routed experts. Default: as published.")
@click.option("--vocab", type=click.IntRange(min=1), help="Rows of the vocabulary. Default: as published.")
@click.option("--tiny", is_flag=True, help="A few MB, with a tokenizer.model of its own.")
@click.option("--ranks", type=click.IntRange(min=1), help="Number of rank files. Default: 8; 1 for guard.")
@click.option("--base", is_flag=True, help="Add the router statistics that base models carry.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--sparse", is_flag=True, help="All zeros, as holes in the files: full size on no disk, to try plan on.")
@as_json
def synth(target: Path, as_json: bool, **options: Any) -> None:
    """Write a random checkpoint in Meta's exact original format: true names, true shapes, any rank count.

    \b
    Example:
      llama4-convert synth scout-2-layers --geometry scout --layers 2
    """
    from llama4_convert import synth as run

    with report.ProgressBar("synth", quiet=as_json and not sys.stderr.isatty()) as bar:
        result = run(target, start=bar.start, progress=bar.advance, **options)
    _show(result, as_json, lambda r: report.synth_summary(target, r))


@cli.command()
@click.argument("folder", metavar="[DIR]", type=click.Path(path_type=Path), default="llama4-demo", required=False)
@as_json
def demo(folder: Path, as_json: bool) -> None:
    """The whole way on a small Llama 4 that was really trained: convert, verify, validate, complete a sentence, quantize.

    \b
    Example:
      llama4-convert demo
    """
    from llama4_convert.demo import demo as run

    result = run(folder, say=report.say if as_json else _print, warn=report.warn)
    if as_json:
        _print(json.dumps(result))


def _show(result: dict[str, Any], as_json: bool, summary: Callable[[dict[str, Any]], str]) -> None:
    _print(json.dumps(result) if as_json else summary(result))


def _print(text: str, nl: bool = True) -> None:
    try:
        click.echo(text, nl=nl)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`), which is no failure. Click would call it one.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point: every expected failure is one line on stderr and a documented exit code."""
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        _interrupted()
    except KeyboardInterrupt:
        _interrupted()
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        more = f" ({context.command_path} --help says more)" if context else ""
        _fail(UsageError(error.format_message().rstrip(".") + more))
    except ConvertError as error:
        _fail(error)
    except OSError as error:
        _fail(from_os_error(error, "running"))
    except MemoryError:
        _fail(EnvironmentFailed("out of memory: give less to --max-memory, or close other programs"))


def _fail(error: ConvertError) -> None:
    # Names from a file that nobody vouches for may be in it: no control characters, and not a screenful.
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    with contextlib.suppress(OSError):  # stderr may be gone, or on the disk that is full
        click.echo(click.style("error: ", fg="red") + (text if len(text) < 2000 else text[:2000] + " ..."), err=True)
    sys.exit(error.exit_code)


def _interrupted() -> None:
    click.echo("interrupted: the same command goes on where it stopped", err=True)
    sys.exit(130)


if __name__ == "__main__":
    main()
