"""The plots of README and docs, from benchmarks/results.json: `python benchmarks/plots.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OURS, THEIRS, LINE = "#0b62c4", "#9aa3ad", "#444444"


def draw(results: dict[str, Any], folder: Path) -> None:
    """Each plot whose results are there, as an SVG that looks the same whenever it is drawn from the same numbers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "llama4-convert", "svg.fonttype": "none", "font.size": 10})
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in (("convert", _convert), ("maverick", _maverick), ("peers", _peers)):
        if results.get(name):
            figure = plot(results[name])
            figure.tight_layout()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _axes(count: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _convert(found: dict[str, Any]) -> Any:
    """Wall time against a copy of the source's bytes, case by case."""
    figure, (axis,) = _axes(1, 8, 0.42 * len(found) + 1.1)
    names = list(found)[::-1]
    ratios = [found[name]["ratio"] for name in names]
    middle = [ratio["median"] for ratio in ratios]
    spread = [[r["median"] - r["least"] for r in ratios], [r["most"] - r["median"] for r in ratios]]
    axis.barh(names, middle, xerr=spread, color=OURS, ecolor=LINE, height=0.6)
    axis.axvline(1, color=LINE, linewidth=1, linestyle="--")
    for i, value in enumerate(middle):
        axis.text(0.02, i, f"{value:.2f}", va="center", color="white", fontweight="bold")
    size = next(iter(found.values()))["bytes"] / 1e9
    axis.set_xlabel(f"wall time, cp + sync of the same {size:.1f} GB = 1")
    return figure


def _maverick(found: dict[str, Any]) -> Any:
    """Time and memory by bytes."""
    figure, (time, memory) = _axes(2, 8, 2.8)
    rows = [one for name, one in found.items() if "," not in name]
    sizes = [one["bytes"] / 1e9 for one in rows]
    time.plot(sizes, [one["convert_s"]["median"] for one in rows], "o-", color=OURS, label="convert")
    time.plot(sizes, [one["cp_s"]["median"] for one in rows], "o-", color=THEIRS, label="cp + sync")
    time.set_ylabel("seconds")
    time.legend(frameon=False)
    memory.plot(sizes, [one["own_mib"] for one in rows], "o-", color=OURS)
    memory.set_ylabel("own memory, MiB")
    for axis in (time, memory):
        axis.set_xlabel("GB of Maverick's width")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
    return figure


def _peers(found: dict[str, Any]) -> Any:
    """Every way's wall time and peak memory; time is linear, memory logarithmic."""
    ways = dict(sorted(found["ways"].items(), key=lambda item: item[1]["wall_s"]["median"], reverse=True))
    figure, (time, memory) = _axes(2, 8, 0.36 * len(ways) + 1)
    names = list(ways)
    colors = [OURS if name.startswith("ours") else THEIRS for name in names]
    time.barh(names, [way["wall_s"]["median"] for way in ways.values()], color=colors)
    time.set_xlabel("seconds")
    memory.barh(names, [way["peak_mib"] for way in ways.values()], color=colors)
    memory.set_xscale("log")
    memory.set_yticklabels([])
    memory.set_xlabel("peak memory, MiB (log)")
    return figure


if __name__ == "__main__":
    here = Path(__file__).parent
    draw(json.loads((here / "results.json").read_text()), here.parent / "docs" / "plots")
