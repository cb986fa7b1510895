"""The charts of the report, each a function from numbers to inline SVG. No number is drawn for None (NaN in the JSON).

Logarithmic axes are linear ones of exponents, so that bars have a foot and 0 has a place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llama4_convert.formatting import number
from llama4_convert.reports.html.drawing import (
    COLOR_A,
    COLOR_B,
    INK,
    LEFT,
    PAGE,
    QUIET,
    TOP,
    WIDTH,
    drawing,
    power,
    readable,
    tip,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Normalize

NAMES = 252  # units on the left for names of modules

Values = Sequence[float | None]


def error_chart(
    title: str, labels: Sequence[str], series: Mapping[str, Values], x_label: str, mark: tuple[int, str] | None = None
) -> str:
    """Errors on a log axis, a point for each label; `mark` sets a line with a text at one of them.

    0 has a place of its own below the smallest decade, None is a cross at the top. The first series is a solid line with full
    dots, the second a dashed line with hollow dots, so that the two differ without colour.
    """
    known = [value for values in series.values() for value in values if value is not None]
    low, high = decades([value for value in known if value > 0])
    zero = low - 0.12 * (high - low)
    ticks = {**({} if all(known) else {zero: "0"}), **powers(low, high, 5)}
    with drawing(title, 190) as chart:
        axes = chart.axes
        chart.axes.set(xlabel=x_label, title="relative squared error")
        chart.label_places(labels)
        axes.set_ylim(min(ticks), high + 0.06 * (high - low))
        axes.set_yticks(list(ticks), list(ticks.values()))
        if mark:
            chart.line_with_text(mark[0], 1, mark[1], QUIET)
        for (name, values), color in zip(series.items(), (COLOR_A, COLOR_B), strict=False):
            heights = [math.nan if value is None else math.log10(value) if value else zero for value in values]
            style = "-" if color == COLOR_A else (0, (3.3, 2))
            axes.plot(heights, color=color, linestyle=style, linewidth=1.5, label=name)
            chart.dots(range(len(labels)), heights, color, 4.8 if color == COLOR_A else 6.1)
            if color == COLOR_B:
                chart.dots(range(len(labels)), heights, PAGE, 3.5)
            for i in (i for i, value in enumerate(values) if value is None):
                axes.text(
                    i, 1, "\N{MULTIPLICATION SIGN}", color=color, ha="center", transform=axes.get_xaxis_transform()
                )
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.7)
        for i, label in enumerate(labels):
            words = ", ".join(f"{name} {_words(values[i])}" for name, values in series.items())
            axes.axvspan(i - 0.5, i + 0.5, gid=tip(f"{x_label} {label}: {words}"))
    return chart.svg


def share_chart(title: str, labels: Sequence[str], shares: Values) -> str:
    """Shares of tokens, from 0 to 1, by layer, in per cent down to the least and at least to 99 %.

    None is left out, and the line goes on.
    """
    percents = {i: 100 * share for i, share in enumerate(shares) if share is not None}
    places, values = list(percents), list(percents.values())
    low = min(*values, 99.0)
    with drawing(title, 190) as chart:
        chart.axes.set(xlabel="layer", title="tokens sent to the same experts, %")
        chart.label_places(labels)
        chart.axes.set_ylim(low, 100 + 0.06 * (100 - low))
        _round_ticks(chart.axes.yaxis, 5)
        chart.axes.plot(places, values, color=COLOR_A, linewidth=1.5)
        chart.dots(places, values, COLOR_A, 4.8)
        for i, value in percents.items():
            chart.axes.axvspan(i - 0.5, i + 0.5, gid=tip(f"layer {labels[i]}: {value:.2f} %"))
    return chart.svg


def histogram(
    title: str, edges: Sequence[float], counts: Sequence[int], below: int, limits: Mapping[str, float]
) -> str:
    """Counts of positions between `edges` of their divergence, in nats, on a log axis, with `limits`: text and value.

    `edges` rise, are above 0, and one more than `counts`. What is `below` the first stands apart. Empty bins at both ends are
    left out, as far as no limit lies there.
    """
    used = [i for i, count in enumerate(counts) if count]
    ends = [edges[used[0]], edges[used[-1] + 1]] if used else edges[:2]
    marks = sorted(((math.log10(value), text) for text, value in limits.items() if value > 0), reverse=True)
    places = [math.log10(edge) for edge in edges]
    low, high = decades([*ends, *(10**at for at, _ in marks)])
    unit = (high - low) / (WIDTH - 168)  # of the drawing, in decades
    ticks = powers(low, high, 4)
    columns = [(places[i], places[i + 1], counts[i], f"{number(edges[i])} to {number(edges[i + 1])}") for i in used]
    if below:
        ticks[low - 69 * unit] = "<" + (power(round(places[0])) if places[0].is_integer() else number(edges[0]))
        columns.append((low - 82 * unit, low - 56 * unit, below, f"less than {number(edges[0])}"))
    most = max(count for _, _, count, _ in columns)
    height = 210 - 20 * len(marks)
    with drawing(title, height, top=TOP + 20 * len(marks)) as chart:
        chart.axes.set_xlabel("KL divergence, nats")
        chart.axes.set_title("positions", y=1 + 20 * len(marks) / height)
        chart.axes.set_xlim(low - 90 * unit, high)
        chart.axes.set_ylim(0, most)
        chart.axes.set_xticks(list(ticks), list(ticks.values()))
        _round_ticks(chart.axes.yaxis, 5)
        for left, right, count, words in columns:
            shown = max(count, most / 130)  # one position of thousands must still show
            chart.axes.bar(left, shown, right - left - unit, align="edge", color=COLOR_A)
            chart.axes.axvspan(left, right, gid=tip(f"{words}: {count:,}"))
        # Texts stand beside the heads of their lines, in rows given out so that no line crosses the text of another.
        n = sum(chart.is_right(at) for at, _ in marks)
        for row, (at, text) in enumerate([*marks[:n], *reversed(marks[n:])]):
            chart.line_with_text(at, 1 + (20 * (len(marks) - row) + 6) / height, text, INK, ":")
    return chart.svg


def scatter(title: str, points: Sequence[tuple[float, float]], y_label: str, height: int, is_diagonal: bool) -> str:
    """A dot a logit on a plot `height` units high, and the line of equal values if `is_diagonal`, else that of 0."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    largest = max(map(abs, ys))
    span = (min(xs + ys), max(xs + ys)) if is_diagonal else (min(xs), max(xs))
    with drawing(title, height) as chart:
        chart.axes.set(xlabel="reference", title=y_label)
        chart.axes.set_xlim(span)
        chart.axes.set_ylim(span if is_diagonal else (-largest, largest))
        _round_ticks(chart.axes.xaxis, 7)
        _round_ticks(chart.axes.yaxis, 6)
        chart.axes.plot(span, span if is_diagonal else (0, 0), color=QUIET, linewidth=1)
        chart.dots(xs, ys, COLOR_A, 3, 0.55)
    return chart.svg


