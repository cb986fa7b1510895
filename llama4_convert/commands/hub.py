"""Commands for the Hub: card, push."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama4_convert import formatting
from llama4_convert.commands import terminal
from llama4_convert.commands.options import as_json, file_path
from llama4_convert.errors import UsageError

_output = click.argument("path", metavar="DST", type=click.Path(path_type=Path))

if TYPE_CHECKING:
    from llama4_convert.publishing import Push


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
      llama4-convert card scout-int4
      llama4-convert validate scout-int4 --reference Llama-4-Scout-17B-16E-Instruct/original --json > parity.json
      llama4-convert card scout-int4 --validation parity.json --write
    """

    from llama4_convert import publishing

    if (adopt or overwrite) and not write:
        raise UsageError("--adopt and --overwrite are for --write")
    if adopt and (overwrite or validation or base_model):
        raise UsageError("--adopt takes README.md as it is: leave the other options out")
    options: dict[str, Any] = {"validation": validation, "base_model": base_model}
    if write:
        result = publishing.write_card(path, adopt=adopt, overwrite=overwrite, **options)
        terminal.show(result, as_json, lambda r: f"{r.output}/{r.file}: {r.status}")
        return
    made = publishing.card(path, **options)
    terminal.print_out(terminal.json_text(made) if as_json else str(made.card).rstrip("\n"))


@click.command()
@_output
@click.argument("repository", metavar="REPO")
@click.option("--revision", metavar="BRANCH", help="Commit to this branch.  [default: main]")
@click.option("--message", metavar="TEXT", help="Of the commit.")
@click.option("--create", is_flag=True, help="Make the repository, and the branch, if they are not there.")
@click.option("--private", is_flag=True, help="With --create: make it private.")
@click.option("--no-verify", is_flag=True, help="Do not read every byte of DST first.")
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded; no network.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@as_json
def push(path: Path, repository: str, no_verify: bool, dry_run: bool, yes: bool, as_json: bool, **options: Any) -> None:
    """Upload an output to the Hugging Face Hub, REPO being OWNER/NAME, in one commit.

    DST is verified first, then its files (those of the manifest, never another) are sent, then the Hub's ids are compared with
    the manifest. The same command goes on after an interruption. It needs `pip install 'llama4-convert[hub]'`; the token is that
    of `hf auth login` or HF_TOKEN.

    \b
    Examples:
      llama4-convert push scout-int4 me/Llama-4-Scout-int4 --dry-run
      llama4-convert push scout-int4 me/Llama-4-Scout-int4 --create --private
    """

    from llama4_convert import publishing

    planned = publishing.outgoing(path, repository)
    terminal.warn(*planned.warnings)
    if dry_run:
        terminal.show(planned, as_json, _would_push)
        return
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(
                f"nothing was pushed to {repository}: there is no terminal to ask on. Add --yes to push, --dry-run to see what"
            )
        terminal.say(_would_push(planned))
        if not click.confirm("Upload?", err=True):
            raise UsageError("nothing was pushed: you said no")
    with terminal.ProgressBar("verify", as_json) as bar:
        quiet = not sys.stderr.isatty()
        result = publishing.push(
            path, repository, verify=not no_verify, quiet=quiet, start=bar.start, progress=bar.advance, **options
        )
    terminal.warn(*result.warnings[len(planned.warnings) :])
    terminal.show(result, as_json, lambda r: f"{r.url}: {_size(r)}, on the Hub as the manifest says")


def _size(push: Push) -> str:
    return f"{len(push.files)} files, {formatting.gigabytes(push.bytes)}"


def _would_push(push: Push) -> str:
    lines = [f"{formatting.gigabytes(file.size):>12}  {file.file}" for file in push.files]
    return "\n".join([*lines, f"{_size(push)} to {push.repository}"])
