"""The manual, made of the commands themselves: `docs/commands.md`, and pages for `man`.

    python -m llama4_convert.commands.manual docs/commands.md
    python -m llama4_convert.commands.manual ~/.local/share/man/man1

What is said of a command is what its `--help` says, and what `json_fields.toml` says of its `--json`.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import click

from llama4_convert.commands.cli import EXIT_CODES, cli
from llama4_convert.version import VERSION

PROGRAM = "llama4-convert"
_WIDTH = 130


@dataclass(frozen=True)
class Block:
    """A paragraph, or lines to be kept as they are under a title ("Examples")."""

    text: str
    title: str = ""

    @property
    def is_examples(self) -> bool:
        return self.title.startswith("Example")


@dataclass(frozen=True)
class Option:
    names: str  # "--recipe NAME|FILE"
    help: str
    default: str  # empty: none, or the help says it


@dataclass(frozen=True)
class Page:
    """One command. `usage` without the program's name."""

    name: str
    usage: str
    blocks: tuple[Block, ...]
    options: tuple[Option, ...]
    fields: dict[str, str]  # of --json

    @property
    def summary(self) -> str:
        return self.blocks[0].text.partition(". ")[0].rstrip(".:")


def pages() -> list[Page]:
    """Every command, in the order of `llama4-convert --help`."""
    table = tomllib.loads(
        resources.files("llama4_convert.commands").joinpath("json_fields.toml").read_text(encoding="utf-8")
    )
    parent = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    return [_page(name, cli.commands[name], parent, table.get(name, {})) for name in cli.list_commands(parent)]


def _page(name: str, command: click.Command, parent: click.Context, fields: dict[str, str]) -> Page:
    context = click.Context(command, info_name=name, parent=parent)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    options = [o for o in command.get_params(context) if isinstance(o, click.Option)]
    return Page(name, usage, tuple(_blocks(command.help or "")), tuple(_option(o, context) for o in options), fields)


def _blocks(help: str) -> Iterator[Block]:
    """What click makes of a docstring: paragraphs, and after a line of \\b what is kept as it is."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(help)):
        if paragraph.startswith("\b\n"):
            title, _, lines = paragraph.removeprefix("\b\n").partition("\n")
            yield Block(textwrap.dedent(lines), title.rstrip(":"))
        else:
            yield Block(" ".join(paragraph.split()))


def _option(option: click.Option, context: click.Context) -> Option:
    names = ", ".join(option.opts)
    if not option.is_flag and not option.count:
        names += f" {option.make_metavar(context).removesuffix(' RANGE')}"
    told = option.help or ""
    told += " Required." if option.required else ""
    default = option.default if isinstance(option.default, (str, int, float)) and not option.is_flag else ""
    return Option(names, " ".join(told.split()), str(default))


def _exit_codes() -> str:
    return " ".join(EXIT_CODES.replace("\b", "").split())


_EVERY = (
    "With --json one object is printed on stdout and nothing else; messages go to stderr."
    " A failure that is to be expected is one line there."
)


# -------------------- Markdown


def markdown() -> str:
    """The text of docs/commands.md."""
    found = pages()
    lines = [
        "# Commands",
        "",
        "<!-- Made by `python -m llama4_convert.commands.manual docs/commands.md` of what the commands say: edit those. -->",
        "",
        _filled(f"{_EVERY} {_exit_codes()}"),
        "",
        *(_item(f"[`{page.name}`](#{page.name})", page.summary) for page in found),
    ]
    return "\n".join([*lines, *(line for page in found for line in _markdown_page(page))]) + "\n"


def _markdown_page(page: Page) -> Iterator[str]:
    yield from ("", f"## {page.name}", "", "```text", f"{PROGRAM} {page.usage}", "```")
    for block in page.blocks:
        yield ""
        if block.title:
            yield from (f"{block.title}:", "", "```sh" if block.is_examples else "```text", block.text, "```")
        else:
            yield _filled(block.text)
    yield from ("", "Options:", "")
    for option in page.options:
        default = f" Default: `{option.default}`." if option.default else ""
        yield _item(f"`{option.names}`", option.help + default)
    yield from ("", "Fields of `--json`:", "", *(_item(f"`{name}`", told) for name, told in page.fields.items()))


def _item(name: str, told: str) -> str:
    return textwrap.fill(
        f"- {name}: {_escaped(told)}",
        _WIDTH,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _filled(text: str) -> str:
    return textwrap.fill(_escaped(text), _WIDTH, break_long_words=False, break_on_hyphens=False)


def _escaped(text: str) -> str:
    """No markup but backticks."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*<])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


