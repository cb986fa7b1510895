"""The command `explain`, and how it is told to people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from llama4_convert import formatting
from llama4_convert.commands import terminal
from llama4_convert.commands.options import as_json, request_options
from llama4_convert.errors import ConvertError

_SHOWN = 16  # entries of a list, without --all

if TYPE_CHECKING:
    from llama4_convert.conversion.explanation import (
        CopiedPiece,
        Destination,
        Explanation,
        LogicalBox,
        Origin,
        PieceTarget,
        Place,
        Row,
        TensorLine,
    )


def _tensor_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """For the shell: the keys that PATH holds. What would be made of it takes a plan, which is too slow for a keypress."""
    from llama4_convert.checkpoints.layouts import is_meta
    from llama4_convert.checkpoints.meta import rank_files
    from llama4_convert.checkpoints.pth import PthIndex
    from llama4_convert.checkpoints.transformers import TransformersCheckpoint

    path = Path(ctx.params.get("path") or "")
    try:
        tensors = (
            PthIndex.read(rank_files(path)[0]).tensors if is_meta(path) else TransformersCheckpoint.open(path).tensors
        )
    except (ConvertError, OSError):
        return []
    return [CompletionItem(name) for name in tensors if name.startswith(incomplete)]


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("tensor", shell_complete=_tensor_names)
@request_options
@click.option(
    "--ranks",
    type=click.IntRange(1, 128),
    help="Explain what `export` with so many rank files would write. Default of a Transformers directory: as export's.",
)
@click.option("--all", "everything", is_flag=True, help="List every match, piece and destination, however many.")
@as_json
def explain(path: Path, tensor: str, everything: bool, as_json: bool, **options: Any) -> None:
    """Tell which bytes of which files make TENSOR, and how; or where TENSOR goes, or why it is dropped.

    Of Meta's directory the outputs are what `convert` would write, with --ranks what `export` would; of a Transformers directory
    what `export` would write, with --recipe what `convert` would. Reads no tensor data.

    TENSOR is a key of either layout, a name of the reference (layers.3.attention.q, layers.3.feed_forward.experts.5.gate), a
    module, or a pattern (quoted: '*layers.3.*router*'). Ranges count bytes of the file, the end not included.

    \b
    Examples:
      llama4-convert explain Llama-4-Scout-17B-16E-Instruct/original layers.3.attention.q
      llama4-convert explain Llama-4-Scout-17B-16E-Instruct/original '*layers.3.*router*'
      llama4-convert explain Llama-4-Scout-17B-16E-Instruct/original layers.0.feed_forward.experts.5.gate --recipe int4
      llama4-convert explain scout-hf layers.0.attention.wqkv.weight --ranks 8
    """
    from llama4_convert.conversion.explain import explain as run

    result = run(path, tensor, **options)
    terminal.warn(*result.warnings)
    terminal.show(result, as_json, lambda r: "\n".join(_lines(r, 1 << 62 if everything else _SHOWN)))


def _lines(r: Explanation, most: int) -> Iterator[str]:
    if r.matches:
        yield f"{r.tensor}: {len(r.matches)} tensors; name one of them to have it explained"
        width = max(len(m.tensor) for m in r.matches[:most])
        yield from _bounded((f"  {m.role:6}  {m.tensor:{width}}  {_listed(m)}" for m in r.matches), most, 2)
        return
    what = f"{r.role} of `{r.command}`" if r.command else "in a quantized directory, of which nothing is made"
    yield f"{r.tensor}: {what}"
    if r.file:
        yield f"file     {_place(r)}"
        yield from _bounded((f"         {_place(rank)}" for rank in r.other_ranks or ()), most, 9)
    if r.part:
        yield f"part     {_box(r.part)}"
    if r.dropped:
        yield f"dropped  {r.dropped}"
    if r.row:
        yield from _row(r.row)
    if r.role == "output":
        yield f"op       {'; '.join(r.op or ())}"
        yield (
            f"made of  {formatting.counted(len(r.made_of), 'piece')}" if r.made_of else "made of  nothing of the source"
        )
        yield from _bounded(map(_piece, r.made_of or ()), most, 2)
    elif r.goes_to:
        if r.replicated:
            yield "read     from the first rank: all have the same, which is checked"
        yield f"goes to  {formatting.counted(len(r.goes_to), 'tensor')}"
        yield from _bounded(map(_destination, r.goes_to), most, 2)
    if r.came_from:
        yield from _origin(r.came_from)


def _bounded(lines: Iterable[str], most: int, indent: int) -> Iterator[str]:
    lines = list(lines)
    yield from lines[:most]
    if len(lines) > most:
        yield f"{' ' * indent}... and {len(lines) - most} more (--all lists them)"


def _place(place: Place | TensorLine | Destination | Explanation) -> str:
    if not isinstance(place.bytes, list):
        return f"{place.file}, no tensor"
    start, end = place.bytes
    return f"{place.file}  bytes {start}:{end}  {place.dtype} {place.shape}, {formatting.gigabytes(end - start)}"


def _listed(match: TensorLine) -> str:
    return f"dropped: {match.dropped}" if match.dropped else _place(match)


def _box(box: LogicalBox) -> str:
    return f"{box.tensor}  " + ", ".join(f"{axis} {a}:{b}" for axis, (a, b) in box.box.items())


def _row(row: Row) -> Iterator[str]:
    axes = ", ".join(f"{name}: {axes}" for name, axes in row.tensors.items())
    shared = f"; {' and '.join(row.sharded)} shared by the ranks" if row.sharded else "; whole on every rank"
    yield f"row      {axes}{shared} ({row.table})"
    for key, pattern in [*row.meta.items(), *row.transformers.items()]:
        yield f'         {key} = "{pattern}"'


def _piece(piece: CopiedPiece) -> str:
    into = piece.into
    target = into.file if into.file else f"the matrix {into.whole_shape}"
    return (
        f"  {piece.file}  bytes {_range(piece)}  {piece.tensor}\n"
        f"    {_box(piece.source_box)}; {piece.op}\n"
        f"    {piece.dtype} {piece.shape}, strides {piece.strides},"
        f" to {target} bytes {_range(into)}, strides {into.strides}"
    )


def _range(end: CopiedPiece | PieceTarget) -> str:
    return f"{end.bytes[0]}:{end.bytes[1]}"


def _destination(to: Destination) -> str:
    # Of each logical tensor once, however many ranks it comes from.
    boxes = dict.fromkeys(_box(piece.source_box) for piece in to.pieces)
    first, *others = boxes
    more = f" (and {formatting.counted(len(others), 'more part')})" if others else ""
    return f"  {to.tensor}  {_place(to)}\n    {first}{more}; {'; '.join(to.op)}"


def _origin(origin: Origin) -> Iterator[str]:
    keys = ", ".join(origin.tensors)
    if origin.layout != "meta":
        yield f"came of  {keys} of a Transformers directory, recipe {origin.recipe} ({origin.tool})"
        return
    files = origin.files
    ranks = files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}"
    yield f"came of  {keys} in {ranks} ({origin.tool})"
    yield f"         {'; '.join(origin.op)}"
