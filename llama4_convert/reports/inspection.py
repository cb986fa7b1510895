"""What `inspect` prints: a checkpoint on one screen."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, structs

from llama4_convert.checkpoints.families import in_words
from llama4_convert.formatting import counted, gigabytes, parameters
from llama4_convert.inspection.results import (
    Inspection,
    ManifestSummary,
    QuantizedGroup,
    Spelling,
    StoredQuantization,
    TensorStatistics,
)

_BARS = "▁▂▃▄▅▆▇█"
_LAYOUTS = {"meta": "Meta's layout", "transformers": "Transformers' layout"}
_WIDTH = 24  # of the bars beside the kinds


def inspect_summary(result: Inspection, tensors: bool) -> str:
    """Lines for people. `tensors`: list every tensor, too."""

    layout = f"{_LAYOUTS[result.layout]}, " + (
        counted(result.ranks, "rank")
        if result.ranks is not UNSET
        else counted(result.files or 0, "file") + " of weights"
    )
    active = result.active_parameters
    met = f", {billions(active)} of them active for a token of text" if active not in (None, result.parameters) else ""
    lines = [
        f"{result.path}: {layout}",
        f"{parameters(result.parameters)}{met}; {len(result.tensors):,} tensors, {gigabytes(result.bytes)}",
        "",
        *(f"  {name:24} {_value(value)}" for name, value in structs.asdict(result.geometry).items()),
        "",
        *_kinds(result),
        "",
        f"  dtypes     {_dtypes(result)}",
    ]
    if result.spelling:
        lines.append(f"  spelling   {_spelling(result.spelling)}")
    if result.quantization:
        lines += [f"  {head:10} {text}" for head, text in _quantization(result.quantization)]
    if result.manifest:
        lines += [f"  {head:10} {text}" for head, text in _manifest(result.manifest)]
    if result.nonfinite is not None:
        named = [
            f"{one.tensor} ({one.nan:,} NaN, {one.inf:,} infinite{', replaced' if one.replaced else ''})"
            for one in result.nonfinite
        ]
        lines.append("  not finite " + ("\n             ".join(named) or "none"))
    if result.dropped:
        lines.append(f"  dropped    {len(result.dropped)} entries that a conversion leaves behind")
    if tensors:
        lines.append("")
        if result.ranks is not UNSET and result.ranks > 1:
            lines.append(f"each tensor as rank 0 of {result.ranks} has it:")
        lines += [f"{t.name}  {t.dtype} {t.shape}" for t in result.tensors]
    if result.stats is not UNSET:
        lines += ["", *stats_lines(result.stats)]
    return "\n".join(lines)


def billions(n: int) -> str:
    """A number of parameters for a column."""
    return parameters(n).removesuffix(" parameters") if n >= 1e6 else f"{n:,}"


def _value(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if type(value) is int else str(value)


def _kinds(result: Inspection) -> list[str]:
    total = max(1, result.bytes)
    lines = [f"  {'':20} {'tensors':>8} {'parameters':>12} {'bytes':>10}"]
    for row in result.by_kind:
        share = row.bytes / total
        numbers = f"{row.tensors:>8,} {billions(row.parameters) if row.parameters else '-':>12}"
        bar = "█" * round(share * _WIDTH) or "▏"
        lines.append(f"  {in_words(row.kind):20} {numbers} {gigabytes(row.bytes):>10} {100 * share:5.1f} %  {bar}")
    return lines


def _dtypes(result: Inspection) -> str:
    return ", ".join(f"{dtype} {gigabytes(one.bytes)}" for dtype, one in result.dtypes.items())


def _spelling(told: Spelling) -> str:
    if told.spelling != "mixed":
        return str(told.spelling)
    kinds = ", ".join(f"{in_words(one.kind)} {one.spelling}" for one in told.kinds)
    return f"mixed: {kinds}"


def _quantization(told: StoredQuantization) -> list[tuple[str, str]]:
    form = f", {told.format}" if told.format else ""
    rows = [("quantized", f"{told.method}{form}; all else is left as it is")]
    for group in told.groups:
        kinds = ", ".join(f"{n:,} {in_words(kind)}" for kind, n in group.kinds.items())
        rows.append(("", f"{described(group)}: {kinds}; {group.bits_per_weight:.3g} bits a weight"))
    return rows


def described(group: QuantizedGroup) -> str:
    """A scheme with what shares a scale, in words."""
    if group.group_size is not UNSET:
        return f"int4 in groups of {group.group_size}"
    if group.granularity is not UNSET:
        return f"{'FP8 e4m3' if group.scheme == 'fp8' else group.scheme}, a scale a {group.granularity}"
    double = " with double quantization" if group.double_quant else ""
    return f"NF4 in blocks of {group.block_size}{double}"


def _manifest(told: ManifestSummary) -> list[tuple[str, str]]:
    layout, options = _LAYOUTS.get(str(told.source.get("layout")), "another layout"), told.options
    ranks = f" of {counted(told.source['ranks'], 'rank')}" if "ranks" in told.source else ""
    variant = f", variant {options['variant']}" if options.get("variant") else ""
    state = f"{told.files} files listed" if told.complete else "UNFINISHED"
    rows = [("made by", f"{told.tool} from {layout}{ranks}{variant}; {state}")]
    if told.recipe:
        rows.append(("recipe", told.recipe["name"]))
    if told.errors:
        families = ", ".join(
            f"{in_words(family)} {one.relative_mse:.4g}" for family, one in told.errors.families.items()
        )
        worst = told.errors.worst[0]
        rows.append(("error", f"relative squared error: {families}; largest {worst.relative_mse:.4g}"))
        rows.append(("", f"in {worst.module}"))
    return rows


def stats_lines(stats: list[TensorStatistics]) -> list[str]:
    """A line a tensor, and the share of its numbers in each power of two, from 2^-24 to 2^7, as bars."""
    columns = ("min", "max", "mean", "std")
    lines = ["".join(f"{name:>11}" for name in columns) + f"{'zeros':>12}  2^-24 to 2^7" + " " * 20 + "  tensor"]
    for one in stats:
        numbers = "".join(
            f"{'-' if value is None else format(value, '.3g'):>11}" for value in (one.min, one.max, one.mean, one.std)
        )
        found = dict(one.histogram)
        largest = max(found.values(), default=1)
        heights = [found.get(exponent, 0) for exponent in range(-24, 8)]
        bars = "".join(" " if not n else _BARS[n * (len(_BARS) - 1) // largest] for n in heights)
        lines.append(f"{numbers}{one.zeros:>12,}  {bars}  {one.tensor}")
    return lines
