"""Commands to try things with: generate, synth, demo."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama4_convert import formatting
from llama4_convert.commands import terminal
from llama4_convert.commands.options import SEED, as_json, file_path
from llama4_convert.errors import printable

if TYPE_CHECKING:
    from llama4_convert.samples.synthetic.synth import Synthesis


@click.command()
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to go on from; <|image|> in it is where the picture goes.")
@click.option("--image", type=file_path, help="A picture to look at.")
@click.option("--chat", is_flag=True, help="Take the prompt as a user's message, and write the answer.")
@click.option("--max-new-tokens", type=click.IntRange(min=0), default=64, show_default=True, help="Where to stop.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: greedy.")
@click.option(
    "--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True, help="Nucleus."
)
@click.option("--seed", type=SEED, help="Repeat a sampled text.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="To compute in. Default: the checkpoint's."
)
@as_json
def generate(path: Path, as_json: bool, **options: Any) -> None:
    """Go on from a prompt with our reference model, from Meta's layout or Transformers'.

    \b
    Example:
      llama4-convert generate scout-hf --prompt "The capital of France is"
    """
    from llama4_convert.reference.generation import generate as run

    say = (lambda text: None) if as_json else functools.partial(terminal.print_text, nl=False)
    result = run(path, say=say, warn=terminal.warn, **options)
    terminal.print_out(terminal.json_text(result) if as_json else "")
    if result.tokens and not result.text:
        terminal.warn(f"the model wrote {len(result.tokens)} tokens, none of which is text (random weights do that)")


@click.command()
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--geometry",
    type=click.Choice(["scout", "maverick", "guard"]),
    default="scout",
    show_default=True,
    help="Whose names and shapes.",
)
@click.option("--layers", type=click.IntRange(min=1), help="Number of layers. Default: as published.")
@click.option("--experts", type=click.IntRange(min=1), help="Number of routed experts. Default: as published.")
@click.option("--vocab", type=click.IntRange(min=1), help="Rows of the vocabulary. Default: as published.")
@click.option("--tiny", is_flag=True, help="A few MB, with a tokenizer.model of its own.")
@click.option("--ranks", type=click.IntRange(min=1), help="Number of rank files. Default: 8; 1 for guard.")
@click.option("--base", is_flag=True, help="Add the router statistics that base models carry.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of every tensor.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Other numbers, the same shapes.")
@click.option("--sparse", is_flag=True, help="All zeros, as holes in the files: full size on no disk, to try plan on.")
@as_json
def synth(target: Path, as_json: bool, **options: Any) -> None:
    """Write a random checkpoint in Meta's exact original format: true names, true shapes, any rank count.

    \b
    Example:
      llama4-convert synth scout-2-layers --geometry scout --layers 2
    """
    from llama4_convert.samples.synthetic.synth import synth as run

    with terminal.ProgressBar("synth", as_json) as bar:
        result = run(target, start=bar.start, progress=bar.advance, **options)
    terminal.show(result, as_json, lambda result: _synth_summary(target, result))


def _synth_summary(target: Path, result: Synthesis) -> str:
    kind = "all zeros" if result.sparse else "random"
    size = f"{formatting.parameters(result.parameters)}, {kind}, {formatting.gigabytes(result.bytes)}"
    return f"{printable(str(target))}: {size} in {len(result.files)} files"


@click.command()
@click.argument("folder", metavar="[DIR]", type=click.Path(path_type=Path), default="llama4-demo", required=False)
@as_json
def demo(folder: Path, as_json: bool) -> None:
    """The whole way on a small Llama 4 that was really trained: convert, verify, validate, complete a sentence, quantize.

    \b
    Example:
      llama4-convert demo
    """
    from llama4_convert.samples.demo import demo as run

    result = run(folder, say=terminal.say if as_json else terminal.print_text, warn=terminal.warn)
    if as_json:
        terminal.print_out(terminal.json_text(result))