# -------------------- man


def man_pages() -> dict[str, str]:
    """File name -> a page in the macros of man(7): one of the program, and one a command."""
    found = pages()
    made = {f"{PROGRAM}-{page.name}.1": _man_page(page, found) for page in found}
    text = inspect.cleandoc(cli.help or "").partition("\n\n")[0]
    lines = [
        *_man_head(PROGRAM, "Meta's Llama 4 checkpoints to Transformers directories"),
        ".SH SYNOPSIS",
        f".B {_roff(PROGRAM)}",
        r".I COMMAND \fR[OPTIONS] [ARGUMENTS]",
        ".SH DESCRIPTION",
        _roff(" ".join(text.split())),
        ".PP",
        _roff(_EVERY),
        ".SH COMMANDS",
        *(line for page in found for line in _man_item(page.name, page.summary + ".")),
        *_man_tail(found),
    ]
    return {f"{PROGRAM}.1": "\n".join(lines) + "\n", **made}


def _man_head(name: str, summary: str) -> Iterator[str]:
    yield r".\" Made by `python -m llama4_convert.commands.manual`."
    # No date: the same program has the same manual.
    yield f'.TH {_roff(name.upper())} 1 "" "{PROGRAM} {VERSION}"'
    yield from (".nh", ".ad l")  # names are not to be hyphenated
    yield from (".SH NAME", rf"{_roff(name)} \- {_roff(summary)}")


def _man_page(page: Page, every: list[Page]) -> str:
    lines = [
        *_man_head(f"{PROGRAM}-{page.name}", page.summary),
        ".SH SYNOPSIS",
        f".B {_roff(f'{PROGRAM} {page.name}')}",
        _roff(page.usage.removeprefix(page.name).strip()),
        ".SH DESCRIPTION",
    ]
    examples = [block for block in page.blocks if block.is_examples]
    for number, block in enumerate(block for block in page.blocks if not block.is_examples):
        lines += [".PP"] if number else []
        lines += [_roff(f"{block.title}:"), *_man_literal(block.text)] if block.title else [_roff(block.text)]
    lines.append(".SH OPTIONS")
    for option in page.options:
        default = f" Default: {option.default}." if option.default else ""
        lines += _man_item(option.names, option.help + default)
    lines.append(".SH EXAMPLES")
    lines += [line for block in examples for line in _man_literal(block.text)]
    lines += [".SH JSON", *(line for name, told in page.fields.items() for line in _man_item(name, told))]
    return "\n".join([*lines, *_man_tail([other for other in every if other is not page])]) + "\n"


def _man_tail(others: list[Page]) -> Iterator[str]:
    yield from (".SH EXIT STATUS", _roff(_exit_codes()), ".SH SEE ALSO")
    for number, page in enumerate(others, 1):
        yield f".BR {_roff(f'{PROGRAM}-{page.name}')} (1){',' if number < len(others) else ''}"


def _man_item(name: str, told: str) -> Iterator[str]:
    yield from (".TP", rf"\fB{_roff(name)}\fR", _roff(told))


def _man_literal(text: str) -> Iterator[str]:
    yield from (".RS 4", ".nf", *(_roff(line) for line in text.split("\n")), ".fi", ".RE")


def _roff(text: str) -> str:
    """As roff would have it: what is in backticks is bold."""
    text = (
        text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace("^", r"\(ha").replace("~", r"\(ti")
    )
    text = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", text)
    return rf"\&{text}" if text.startswith(".") else text


def main(target: str) -> None:
    """To a Markdown file, or a folder of man pages."""
    path = Path(target)
    if path.suffix == ".md":
        path.write_text(markdown(), encoding="utf-8")
        return
    path.mkdir(parents=True, exist_ok=True)
    for name, text in man_pages().items():
        (path / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
