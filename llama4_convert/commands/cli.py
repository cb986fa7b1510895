"""The command line: every command in one group, and what becomes of their errors."""

from __future__ import annotations

import sys

import click

from llama4_convert.commands import terminal
from llama4_convert.commands.completion import completion
from llama4_convert.commands.diff import diff
from llama4_convert.commands.explain import explain
from llama4_convert.commands.fit import fit
from llama4_convert.commands.hub import card, push
from llama4_convert.commands.reading import inspect, verify
from llama4_convert.commands.trying import demo, generate, synth
from llama4_convert.commands.validate import validate
from llama4_convert.commands.writing import convert, export, plan, recipes
from llama4_convert.errors import ConvertError, EnvironmentFailed, UsageError, from_os_error
from llama4_convert.version import VERSION

OURS = ("llama4", "llama4_convert", "mappings", "quant")
EXIT_CODES = """
\b
Exit codes: 0 done, 1 a bug of ours, 2 usage, 3 bad input, 4 environment
(disk full, no permission, busy), 5 a check failed, 130 interrupted.
"""


class _Commands(click.Group):
    """Lists each command with the whole of its first sentence: click cuts them off in the middle."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, self.commands[name].get_short_help_str(200)) for name in self.list_commands(ctx)]
            )


@click.group(
    cls=_Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(VERSION, prog_name="llama4-convert")
def cli() -> None:
    """Meta's original Llama 4 checkpoints to Transformers directories: planned, streamed in bounded memory, checked."""


for command in (
    plan,
    convert,
    export,
    recipes,
    fit,
    inspect,
    explain,
    verify,
    validate,
    diff,
    generate,
    card,
    push,
    synth,
    demo,
    completion,
):
    cli.add_command(command)


def main() -> None:
    """Entry point: every expected failure is one line on stderr and a documented exit code."""
    terminal.open_streams()
    try:
        code = cli.main(standalone_mode=False)
        terminal.check_output()
        sys.exit(code if isinstance(code, int) else 0)
    except (click.exceptions.Abort, KeyboardInterrupt):
        terminal.say("interrupted: the same command goes on where it stopped")
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        more = f" ({context.command_path} --help says more)" if context else ""
        _fail(UsageError(error.format_message().rstrip(".") + more))
    except ConvertError as error:
        _fail(error)
    except OSError as error:
        _fail(from_os_error(error, "running"))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OURS or not package:
            raise
        advice = "install llama4-convert with its dependencies (pip install .)"
        _fail(EnvironmentFailed(f"the Python package {package} is missing: {advice}"))
    except MemoryError:
        _fail(EnvironmentFailed("out of memory: give less to --max-memory, or close other programs"))


def _fail(error: ConvertError) -> None:
    terminal.message("error", error)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
