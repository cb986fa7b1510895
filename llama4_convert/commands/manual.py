"""The manual, made of the commands themselves: docs/commands.md, and the JSON schema of their results.

    python -m llama4_convert.commands.manual

A command's text is that of its `--help`; the fields of its `--json` are those of its result type, with their docstrings.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec

from llama4_convert.commands.cli import EXIT_CODES, cli
from llama4_convert.commands.fields import Field, fields_of, result_types, schema

PROGRAM = "llama4-convert"
_WIDTH = 130  # characters of a line


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
    result: type[msgspec.Struct]  # what --json prints

    @property
    def summary(self) -> str:
        return self.blocks[0].text.partition(". ")[0].rstrip(".:")


def pages() -> list[Page]:
    """Every command, in the order of `llama4-convert --help`."""
    results = result_types()
    parent = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    return [_page(name, cli.commands[name], parent, results[name]) for name in cli.list_commands(parent)]


def _page(name: str, command: click.Command, parent: click.Context, result: type[msgspec.Struct]) -> Page:
    context = click.Context(command, info_name=name, parent=parent)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    options = [o for o in command.get_params(context) if isinstance(o, click.Option)]
    return Page(name, usage, tuple(_blocks(command.help or "")), tuple(_option(o, context) for o in options), result)


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
    text = option.help or ""
    text += " Required." if option.required else ""
    default = option.default if isinstance(option.default, (str, int, float)) and not option.is_flag else ""
    return Option(names, " ".join(text.split()), str(default))


def _exit_codes() -> str:
    return " ".join(EXIT_CODES.replace("\b", "").split())


_EVERY = (
    "With --json one object is printed on stdout and nothing else; messages go to stderr."
    " A failure that is to be expected is one line there."
)


def markdown() -> str:
    """The text of docs/commands.md."""
    found = pages()
    lines = [
        "# Commands",
        "",
        "<!-- Made by `python -m llama4_convert.commands.manual` of the commands and their result types: edit those. -->",
        "",
        _filled(f"{_EVERY} {_exit_codes()}"),
        "",
        _filled("The schema of every result: [results.schema.json](results.schema.json)."),
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
    yield from ("", "Fields of `--json`:", "", *_markdown_fields(fields_of(page.result), 0, set()))


def _markdown_fields(fields: list[Field], depth: int, shown: set[type]) -> Iterator[str]:
    """A list item a field, and below it those of the objects that it holds; a type that was `shown` is not shown again."""
    for field in fields:
        command = next((name for name, kind in result_types().items() if kind is field.inner), None)
        seen = f"; the fields are those of [`{command}`](#{command})" if command else ""
        if not command and field.inner in shown:
            seen = "; fields as above"
        yield _item(f"`{field.name}`, {field.json_type}", field.doc + seen, depth)
        if field.inner and not seen:
            shown.add(field.inner)
            yield from _markdown_fields(fields_of(field.inner), depth + 1, shown)


def _item(name: str, text: str, depth: int = 0) -> str:
    return textwrap.fill(
        f"{'  ' * depth}- {name}: {_escaped(text)}",
        _WIDTH,
        subsequent_indent="  " * (depth + 1),
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


def main(docs: Path = Path("docs")) -> None:
    (docs / "commands.md").write_text(markdown(), encoding="utf-8")
    (docs / "results.schema.json").write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
