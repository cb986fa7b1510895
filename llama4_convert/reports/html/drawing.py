"""What all charts share: matplotlib's style, and its SVG made part of a page that is light or dark, printed or on a phone.

The page sets type and colours: text has no font of its own, colours are the style sheet's variables, and an image of cells is
there twice, for light and for dark pages. No element has an id, so that many charts share a page.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from llama4_convert.errors import printable
from llama4_convert.formatting import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 520  # units of the drawing, which the page scales
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 34, 46  # units around the plot: room for the larger type of the phone
INK, QUIET, GRID, PAGE, COLOR_A, COLOR_B = "#000000", "#5b6570", "#e8ebee", "#ffffff", "#0067a8", "#c2500a"
_VARIABLES = {INK: "--ink", QUIET: "--quiet", GRID: "--grid", PAGE: "--page", COLOR_A: "--a", COLOR_B: "--b"}
_STYLE: dict[Any, Any] = {  # matplotlib's settings
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.grid.axis": "y",
    "axes.grid": True,
    "axes.labelcolor": QUIET,
    "axes.labelpad": 7,
    "axes.linewidth": 0.5,
    "axes.titlecolor": QUIET,
    "axes.titlelocation": "left",
    "axes.titlepad": 16,
    "axes.titlesize": 12,
    "axes.titley": 1,
    "figure.dpi": 72,  # so that a point is a unit
    "font.size": 12,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "image.composite_image": False,
    "path.simplify": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "llama4-convert",
    "text.parse_math": False,  # names of tensors are no formulas
    "xaxis.labellocation": "right",
    "xtick.bottom": False,
    "xtick.major.pad": 7,
    "ytick.left": False,
    "ytick.major.pad": 7,
}
_TIP = "tip "  # begins the matplotlib id of an area that shows a text under the pointer
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass
class Chart:
    """A drawing of one plot: `axes` inside `with`, `svg` after it."""

    axes: Axes
    svg: str = ""

    def label_places(self, labels: Sequence[str]) -> None:
        """The places 0, 1, ... from left to right and below them as many of `labels` as have room.

        A word at the right end stands left of its place.
        """
        width, last = self.axes.bbox.width, len(labels) - 1
        margin = last * 8 / (width - 16) or 1
        self.axes.set_xlim(-margin, last + margin)
        sizes = [10 * len(text) + 8 for text in labels]
        is_word = not labels[last].isdecimal()
        shown = readable(labels, width / (last + 2 * margin), [*sizes[:last], sizes[last] * (2 if is_word else 1)])
        ticks = self.axes.set_xticks(shown, [labels[i] for i in shown])
        ticks[-1].label1.set_horizontalalignment("right" if is_word else "center")

    def dots(self, x: Sequence[float], y: Sequence[float], color: str, width: float, alpha: float = 1) -> None:
        """Strokes of no length with round caps: a fifth of the bytes of circles."""
        xs, ys = ([value for one in values for value in (one, one, math.nan)] for values in (x, y))
        self.axes.plot(xs, ys, color=color, linewidth=width, alpha=alpha, zorder=3, solid_capstyle="round")

    def is_right(self, x: float) -> bool:
        """Is there more room for a text on the left of `x`?"""
        low, high = self.axes.get_xlim()
        return x > low + 0.44 * (high - low)

    def line_with_text(self, x: float, height: float, text: str, color: str, style: str = "-") -> None:
        """A vertical line, `height` times as high as the plot, and `text` beside its head where there is more room."""
        across = self.axes.get_xaxis_transform()
        self.axes.plot([x, x], [0, height], style, color=color, linewidth=1, transform=across)
        side = "right" if self.is_right(x) else "left"
        padded = f"\N{NO-BREAK SPACE}{text}\N{NO-BREAK SPACE}"
        self.axes.text(x, height, padded, va="top", ha=side, transform=across)


def tip(text: str) -> str:
    """The matplotlib id of an artist that is not drawn, but shows `text` while the pointer rests on it."""
    return _TIP + printable(text)


@contextmanager
def drawing(title: str, height: float, *, left: float = LEFT, top: float = TOP) -> Iterator[Chart]:
    """A chart whose plot is `height` units high and has `left` and `top` units beside and above it."""
    logging.getLogger("matplotlib").addHandler(logging.NullHandler())  # it warns where it has no home directory
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    whole = top + height + BOTTOM
    with rc_context(_STYLE), warnings.catch_warnings(action="ignore"):  # of glyphs that its own font lacks
        figure = Figure(figsize=(WIDTH / 72, whole / 72))
        plot = (left / WIDTH, BOTTOM / whole, (WIDTH - left - RIGHT) / WIDTH, height / whole)
        chart = Chart(figure.add_axes(plot, frame_on=False))
        yield chart
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        chart.svg = _for_page(file.getvalue(), title)


def readable(labels: Sequence[str], step: float, sizes: Sequence[float]) -> list[int]:
    """Which labels of `sizes`, `step` apart, to write so that none touches another.

    First the last one, the first, and of the numbers each or every second, fourth, eighth ... Words between them are left out.
    """
    last = len(labels) - 1
    numbers = [i for i, text in enumerate(labels) if text.isdecimal()]
    every = 1
    while every * step < max((sizes[i] for i in numbers), default=0):
        every *= 2
    chosen = [last]
    for i in [0, *numbers[::every]]:
        if all(abs(i - j) * step >= (sizes[i] + sizes[j]) / 2 for j in (chosen[0], chosen[-1])):
            chosen.append(i)
    return sorted(chosen)


def power(exponent: int) -> str:
    """A power of 10 for an axis."""
    if -1 <= exponent <= 1:
        return number(10.0**exponent)
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def _for_page(text: str, title: str) -> str:
    """matplotlib's SVG without what the page sets."""
    root = ElementTree.fromstring(text)
    page = ElementTree.Element("svg", {"viewBox": root.get("viewBox", ""), "role": "img"})
    ElementTree.SubElement(page, "title").text = printable(title)
    _copy(root, page)
    return ElementTree.tostring(page, "unicode")