def heat_map(
    title: str,
    rows: Sequence[str],
    cells: Sequence[Values],
    *,
    x_label: str,
    y_label: str,
    unit: str,
    left: int = LEFT,
    palest: float = 0.12,
) -> str:
    """A row of cells a label, coloured by value (0 or more); None leaves a cell empty.

    Names need more room than numbers: `left` units beside the cells, and a line each. Colours go by the logarithm where the
    largest value is more than 30 times the smallest; `palest`, from 0 to 1, is the colour of the smallest, which has to stand out
    against empty cells.
    """
    from matplotlib.colors import LogNorm, Normalize

    columns = max(map(len, cells))
    known = [value for row in cells for value in row if value is not None]
    low, high = min(known), max(known)
    norm = (LogNorm if 0 < low < high / 30 else Normalize)(low, high) if low < high else Normalize(low - 1, low + 1)
    row_height = min(max(260 / len(rows), 4 if left == LEFT else 18), 22)
    height = row_height * len(rows)
    with drawing(title, height, left=left, top=58) as chart:
        axes = chart.axes
        axes.set(xlabel=x_label, title=y_label, frame_on=True)
        _draw_cells(axes, [[*row, *[None] * (columns - len(row))] for row in cells], palest, norm)
        chart.label_places([str(i) for i in range(columns)])
        axes.set_xlim(-0.5, columns - 0.5)
        shown = readable(rows, row_height, [17] * len(rows)) if left == LEFT else range(len(rows))
        axes.set_yticks(shown, [cut(rows[i]) for i in shown])
        for i, (name, row) in enumerate(zip(rows, cells, strict=True)):
            if values := [(value, column) for column, value in enumerate(row) if value is not None]:
                mean, (largest, at) = sum(value for value, _ in values) / len(values), max(values)
                words = f"{y_label} {name}: mean {number(mean)}, most {number(largest)} ({x_label} {at})"
                axes.axhspan(i - 0.5, i + 0.5, gid=tip(words))
        scale = axes.inset_axes((0.7, 1 + 26 / height, 0.3, 10 / height), frame_on=False)
        _draw_cells(scale, [range(64)], palest)
        scale.set_title(unit, loc="right", pad=5)
        scale.set(yticks=[], xticks=(-0.5, 63.5), xticklabels=(number(low), number(high)))
        least, most = scale.get_xticklabels()
        least.set_horizontalalignment("left")
        most.set_horizontalalignment("right")
    return chart.svg


