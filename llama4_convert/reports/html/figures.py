"""The pictures of a parity report, each with the sentence that says what to look for.

What a result lacks has no picture, and what is the same everywhere is said in words: a chart of zeros shows nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import UnsetType

from llama4_convert.errors import printable
from llama4_convert.formatting import number
from llama4_convert.reports.html import charts
from llama4_convert.validation.results import (
    ExpertErrors,
    Histogram,
    LayerErrors,
    ModuleErrors,
    RoutingLoad,
    StageErrors,
    Validation,
)

_MAX_POINTS, _MAX_STAGES, _MAX_BARS, _MAX_ROWS, _MAX_COLUMNS = 2000, 400, 24, 128, 256  # drawn


@dataclass(frozen=True)
class Figure:
    """`picture` is SVG, or empty where words do; `caption` says what to look for, `remark` a fact of this run."""

    title: str
    picture: str
    caption: str
    remark: str = ""


def sections(result: Validation) -> list[tuple[str, list[Figure]]]:
    """The figures under their headings, without those that the result has no numbers for."""
    pictures = result.pictures
    layers = result.layers[:_MAX_STAGES]
    load, errors = pictures.routing_load, pictures.quantization_error
    figures: dict[str, list[Figure | None]] = {
        "Logits": [_divergence(result, pictures.kl_histogram), *_logits(pictures.logit_sample)],
        "Layers": [_text_layers(result, layers), _vision_stages(result), _modules(result.modules)],
        "Experts": [_router(layers), _routing_load(load), _quantization_error(errors)],
    }
    drawn = {name: [figure for figure in some if figure is not None] for name, some in figures.items()}
    return [(name, some) for name, some in drawn.items() if some]


def fault_map(result: Validation) -> Figure | None:
    """Which modules of which layers hold tensors that differ: the pattern tells a lost rank from a lost file."""
    found: dict[str, dict[int, int]] = {}
    for fault in result.tensors_different:
        if fault.layer is not None and fault.layer < _MAX_STAGES:
            module = re.sub(r"(feed_forward\.)?experts\.\d+\b", "experts", printable(fault.module, 60))
            counts = found.setdefault(module, {})
            counts[fault.layer] = counts.get(fault.layer, 0) + 1
    if not found:
        return None
    title, names = "Where tensors are wrong", sorted(found, key=_order)[:_MAX_BARS]
    layers = max(len(result.layers[:_MAX_STAGES]), *(max(found[name]) + 1 for name in names))
    cells = [[found[name].get(layer) for layer in range(layers)] for name in names]
    picture = charts.heat_map(
        title,
        names,
        cells,
        x_label="layer",
        y_label="module",
        unit="wrong matrices",
        left=charts.NAMES,
        palest=0.4,
    )
    return Figure(
        title,
        picture,
        "A single cell is one bad tensor, a column one layer's file, a row a mistake made with all tensors of a kind.",
    )


def _order(module: str) -> tuple[bool, bool, bool]:
    """As the model computes: the vision tower first, attention before experts."""
    return (not module.startswith("vision"), "attention" not in module, "experts" in module)


def _divergence(result: Validation, histogram: Histogram | UnsetType) -> Figure | None:
    if isinstance(histogram, UnsetType) or not (histogram.below or any(histogram.counts)):
        return None
    title = "Divergence of each position"
    if not any(histogram.counts):
        least = number(histogram.edges[0])
        return Figure(title, "", f"All {histogram.below:,} positions diverge by less than {least} nats.")
    limits = {}
    gates = result.gates
    for words, value, limit in (
        ("mean", result.kl_mean, gates.get("kl_mean")),
        ("99.9 %", result.kl_p999, gates.get("kl_p999")),
    ):
        if limit is not None:
            shown = "not a number" if value is None else number(value)
            limits[f"{words} {shown}, limit {number(limit)}"] = limit
    return Figure(
        title,
        charts.histogram(title, histogram.edges, histogram.counts, histogram.below, limits),
        "The mean and the tail have to end left of their lines; a second hump on the right is a group of positions that took"
        " another way, most often through another expert.",
    )


def _logits(sample: Sequence[tuple[float, float]] | UnsetType) -> list[Figure]:
    if isinstance(sample, UnsetType) or not sample:
        return []
    points = sample[:_MAX_POINTS]
    title = "Candidate against reference"
    against = Figure(
        title,
        charts.scatter(title, points, "candidate", 400, is_diagonal=True),
        "Equal logits lie on the diagonal: a cloud around it is noise, another slope or a bend is a wrong scale or norm.",
        f"{len(points):,} logits are drawn.",
    )
    apart = [(x, y - x) for x, y in points]
    if not any(y for _, y in apart):
        return [against]
    title = "Difference of the logits"
    difference = Figure(
        title,
        charts.scatter(title, apart, "candidate minus reference", 170, is_diagonal=False),
        "Rounding makes a level band around zero; what tilts, bends or stands apart is no rounding.",
    )
    return [difference, against]


def _text_layers(result: Validation, layers: Sequence[LayerErrors]) -> Figure | None:
    first = result.first_divergence
    stage = result.modules.stage if result.modules else None
    if not stage and first and not first.module.startswith("vision"):  # a layer of the vision tower has a number, too
        stage = f"layers.{first.layer}"
    labels = [str(layer.layer) for layer in layers]
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


def _vision_stages(result: Validation) -> Figure | None:
    stages = result.vision[:_MAX_STAGES]
    names = [stage.stage for stage in stages]
    strayed = result.modules.stage if result.modules else None
    return _errors(
        "Error after each stage of the vision tower",
        [printable(name.removeprefix("vision.").removeprefix("layers."), 20) for name in names],
        stages,
        names.index(strayed) if strayed in names else None,
        "vision layer",
        "A jump of the local error names the stage, as in the text; what the projector propagates is what the text model starts"
        " from.",
    )


def _errors(
    title: str,
    labels: Sequence[str],
    stages: Sequence[LayerErrors] | Sequence[StageErrors],
    strayed: int | None,
    x_label: str,
    caption: str,
) -> Figure | None:
    measured = {
        "local": [stage.nmse_local for stage in stages],
        "propagated": [stage.nmse_propagated for stage in stages],
    }
    series = {name: errors for name, errors in measured.items() if any(error is not None for error in errors)}
    if not series:
        return None
    if all(error == 0 for errors in series.values() for error in errors):
        return Figure(title, "", f"Nothing differs, to the last bit, after any of the {len(stages):,} stages.")
    mark = None
    if strayed is not None:
        stage = f"{x_label} {labels[strayed]}" if labels[strayed].isdecimal() else labels[strayed]
        mark = (strayed, f"{stage} strays first")
    return Figure(title, charts.error_chart(title, labels, series, x_label, mark), caption)


def _modules(modules: ModuleErrors | None) -> Figure | None:
    if modules is None or not modules.errors:
        return None
    errors = modules.errors

    def size(name: str) -> float:
        error = errors[name]
        return math.inf if error is None else error

    # In the model's order; of many, those that err most.
    largest = set(sorted(errors, key=size, reverse=True)[:_MAX_BARS])
    names = [name for name in errors if name in largest]
    left_out = len(errors) - len(names)
    title = f"Modules of {printable(modules.stage, 40).replace('.', ' ').replace('layers', 'layer')}"
    return Figure(
        title,
        charts.bars(title, [printable(name) for name in names], [errors[name] for name in names]),
        "The topmost bar that stands out is the module to blame; those below it may only have inherited its error.",
        f"{left_out:,} more err less." if left_out else "",
    )


def _router(layers: Sequence[LayerErrors]) -> Figure | None:
    shares = [layer.router_agreement for layer in layers]
    known = [share for share in shares if share is not None]
    if not known:
        return None
    title = "Router agreement"
    if min(known) == 1:
        words = f"The routers of all {len(known):,} MoE layers choose the same experts for every token."
        return Figure(title, "", words)
    return Figure(
        title,
        charts.share_chart(title, [str(layer.layer) for layer in layers], shares),
        "A slow decline is rounding that tips near ties; a layer far below its neighbours has a wrong router or a wrong input to"
        " it.",
    )


def _routing_load(load: RoutingLoad | UnsetType) -> Figure | None:
    if isinstance(load, UnsetType):
        return None
    return _heat_map(
        "Tokens sent to each expert",
        load.layers,
        [[count or None for count in row[:_MAX_COLUMNS]] for row in load.tokens[:_MAX_ROWS]],
        max(map(len, load.tokens), default=0),
        "tokens",
        "no token",
        "A cell that stands out is a favourite expert; an empty one got no token, so its output was not tested by these prompts.",
    )


def _quantization_error(errors: ExpertErrors | None) -> Figure | None:
    if errors is None:
        return None
    return _heat_map(
        "Quantization error of each expert",
        errors.layers,
        [row[:_MAX_COLUMNS] for row in errors.relative_mse[:_MAX_ROWS]],
        max(map(len, errors.relative_mse), default=0),
        "squared error / squared weights",
        "not quantized",
        "Neighbours should look alike: a cell that stands out is an expert that the scheme serves badly, a row is a layer that"
        " wants more bits.",
    )


def _heat_map(
    title: str,
    layers: Sequence[int],
    cells: Sequence[Sequence[float | None]],
    experts: int,
    unit: str,
    empty: str,
    caption: str,
) -> Figure | None:
    values = [
        (value, layer, expert)
        for layer, row in zip(layers, cells, strict=False)
        for expert, value in enumerate(row)
        if value is not None
    ]
    if not values:
        return None
    labels = [str(layer) for layer in layers[:_MAX_ROWS]]
    picture = charts.heat_map(title, labels, cells, x_label="expert", y_label="layer", unit=unit)
    largest, layer, expert = max(values)
    remarks = [f"Largest: {number(largest)}, layer {layer}, expert {expert}."]
    n = sum(map(len, cells))
    if len(values) < n:
        remarks.append(f"Empty cells, {empty}: {n - len(values):,} of {n:,}.")
    if len(layers) > _MAX_ROWS or experts > _MAX_COLUMNS:
        drawn = f"{_MAX_ROWS} of {len(layers):,} layers and {_MAX_COLUMNS} of {experts:,} experts"
        remarks.append(f"Only {drawn} are drawn.")
    return Figure(title, picture, caption, " ".join(remarks))
