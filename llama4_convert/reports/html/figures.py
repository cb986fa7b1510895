"""The pictures of a parity report, each with the sentence that says what to look for.

What a result lacks has no picture, and what is the same everywhere is said in words: a chart of zeros shows nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llama4_convert.formatting import number
from llama4_convert.reports.html import charts
from llama4_convert.reports.html.charts import Limit, Series
from llama4_convert.reports.html.untrusted import (
    as_count,
    as_dict,
    as_dicts,
    as_list,
    as_number,
    as_numbers,
    as_share,
    as_size,
    printable,
)

_POINTS, _BINS, _STAGES, _BARS, _ROWS, _COLUMNS = 2000, 200, 400, 24, 128, 256  # drawn at most


@dataclass(frozen=True)
class Figure:
    """`picture` is SVG, or empty where words do; `caption` says what to look for, `remark` a fact of this run."""

    title: str
    picture: str
    caption: str
    remark: str = ""


def sections(result: Mapping[str, Any]) -> list[tuple[str, list[Figure]]]:
    """The figures under their headings. `result` is that of `validate`; any part of it may be missing."""
    pictures = as_dict(result.get("pictures"))
    layers = as_dicts(result.get("layers"))[:_STAGES]
    found: dict[str, list[Figure | None]] = {
        "Logits": [_divergence(result, as_dict(pictures.get("kl_histogram"))), *_logits(pictures.get("logit_sample"))],
        "Layers": [_text_layers(result, layers), _vision_stages(result), _modules(as_dict(result.get("modules")))],
        "Experts": [
            _router(layers),
            _routing_load(as_dict(pictures.get("routing_load"))),
            _quantization_error(as_dict(pictures.get("quantization_error"))),
        ],
    }
    told = {name: [figure for figure in figures if figure is not None] for name, figures in found.items()}
    return [(name, figures) for name, figures in told.items() if figures]


def fault_map(result: Mapping[str, Any]) -> Figure | None:
    """Which modules of which layers hold tensors that differ: the pattern tells a lost rank from a lost file."""
    found: dict[str, dict[int, int]] = {}
    for fault in as_dicts(result.get("tensors_different")):
        layer = as_count(fault.get("layer"))
        if layer is not None and layer < _STAGES:
            module = re.sub(r"(feed_forward\.)?experts\.\d+\b", "experts", printable(fault.get("module"), 60))
            counts = found.setdefault(module, {})
            counts[layer] = counts.get(layer, 0) + 1
    if not found:
        return None
    title, names = "Where tensors are wrong", sorted(found, key=_order)[:_BARS]
    layers = max(len(as_dicts(result.get("layers"))[:_STAGES]), *(max(found[name]) + 1 for name in names))
    cells = [[found[name].get(layer) for layer in range(layers)] for name in names]
    picture = charts.heat_map(
        title,
        names,
        cells,
        x_label="layer",
        y_label="module",
        unit="wrong matrices",
        empty="none",
        left=charts.NAMES,
        palest=6,
    )
    return Figure(
        title,
        picture,
        "A single cell is one bad tensor, a column one layer's file, a row a mistake made with all tensors of a kind.",
    )


def _order(module: str) -> tuple[bool, bool, bool]:
    """As the model computes: the vision tower first, attention before experts."""
    return (not module.startswith("vision"), "attention" not in module, "experts" in module)


def _divergence(result: Mapping[str, Any], data: Mapping[str, Any]) -> Figure | None:
    edges = [edge for edge in as_numbers(data.get("edges"))[: _BINS + 1] if edge is not None]
    counts = [as_count(count) or 0 for count in as_list(data.get("counts"))][: max(len(edges) - 1, 0)]
    below = as_count(data.get("below")) or 0
    is_sound = len(edges) == len(counts) + 1 > 1 and edges[0] > 0 and all(a < b for a, b in pairwise(edges))
    if not is_sound or not (below or any(counts)):
        return None
    title = "Divergence of each position"
    if not any(counts):
        return Figure(title, "", f"All {below:,} positions diverge by less than {number(edges[0])} nats.")
    limits = []
    for name, words in (("kl_mean", "mean"), ("kl_p999", "99.9 %")):
        value, limit = as_number(result.get(name)), as_number(as_dict(result.get("gates")).get(name))
        if limit is not None:
            shown = "not a number" if value is None else number(value)
            limits.append(Limit(limit, f"{words} {shown}, limit {number(limit)}"))
    return Figure(
        title,
        charts.histogram(
            title, edges, counts, below, x_label="KL divergence, nats", y_label="positions", limits=limits
        ),
        "The mean and the tail have to end left of their lines; a second hump on the right is a group of positions that took"
        " another way, most often through another expert.",
    )


def _logits(sample: Any) -> list[Figure]:
    pairs = [as_numbers(pair)[:2] for pair in as_list(sample)[:_POINTS]]
    points = [(x, y) for x, y in (pair for pair in pairs if len(pair) == 2) if x is not None and y is not None]
    if not points:
        return []
    title = "Candidate against reference"
    against = Figure(
        title,
        charts.scatter(title, points, x_label="reference", y_label="candidate", tall=400, diagonal=True),
        "Equal logits lie on the diagonal: a cloud around it is noise, another slope or a bend is a wrong scale or norm.",
        f"{len(points):,} logits are drawn.",
    )
    apart = [(x, y - x) for x, y in points]
    if not any(y for _, y in apart):
        return [against]
    title = "Difference of the logits"
    difference = Figure(
        title,
        charts.scatter(
            title, apart, x_label="reference", y_label="candidate minus reference", tall=170, diagonal=False
        ),
        "Rounding makes a level band around zero; what tilts, bends or stands apart is no rounding.",
    )
    return [difference, against]


def _text_layers(result: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Figure | None:
    stage = as_dict(result.get("modules")).get("stage")
    first = as_dict(result.get("first_divergence"))
    if not stage and not str(first.get("module")).startswith("vision"):  # a layer of the vision tower has a number, too
        stage = f"layers.{first.get('layer')}"
    labels = [_layer(layer) for layer in layers]
    strayed = next((i for i, text in enumerate(labels) if f"layers.{text}" == stage), None)
    return _errors(
        "Error after each layer",
        labels,
        layers,
        strayed,
        "layer",
        "A jump of the local error names the layer that computes something else; the propagated one carries all earlier errors"
        " along and only grows.",
    )


def _vision_stages(result: Mapping[str, Any]) -> Figure | None:
    stages = as_dicts(result.get("vision"))[:_STAGES]
    names = [str(stage.get("stage")) for stage in stages]
    strayed = as_dict(result.get("modules")).get("stage")
    return _errors(
        "Error after each stage of the vision tower",
        [printable(name.removeprefix("vision.").removeprefix("layers."), 20) for name in names],
        stages,
        names.index(strayed) if strayed in names else None,
        "vision layer",
        "A jump of the local error names the stage, as in the text; what the projector propagates is what the text model starts"
        " from.",
    )


def _layer(stage: Mapping[str, Any]) -> str:
    return printable(stage.get("layer"), 20)


def _errors(
    title: str,
    labels: Sequence[str],
    stages: Sequence[Mapping[str, Any]],
    strayed: int | None,
    x_label: str,
    caption: str,
) -> Figure | None:
    values = {kind: [as_number(stage.get(f"nmse_{kind}")) for stage in stages] for kind in ("local", "propagated")}
    series = [
        Series(kind, style, errors)
        for (kind, errors), style in zip(values.items(), "ab", strict=True)
        if any(error is not None for error in errors)  # else not measured
    ]
    if not series:
        return None
    if all(error == 0 for one in series for error in one.values):
        return Figure(title, "", f"Nothing differs, to the last bit, after any of the {len(stages):,} stages.")
    mark = None
    if strayed is not None:
        stage = f"{x_label} {labels[strayed]}" if labels[strayed].isdecimal() else labels[strayed]
        mark = (strayed, f"{stage} strays first")
    picture = charts.error_chart(title, labels, series, x_label=x_label, y_label="relative squared error", mark=mark)
    return Figure(title, picture, caption)


def _modules(modules: Mapping[str, Any]) -> Figure | None:
    errors = {str(name): as_number(value) for name, value in as_dict(modules.get("errors")).items()}
    if not errors:
        return None

    def size(name: str) -> float:
        error = errors[name]
        return math.inf if error is None else error

    # In the model's order; of many, those that err most.
    largest = set(sorted(errors, key=size, reverse=True)[:_BARS])
    names = [name for name in errors if name in largest]
    left_out = len(errors) - len(names)
    title = f"Modules of {printable(modules.get('stage'), 40).replace('.', ' ').replace('layers', 'layer')}"
    return Figure(
        title,
        charts.bars(title, names, [errors[name] for name in names], x_label="relative squared error"),
        "The topmost bar that stands out is the module to blame; those below it may only have inherited its error.",
        f"{left_out:,} more err less." if left_out else "",
    )


def _router(layers: Sequence[Mapping[str, Any]]) -> Figure | None:
    shares = [as_share(layer.get("router_agreement")) for layer in layers]
    known = [share for share in shares if share is not None]
    if not known:
        return None
    title = "Router agreement"
    if min(known) == 1:
        return Figure(
            title, "", f"The routers of all {len(known):,} MoE layers choose the same experts for every token."
        )
    return Figure(
        title,
        charts.share_chart(
            title,
            [_layer(layer) for layer in layers],
            shares,
            x_label="layer",
            y_label="tokens sent to the same experts, %",
        ),
        "A slow decline is rounding that tips near ties; a layer far below its neighbours has a wrong router or a wrong input to"
        " it.",
    )


def _routing_load(data: Mapping[str, Any]) -> Figure | None:
    return _heat_map(
        "Tokens sent to each expert",
        data,
        as_list(data.get("tokens")),
        lambda count: as_count(count) or None,
        "tokens",
        "no token",
        "A cell that stands out is a favourite expert; an empty one got no token, so its output was not tested by these prompts.",
        palest=2,
    )


def _quantization_error(data: Mapping[str, Any]) -> Figure | None:
    return _heat_map(
        "Quantization error of each expert",
        data,
        as_list(data.get("relative_mse")),
        as_size,
        "squared error / squared weights",
        "not quantized",
        "Neighbours should look alike: a cell that stands out is an expert that the scheme serves badly, a row is a layer that"
        " wants more bits.",
    )


def _heat_map(
    title: str,
    data: Mapping[str, Any],
    rows: Sequence[Any],
    cell: Callable[[Any], float | None],
    unit: str,
    empty: str,
    caption: str,
    palest: int = 0,
) -> Figure | None:
    layers = [printable(layer, 20) for layer in as_list(data.get("layers"))[: len(rows)]]
    drawn = [[cell(value) for value in as_list(row)[:_COLUMNS]] for row in rows[: len(layers)][:_ROWS]]
    if not any(value is not None for row in drawn for value in row):
        return None
    picture = charts.heat_map(
        title, layers[:_ROWS], drawn, x_label="expert", y_label="layer", unit=unit, empty=empty, palest=palest
    )
    most = max(len(as_list(row)) for row in rows)
    largest, layer, expert = max(
        (value, layer, expert)
        for layer, row in zip(layers, drawn, strict=False)
        for expert, value in enumerate(row)
        if value is not None
    )
    remarks = [f"Largest: {number(largest)}, layer {layer}, expert {expert}."]
    if missing := sum(value is None for row in drawn for value in row):
        remarks.append(f"{empty.capitalize()}: {missing:,} of {sum(map(len, drawn)):,}.")
    if len(layers) > _ROWS or most > _COLUMNS:
        remarks.append(f"Only {_ROWS} of {len(layers):,} layers and {_COLUMNS} of {most:,} experts are drawn.")
    return Figure(title, picture, caption, " ".join(remarks))
