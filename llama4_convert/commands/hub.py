"""Commands for the Hub: card, push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llama4_convert.commands.options import as_json, file_path, show
from llama4_convert.errors import UsageError

_output = click.argument("path", metavar="DST", type=click.Path(path_type=Path))


@click.command()
@_output
@click.option(
    "--validation", type=file_path, metavar="FILE", help="What `validate DST --json` printed: goes on the card."
)
@click.option(
    "--base-model", metavar="OWNER/NAME", help="What DST was made of, on the Hub, where its sizes do not tell."
)
@click.option("--write", is_flag=True, help="Write README.md and its entry in the manifest, instead of printing.")
@click.option(
    "--adopt", is_flag=True, help="With --write: take a README.md that you have edited into the manifest as it is."
)
@click.option("--overwrite", is_flag=True, help="With --write: replace a README.md that somebody has edited.")
@as_json
def card(
    path: Path,
    validation: Path | None,
    base_model: str | None,
    write: bool,
    adopt: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Print the model card of an output of `convert`, or write it: what it is, from where, by which recipe, what was measured.

    `convert` writes README.md itself. What `validate` measured afterwards goes onto it with --validation and --write, which
    change README.md and the manifest together, so that `verify` holds.

    \b
    Examples:
      llama4-convert card scout-hf
      llama4-convert validate scout-hf --reference original --json > parity.json
      llama4-convert card scout-hf --validation parity.json --write
    """
    from llama4_convert import model_card

    if (adopt or overwrite) and not write:
        raise UsageError("--adopt and --overwrite are for --write")
    if adopt and (overwrite or validation or base_model):
        raise UsageError("--adopt takes README.md as it is: leave the other options out")
    options: dict[str, Any] = {"validation": validation, "base_model": base_model}
    if write:
        result = model_card.write_card(path, adopt=adopt, overwrite=overwrite, **options)
        show(result, as_json, lambda r: f"{path / r['file']}: {r['status']}")
        return
    text = model_card.card(path, **options)
    show({"output": str(path), "card": text}, as_json, lambda r: r["card"].rstrip("\n"))
