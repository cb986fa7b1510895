"""The command `completion`: a script that has the shell ask us what could come next."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from llama4_convert.commands import terminal
from llama4_convert.commands.options import as_json
from llama4_convert.errors import UsageError

PROGRAM = "llama4-convert"
VARIABLE = "_LLAMA4_CONVERT_COMPLETE"  # by which a script tells the program that it is asked for completions
SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", required=False, type=click.Choice(SHELLS))
@as_json
def completion(shell: str | None, as_json: bool) -> None:
    """Print the script that completes commands, options, recipes, GPUs and tensors for SHELL. Default: that of $SHELL.

    \b
    To have it in every new shell:
      bash (4.4 or newer)  in ~/.bashrc: eval "$(llama4-convert completion bash)"
      zsh                  in ~/.zshrc, behind compinit: eval "$(llama4-convert completion zsh)"
      fish                 the output in ~/.config/fish/completions/llama4-convert.fish

    \b
    Examples:
      llama4-convert completion bash
      llama4-convert completion fish > ~/.config/fish/completions/llama4-convert.fish
    """
    name = shell or Path(os.environ.get("SHELL", "")).name
    kind = get_completion_class(name) if name in SHELLS else None
    if kind is None:
        found = f"$SHELL is {name}" if name else "$SHELL is not set"
        raise UsageError(f"{found}: say which one of {', '.join(SHELLS)} is meant")
    made = kind(click.get_current_context().find_root().command, {}, PROGRAM, VARIABLE)
    from llama4_convert.commands.results import Completion

    result = Completion(shell=name, script=made.source_template % made.source_vars())
    terminal.print_out(terminal.json_text(result) if as_json else result.script)
