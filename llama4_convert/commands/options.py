"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from llama4_convert import formatting
from llama4_convert.errors import UsageError


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return formatting.parse_size(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


def recipe_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """For the shell: the built-in recipes that the command takes, or files where none begins so."""
    from quant.recipe import built_in

    taken = {name: r for name, r in built_in().items() if (r.format == "meta") == (ctx.info_name == "export")}
    found = [CompletionItem(name, help=r.summary) for name, r in taken.items() if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def gpu_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from llama4_convert.fitting.gpus import gpus

    every = {"all": "every one known"} if ctx.info_name == "fit" else {"list": "all names"}
    known = {**every, **{key: gpu.name for key, gpu in gpus().items()}}
    return [CompletionItem(name, help=what) for name, what in known.items() if name.startswith(incomplete.lower())]


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda function: functools.reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there."
)
source_argument = click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
request_options = options(
    click.option(
        "--recipe",
        metavar="NAME|FILE",
        shell_complete=recipe_names,
        help="Quantize on the way: a built-in recipe (`llama4-convert recipes` lists them) or a TOML file.",
    ),
    click.option(
        "--adapter",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Merge a PEFT LoRA adapter on the way, before any quantization. SRC may be in either layout.",
    ),
    click.option(
        "--vision-from",
        type=click.Path(path_type=Path),
        metavar="BASE",
        help="SRC is a text-only fine-tune: take vision tower and processor from BASE, in either layout,"
        " and what config.json has lost.",
    ),
    click.option(
        "--config-from",
        type=click.Path(path_type=Path),
        metavar="BASE",
        help="SRC is a fine-tune in Transformers' layout, text-only or whole: repair what its config.json and"
        " generation_config.json have lost from BASE, in either layout; a directory with a config.json is enough.",
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


def max_memory_option(default: str) -> Callable[[Any], Any]:
    return click.option(
        "--max-memory", type=Size(), default=default, show_default=True, help="Bound on the memory of the process."
    )


gpus_option = click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="How many of them.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what DST holds.")
SEED = click.IntRange(min=-(1 << 63), max=(1 << 63) - 1)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="What both models compute in.",
)
file_path = click.Path(path_type=Path, dir_okay=False, exists=True)
