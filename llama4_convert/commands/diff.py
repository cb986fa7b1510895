"""The command `diff`, and its result in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama4_convert import formatting
from llama4_convert.commands import terminal
from llama4_convert.commands.options import as_json, max_memory_option
from llama4_convert.errors import CheckFailed

if TYPE_CHECKING:
    from llama4_convert.validation.results import Diff, TensorDifference

_MAX_LISTED = 20


@click.command()
@click.argument("a", metavar="A", type=click.Path(path_type=Path))
@click.argument("b", metavar="B", type=click.Path(path_type=Path))
@max_memory_option("4GiB")
@as_json
def diff(a: Path, b: Path, max_memory: int, as_json: bool) -> None:
    """Tell in which tensors and fields two checkpoints differ. Each may be in either layout, of any rank count, quantized or not.

    Every tensor is held against its counterpart bit by bit; those of two dtypes after rounding; those quantized on one side
    against the error that the scheme can make. What only one has is listed, the rest compared all the same: a text-only
    checkpoint, fewer layers, fewer experts. Where a cause fits, it is proposed. Keys that `convert` drops decide nothing.

    Ends with exit code 5 if anything differs.

    \b
    Examples:
      llama4-convert diff Llama-4-Scout-17B-16E-Instruct/original scout-hf
      llama4-convert diff scout-hf scout-int4
      llama4-convert diff scout-hf scout-fp8 --json
    """
    from llama4_convert.validation.diff import diff as run

    with terminal.ProgressBar("diff", as_json) as bar:
        result = run(a, b, max_memory=max_memory, start=bar.start, progress=bar.advance)
    terminal.warn(*result.warnings)
    terminal.show(result, as_json, lambda r: "\n".join(_lines(r)))
    if not result.equal:
        raise CheckFailed(f"{a} and {b} differ: {_first(result)}")


def _lines(r: Diff) -> Iterator[str]:
    fields, different = r.config_differences, r.different
    yield f"A        {r.a}"
    yield f"B        {r.b}"
    yield f"config   {formatting.differ(len(fields), 'field') if fields else 'no field differs'}"
    width = max((len(d.field) for d in fields[:_MAX_LISTED]), default=0)
    yield from _bounded(f"{d.field:{width}}  {_short(d.a)} in A, {_short(d.b)} in B" for d in fields)
    seen = f", {'B' if r.reference == 'a' else 'A'} as seen from {r.reference.upper()}" if different else ""
    yield f"tensors  {r.tensors_compared} compared, {len(different)} differ{seen}"
    width = max((len(_name(d)) for d in different[:_MAX_LISTED]), default=0)
    yield from _bounded(f"{_name(d):{width}}  {d.cause}" for d in different)
    for rounded in r.rounded:
        yield f"rounded  {rounded.tensors} are {rounded.a} in A and {rounded.b} in B: compared after rounding"
    for scheme, loss in r.quantized.items():
        mean, largest = _number(loss.relative_mse_mean), _number(loss.relative_mse_largest)
        yield f"error    {loss.matrices} matrices in {scheme}: relative squared error {mean} on the mean, {largest} at most"
        yield f"         ({loss.worst})"
    reasons = {entry.name: entry.why for entry in r.dropped}
    for side, keys in (("A", r.only_in_a), ("B", r.only_in_b)):
        names = [name for name in keys if name not in reasons]
        if names:
            yield f"only in {side}: {formatting.counted(len(names), 'tensor')}"
            yield from _bounded(names)
        whys = Counter(reasons[name] for name in keys if name in reasons)
        for why, n in whys.items():
            yield f"dropped  {formatting.counted(n, 'key')} only in {side}, no difference: {why}"
    yield "equal" if r.equal else "different"


def _bounded(lines: Iterable[str]) -> Iterator[str]:
    lines = list(lines)
    yield from (f"         {line}" for line in lines[:_MAX_LISTED])
    if len(lines) > _MAX_LISTED:
        yield f"         and {len(lines) - _MAX_LISTED} more"


def _name(difference: TensorDifference) -> str:
    """With the expert, where many share a tensor."""
    module = difference.module
    return f"{difference.name} ({module})" if module and ".experts." in module else difference.name


def _first(r: Diff) -> str:
    if r.different:
        first = r.different[0]
        return f"{_name(first)}: {first.cause}"
    reasons = {entry.name for entry in r.dropped}
    for side, keys in ((r.a, r.only_in_a), (r.b, r.only_in_b)):
        if names := [name for name in keys if name not in reasons]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"only {side} has {names[0]}{more}"
    field = r.config_differences[0]
    return f"{field.field} is {_short(field.a)} and {_short(field.b)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:60] + " ..."


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}"