def bars(title: str, names: Sequence[str], values: Values) -> str:
    """Errors as horizontal bars on a log axis, from above; 0 has none, and None is said in words."""
    known = [value for value in values if value] or [1.0]
    low, high = decades(
        [*known, min(known) / 2 or min(known)]
    )  # half: else the least, at a power of 10, would have no bar
    unit = (high - low) / (WIDTH - NAMES - 96)  # of the drawing, in decades
    ticks = powers(low, high, 3)
    with drawing(title, 23 * len(names), left=NAMES, top=12) as chart:
        axes = chart.axes
        chart.axes.set(xlabel="relative squared error", title="")
        axes.set_xlim(low, high + 82 * unit)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False)
        axes.grid(axis="x")
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_yticks(range(len(names)), [cut(name) for name in names])
        for i, (name, value) in enumerate(zip(names, values, strict=True)):
            words = _words(value)
            end = math.log10(value) if value else low
            axes.barh(i, end - low, 0.52, low, color=COLOR_A)
            axes.text(end + 6 * unit, i, words, va="center_baseline")
            axes.axhspan(i - 0.5, i + 0.5, gid=tip(f"{name}: {words}"))
    return chart.svg


def cut(name: str) -> str:
    """What has room left of `NAMES`."""
    return name if len(name) <= 24 else f"...{name[-21:]}"


def _words(value: float | None) -> str:
    return "not a number" if value is None else number(value)


def decades(values: Sequence[float]) -> tuple[int, int]:
    """The exponents of the powers of 10 around `values`."""
    exponents = [math.log10(value) for value in values] or [0.0]
    low = math.floor(min(exponents))
    return low, max(math.ceil(max(exponents)), low + 1)


def powers(low: int, high: int, most: int) -> dict[float, str]:
    """Places and labels of powers of 10, about `most` of them."""
    return {float(n): power(n) for n in range(low, high + 1, math.ceil((high - low) / most))}


def _round_ticks(axis: Axis, most: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: number(value).replace("-", "\N{MINUS SIGN}"))


def _draw_cells(axes: Axes, values: Sequence[Values], palest: float, norm: Normalize | None = None) -> None:
    """A pixel a cell; None is transparent. On a light page and on a dark one the smallest value is nearest to the page."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    axes.grid(visible=False)
    for page, colors in (("light", "YlGnBu"), ("dark", "YlGnBu_r")):
        ramp = ListedColormap(colormaps[colors](np.linspace(palest, 1, 64)))
        cells = np.array(values, dtype=np.float64)
        axes.imshow(cells, cmap=ramp, norm=norm, aspect="auto", interpolation="none", gid=page)
