"""Charts as inline SVG: pure functions from numbers to text, with no library, script or reference to anything outside.

Each is drawn `WIDTH` units wide and scaled by the page, which also sets colours and type by class: one drawing serves screen,
phone, print and dark. Margins leave room for the larger type of the phone. No number is drawn for None (NaN in the JSON).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llama4_convert.formatting import number
from llama4_convert.reports.html.chart_axes import (
    BOTTOM,
    CHARACTER,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    decade,
    label,
    readable,
    short,
    svg,
    tooltip,
    x_axis,
    x_labels,
    x_name,
    y_axis,
)
from llama4_convert.reports.html.color_ramp import LEVELS

NAMES = 252  # room on the left for names of modules

Values = Sequence[float | None]


class Series(NamedTuple):
    name: str
    style: str  # class: a, or b, which is dashed and hollow so that the two differ without colour
    values: Values


class Limit(NamedTuple):
    value: float
    text: str


def error_chart(
    title: str,
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    mark: tuple[int, str] | None = None,
) -> str:
    """Errors on a log axis, a point for each label; `mark` sets a line with a text at one of them.

    0 has a place of its own below the smallest decade, None is a cross at the top.
    """
    foot = TOP + 190
    known = [value for one in series for value in one.values if value is not None]
    positive = [value for value in known if value > 0] or [1.0]
    zero = foot if min(known) <= 0 else None
    y = Axis.log(positive, foot - (22 if zero else 0), TOP + 12)
    at = _spread(len(labels))
    parts = [*y_axis(y, y_label), *x_labels(labels, at, foot), x_name(foot, x_label), *_legend(series)]
    if zero:
        parts.append(f'<path class="grid" d="M{LEFT} {foot}H{RIGHT}"/>{label(LEFT - 8, foot + 4, "0", "end")}')
    if mark:
        x, is_right = at[mark[0]], mark[0] > len(labels) / 2
        parts.append(f'<path class="mark" d="M{short(x)} {TOP + 2}V{foot}"/>')
        parts.append(label(x + (-5 if is_right else 5), TOP + 9, mark[1], "marked end" if is_right else "marked"))
    for one in series:
        parts += _line(one, at, lambda value: y.at(value) if value > 0 else foot)
        for x, value in zip(at, one.values, strict=True):
            if value is None:
                cross = f"M{short(x - 3)} {TOP + 1}l6 6m0 -6l-6 6"
                parts.append(f'<path class="nan {one.style}" d="{cross}"/>')
            else:
                parts.append(_dot(one, x, y.at(value) if value > 0 else foot))
    for i, text in enumerate(labels):
        values = [(one.name, one.values[i]) for one in series]
        told = ", ".join(f"{name} {'not a number' if value is None else number(value)}" for name, value in values)
        parts.append(_band(at, i, foot, f"{x_label} {text}: {told}"))
    return svg(title, foot + BOTTOM, parts)


def share_chart(title: str, labels: Sequence[str], shares: Values, *, x_label: str, y_label: str) -> str:
    """Shares from 0 to 1 in per cent, down to the least and at least to 99 %. None is left out, and the line goes on."""
    foot = TOP + 190
    there = [i for i, share in enumerate(shares) if share is not None]
    values = [100 * share for share in shares if share is not None]
    one = Series("", "a", values)
    y = Axis.linear(min(*values, 99.0), 100.0, foot, TOP + 12)
    at = _spread(len(labels))
    parts = [*y_axis(y, y_label), *x_labels(labels, at, foot), x_name(foot, x_label)]
    parts += _line(one, [at[i] for i in there], y.at)
    parts += [_dot(one, at[i], y.at(v)) for i, v in zip(there, values, strict=True)]
    parts += [_band(at, i, foot, f"{x_label} {labels[i]}: {v:.2f} %") for i, v in zip(there, values, strict=True)]
    return svg(title, foot + BOTTOM, parts)


def histogram(
    title: str,
    edges: Sequence[float],
    counts: Sequence[int],
    below: int,
    *,
    x_label: str,
    y_label: str,
    limits: Sequence[Limit] = (),
) -> str:
    """Counts between `edges` (rising, above 0, one more than counts) on a log axis; what is `below` the first stands apart.

    Empty bins at both ends are left out, as far as no limit lies there.
    """
    foot, left, top = TOP + 210, LEFT + 90, TOP + 20 * len(limits)
    used = [i for i, count in enumerate(counts) if count]
    limits = [limit for limit in limits if limit.value > 0]
    ends = [edges[used[0]], edges[used[-1] + 1]] if used else edges[:2]
    x = Axis.log([*ends, *(limit.value for limit in limits)], left, RIGHT)
    y = Axis.linear(0, max([below, *counts]), foot, top)
    parts = [*y_axis(y, y_label), *x_axis(x, foot, 5, x_label)]

    def bar(x0: float, x1: float, count: int, told: str) -> str:
        h = max(foot - y.at(count), 1.5)  # one position of thousands must still show
        box = f'x="{short(x0)}" y="{short(foot - h)}" width="{short(x1 - x0)}" height="{short(h)}"'
        return f'<rect class="bar" {box}/>{_hit(x0, x1, top, foot, f"{told}: {count:,}")}'

    if below:
        exponent = math.log10(edges[0])
        text = decade(round(exponent)) if abs(exponent - round(exponent)) < 1e-9 else number(edges[0])
        parts.append(bar(LEFT + 8, LEFT + 34, below, f"less than {number(edges[0])}"))
        parts.append(label(LEFT + 21, foot + 18, f"&lt;{text}", "middle", is_svg=True))
    for i in used:
        a, b = x.at(edges[i]), x.at(edges[i + 1])
        parts.append(bar(a, b - min(1, (b - a) / 5), counts[i], f"{number(edges[i])} to {number(edges[i + 1])}"))
    # A text stands left of its line, or right of one that is far left. Lines begin beside their texts, and rows are given
    # out so that none crosses another's text.
    placed = sorted(((x.at(limit.value), limit.text) for limit in limits), reverse=True)
    for i, (at, text) in enumerate(placed):
        is_right = at > WIDTH / 2
        row = TOP + 4 + 20 * (i if is_right else len(placed) - 1 - i)
        parts.append(f'<path class="limit" d="M{short(at)} {row - 10}V{foot}"/>')
        parts.append(label(at + (-5 if is_right else 5), row, text, "marked end" if is_right else "marked"))
    return svg(title, foot + BOTTOM, parts)


def scatter(
    title: str, points: Sequence[tuple[float, float]], *, x_label: str, y_label: str, tall: int, diagonal: bool
) -> str:
    """A dot a point on a plot `tall` units high, and the line of equal values if `diagonal`, else that of 0."""
    foot = TOP + tall
    xs, ys = [x for x, _ in points], [y for _, y in points]
    largest = max(map(abs, ys))
    span = (min(xs + ys), max(xs + ys)) if diagonal else (-largest, largest)
    x = Axis.linear(*(span if diagonal else (min(xs), max(xs))), LEFT, RIGHT)
    y = Axis.linear(*span, foot, TOP)
    start, end = (x.low, x.high) if diagonal else (0.0, 0.0)
    parts = [*y_axis(y, y_label), *x_axis(x, foot, 7, x_label)]
    parts.append(f'<path class="mark" d="M{LEFT} {short(y.at(start))}L{RIGHT} {short(y.at(end))}"/>')
    # One path: a stroke of no length with round caps is a dot, in a fifth of a circle's bytes.
    dots = "".join(f"M{short(x.at(p))} {short(y.at(q))}h0" for p, q in points)
    return svg(title, foot + BOTTOM, [*parts, f'<path class="cloud" d="{dots}"/>'])


def heat_map(
    title: str,
    rows: Sequence[str],
    cells: Sequence[Values],
    *,
    x_label: str,
    y_label: str,
    unit: str,
    empty: str,
    left: int = LEFT,
    palest: int = 0,
) -> str:
    """A row of cells a label, coloured by value (0 or more); None leaves a cell empty, which the scale explains as `empty`.

    Names need more room than numbers: `left` of the cells, and each its own line. `palest` is the colour of the smallest value:
    not 0 where it has to stand out against empty cells.

    Colours go by the logarithm where the largest value is more than 30 times the smallest. No cell has an element of its own,
    there being thousands: those of one colour in a row are one path.
    """
    columns = max(map(len, cells))
    known = [value for row in cells for value in row if value is not None]
    low, high = min(known), max(known)
    measure: Callable[[float], float] = math.log if low > 0 and high / 30 > low else float
    span = measure(high) - measure(low)
    tall, wide = min(max(260 / len(rows), 4 if left == LEFT else 18), 22), (RIGHT - left) / columns
    top, foot = 68, 68 + tall * len(rows)
    has_empty = len(known) < len(rows) * columns
    parts = [
        *_scale(number(low), number(high), unit, empty if has_empty else "", palest),
        label(0, 58, y_label, "name"),
    ]
    parts.append(f'<g class="cells" transform="translate({left} {top}) scale({wide:.5g} {tall:.5g})">')
    for r, (name, row) in enumerate(zip(rows, cells, strict=True)):
        numbers = [(value, column) for column, value in enumerate(row) if value is not None]
        if not numbers:
            continue
        levels: dict[int, str] = {}
        for value, column in numbers:
            part = (measure(value) - measure(low)) / span if span else 0.5
            level = palest + round(part * (LEVELS - 1 - palest))
            levels[level] = levels.get(level, "") + f"M{column} {r}h1v1h-1z"
        mean, (most, at) = sum(value for value, _ in numbers) / len(numbers), max(numbers)
        told = f"{y_label} {name}: mean {number(mean)}, most {number(most)} ({x_label} {at})"
        paths = (f'<path class="q{level}" d="{d}"/>' for level, d in sorted(levels.items()))
        parts.append(f"<g>{tooltip(told)}{''.join(paths)}</g>")
    parts.append(f'</g><path class="frame" d="M{left} {top}H{RIGHT}V{short(foot)}H{left}z"/>')
    middle = [top + (i + 0.5) * tall for i in range(len(rows))]
    parts += [label(left - 8, middle[i] + 4, cut(rows[i]), "end") for i in readable(rows, middle, [17] * len(rows))]
    parts += x_labels([str(c) for c in range(columns)], [left + (c + 0.5) * wide for c in range(columns)], foot)
    return svg(title, foot + BOTTOM, [*parts, x_name(foot, x_label)])


def bars(title: str, names: Sequence[str], values: Values, *, x_label: str) -> str:
    """Horizontal bars on a log axis, from above; 0 has none, and None is said in words."""
    left, right, row, top = NAMES, WIDTH - 96, 23, 12
    foot = top + row * len(names)
    known = [value for value in values if value is not None and value > 0] or [1.0]
    x = Axis.log([*known, min(known) / 2], left, right)  # half: else the least, at a power of 10, would have no bar
    parts = [f'<path class="grid" d="M{short(at)} {top}V{foot}"/>' for at, _ in x.ticks(4)]
    parts += x_axis(x, foot, 4, x_label)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        middle, end = top + row * (i + 0.5), left + 0.0
        parts.append(label(left - 8, middle + 5, cut(name), "end"))
        if value is not None and value > 0:
            end = x.at(value)
            box = f'x="{left}" y="{short(middle - 6)}" width="{short(end - left)}" height="12"'
            parts.append(f'<rect class="bar" {box}>{tooltip(f"{name}: {number(value)}")}</rect>')
        parts.append(label(end + 6, middle + 5, "not a number" if value is None else number(value), "value"))
    return svg(title, foot + BOTTOM, parts)


def cut(name: str) -> str:
    """What has room left of `NAMES`."""
    return name if len(name) <= 24 else f"...{name[-21:]}"


def _spread(n: int) -> list[float]:
    """The places of n points from left to right."""
    step = (RIGHT - LEFT - 16) / max(n - 1, 1)
    return [LEFT + 8 + i * step for i in range(n)]


def _line(one: Series, at: Sequence[float], place: Callable[[float], float]) -> list[str]:
    """Through all values that are next to each other."""
    steps, pen = "", "M"
    for x, value in zip(at, one.values, strict=True):
        if value is not None:
            steps += f"{pen}{short(x)} {short(place(value))}"
        pen = "M" if value is None else "L"
    return [f'<path class="line {one.style}" d="{steps}"/>']


def _dot(one: Series, x: float, y: float) -> str:
    return f'<circle class="dot {one.style}" cx="{short(x)}" cy="{short(y)}" r="2.4"/>'


def _band(at: Sequence[float], i: int, foot: float, told: str) -> str:
    """Tells the values at `at[i]` halfway to its neighbours: a dot is too small to be hit."""
    left = (at[i - 1] + at[i]) / 2 if i else at[i] - 8
    right = (at[i] + at[i + 1]) / 2 if i + 1 < len(at) else at[i] + 8
    return _hit(left, right, TOP, foot, told)


def _hit(left: float, right: float, top: float, foot: float, told: str) -> str:
    box = f'x="{short(left)}" y="{short(top)}" width="{short(right - left)}" height="{short(foot - top)}"'
    return f'<rect class="hit" {box}>{tooltip(told)}</rect>'


def _legend(series: Sequence[Series]) -> list[str]:
    """At the top, from the right end."""
    parts, x = [], float(RIGHT)
    for one in reversed(series):
        x -= CHARACTER * len(one.name)
        parts.append(f'<path class="line {one.style}" d="M{short(x - 30)} 12h24"/>')
        parts.append(f'<circle class="key dot {one.style}" cx="{short(x - 18)}" cy="12" r="2.4"/>')
        parts.append(label(x, 16, one.name, "value"))
        x -= 44
    return parts


def _scale(low: str, high: str, unit: str, empty: str, palest: int) -> list[str]:
    """The colours of a heat map with the values at their ends, and what an empty cell means."""
    levels = range(palest, LEVELS) if low != high else [palest + round(0.5 * (LEVELS - 1 - palest))]
    low = low if low != high else ""
    wide, left = 7 if low else 16, CHARACTER * len(low) + 6
    right = left + len(levels) * wide + 6
    boxes = [
        f'<rect class="q{level}" x="{short(left + wide * i)}" y="25" width="{wide}" height="12"/>'
        for i, level in enumerate(levels)
    ]
    parts = [label(0, 16, unit, "name"), '<g class="cells">', *boxes, "</g>"]
    parts += [label(left - 6, 36, low, "end")] if low else []
    parts.append(label(right, 36, high, "value"))
    if empty:
        x = right + CHARACTER * len(high) + 16
        parts.append(f'<path class="frame" d="M{short(x)} 25.5h16v11h-16z"/>{label(x + 22, 36, empty, "value")}')
    return parts