def _copy(group: ElementTree.Element, target: ElementTree.Element) -> None:
    """Append the paths, texts and images of `group` to `target`."""
    for element in group:
        kind, name = element.tag.rpartition("}")[2], element.get("id", "")
        if kind == "g" and name.startswith(_TIP):
            area = ElementTree.SubElement(target, "path", {"class": "hit", "d": _path(element[0])})
            ElementTree.SubElement(area, "title").text = name.removeprefix(_TIP)
        elif kind == "g":
            _copy(element, target)
        elif kind == "path" and element.get("style") != "fill: none":
            ElementTree.SubElement(target, "path", {"d": _path(element), **_style_of(element)})
        elif kind == "text":
            place = {key: _short(element.get(key, "")) for key in ("x", "y")}
            ElementTree.SubElement(target, "text", {**place, **_style_of(element)}).text = element.text
        elif kind == "image":
            data = re.sub(r"\s", "", element.get("{http://www.w3.org/1999/xlink}href", ""))
            size = {key: element.get(key, "") for key in ("width", "height", "transform")}
            ElementTree.SubElement(target, "image", {"class": name, "href": data, **size})


def _path(element: ElementTree.Element) -> str:
    tenths = re.sub(r"-?\d+\.\d+", lambda found: _short(found[0]), element.get("d", "").strip())
    joined = re.sub(r"\s*([A-Za-z])\s*", r"\1", tenths)
    return re.sub(r"M([^A-Z]*)L\1(?=M|$)", r"M\1h0", joined)  # dots


def _short(coordinate: str) -> str:
    return f"{float(coordinate):.1f}".removesuffix(".0")


def _style_of(element: ElementTree.Element) -> dict[str, str]:
    rules = [rule for rule in element.get("style", "").split("; ") if not rule.startswith("font")]
    text = re.sub(r"#\w{6}", lambda found: f"var({_VARIABLES[found[0]]})", ";".join(rules))
    return {"style": text.replace(": ", ":")} if text else {}
