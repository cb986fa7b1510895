"""What charts share: the drawing's measures, axes with round ticks, labels that do not touch, text made safe for SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from llama4_convert.formatting import number
from llama4_convert.reports.html.untrusted import printable

WIDTH = 520
LEFT, RIGHT, TOP, BOTTOM = 64, WIDTH - 14, 34, 46  # of the plot; the last is what lies below it
CHARACTER = 10.0  # units, of the phone's type


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` along a stretch of the drawing; on a log axis both are exponents of 10."""

    low: float
    high: float
    first: float
    last: float
    is_log: bool

    @staticmethod
    def log(values: Iterable[float], first: float, last: float) -> Axis:
        """Whole decades around `values`, all above 0."""
        exponents = [math.log10(value) for value in values]
        low, high = math.floor(min(exponents)), math.ceil(max(exponents))
        return Axis(low, max(high, low + 1), first, last, is_log=True)

    @staticmethod
    def linear(low: float, high: float, first: float, last: float) -> Axis:
        if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-200):
            room = abs(low) / 2 or 1.0
            low, high = low - room, high + room
        return Axis(low, high, first, last, is_log=False)

    def at(self, value: float) -> float:
        return self._place(math.log10(value) if self.is_log else value)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Places and labels, as SVG, of at most `most` round values."""
        span = self.high - self.low
        if self.is_log:
            decades = math.ceil(span / (most - 1))
            return [(self._place(n), decade(n)) for n in range(int(self.low), int(self.high) + 1, decades)]
        power = 10.0 ** math.floor(math.log10(span / most))
        step = next(power * k for k in (1, 2, 5, 10, 20) if span / (power * k) <= most)
        steps = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return [(self._place(i * step), _minus(number(i * step))) for i in steps]

    def _place(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)


def y_axis(y: Axis, name: str) -> list[str]:
    lines = [
        f'<path class="grid" d="M{LEFT} {short(at)}H{RIGHT}"/>{label(LEFT - 8, at + 4, text, "end", is_svg=True)}'
        for at, text in y.ticks(6)
    ]
    return [label(0, 16, name, "name"), *lines]


def x_axis(x: Axis, foot: float, most: int, name: str) -> list[str]:
    """Ticks below `foot` and, at the right end, the axis' name."""
    ticks = [
        f'<path class="tick" d="M{short(at)} {short(foot)}v4"/>{label(at, foot + 18, text, "middle", is_svg=True)}'
        for at, text in x.ticks(most)
    ]
    return [*ticks, x_name(foot, name)]


def x_name(foot: float, name: str) -> str:
    return label(RIGHT, foot + 38, name, "name end")


def x_labels(labels: Sequence[str], at: Sequence[float], foot: float) -> list[str]:
    """As many of the labels as fit below `foot`, all within the drawing."""
    size = [CHARACTER * len(text) + 8 for text in labels]
    middle = [min(max(x, width / 2), WIDTH + 8 - width / 2) for x, width in zip(at, size, strict=True)]
    return [label(middle[i], foot + 18, labels[i], "middle") for i in readable(labels, middle, size)]


def readable(labels: Sequence[str], at: Sequence[float], size: Sequence[float]) -> list[int]:
    """Which labels of `size` around `at` to write so that none touches another.

    First those at the ends, then numbers, each or every second, fourth, eighth ..., then words.
    """

    def fits(i: int, others: Iterable[int]) -> bool:
        return all(abs(at[i] - at[j]) >= (size[i] + size[j]) / 2 for j in others)

    last = len(labels) - 1
    chosen = [last, 0] if last and fits(0, [last]) else [last]
    numbers = [i for i, text in enumerate(labels) if text.isdecimal()]
    step = 1
    while not all(fits(i, [j]) for i, j in pairwise(numbers[::step])):
        step *= 2
    for i in [*numbers[::step], *(i for i in range(len(labels)) if i not in numbers)]:
        if i not in chosen and fits(i, chosen):
            chosen.append(i)
    return sorted(chosen)


def decade(exponent: int) -> str:
    """A power of 10 as SVG."""
    if -1 <= exponent <= 1:
        return ("0.1", "1", "10")[exponent + 1]
    return f'10<tspan class="sup" dy="-0.4em">{_minus(str(exponent))}</tspan>'


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def label(x: float, y: float, text: str, style: str, is_svg: bool = False) -> str:
    return f'<text class="{style}" x="{short(x)}" y="{short(y)}">{text if is_svg else escaped(text)}</text>'


def tooltip(text: str) -> str:
    return f"<title>{escaped(text)}</title>"


def escaped(text: str) -> str:
    return escape(printable(text))


def short(value: float) -> str:
    """A coordinate to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")


def svg(title: str, height: float, parts: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {short(height)}" role="img">{tooltip(title)}{"".join(parts)}</svg>'
