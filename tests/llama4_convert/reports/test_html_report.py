"""The parity report is one file that shows what a result holds, leaves out what it lacks, and believes no name."""

from __future__ import annotations

import base64
import copy
import functools
import io
import json
import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llama4_convert.errors import EnvironmentFailed, printable
from llama4_convert.formatting import number
from llama4_convert.reports.html import charts, report
from llama4_convert.reports.html.drawing import WIDTH, power, readable
from llama4_convert.reports.html.report import write_report
from llama4_convert.reports.validation import validate_summary, wrapped
from llama4_convert.validation.results import ModuleErrors, Validation
from quant.typed import InvalidField, decode

COMMAND = "llama4-convert validate scout-hf --reference Llama-4-Scout-17B-16E-Instruct/original --tokens 256"
GATES = {"top1_agreement": 0.9, "kl_mean": 5e-3, "kl_p999": 0.5, "nmse": 1e-2}
INT4_GATES = {"top1_agreement": 0.4, "kl_mean": 0.2, "kl_p999": 3.0, "nmse": 0.3}
TENSOR = "language_model.model.layers.{}.feed_forward.experts.gate_up_proj"


def plausible(
    *,
    layers: int = 48,
    moe: int = 1,
    experts: int = 16,
    tokens: int = 512,
    vision: int | None = 34,
    size: float = 1e-6,
    kind: str = "exact",
    jump: int | None = None,
) -> dict[str, Any]:
    """A result as `validate` would give it: every `moe`-th layer has experts, `size` is the local error, at `jump` it leaps."""
    chance = random.Random(f"{layers} {experts} {kind}")

    def spread(center: float, width: float = 0.4) -> float:
        return center * math.exp(chance.gauss(0, width))

    said: list[dict[str, Any]] = []
    error = size
    for index in range(layers):
        local = 0.08 if index == jump else spread(size)
        error = error * 1.02 + local
        is_moe = index % moe == moe - 1
        said.append(
            {
                "layer": index,
                "nmse_local": local,
                "nmse_propagated": error,
                "router_agreement": max(0.0, 1 - spread(0.4 * error**0.5)) if is_moe else None,
            }
        )
    stages = [] if vision is None else ["embed", *(f"layers.{i}" for i in range(vision)), "adapter", "projector"]
    moe_layers = [layer["layer"] for layer in said if layer["router_agreement"] is not None]
    edges = [10 ** (-12 + i / 4) for i in range(57)]
    counts = [0] * 56
    for _ in range(tokens):
        kl = spread(max(error / 4, 1e-11), 1.6)
        counts[min(max(int((math.log10(kl) + 12) * 4), 0), 55)] += 1
    logits = [chance.gauss(-1, 3.2) for _ in range(2000)]
    popular = [[spread(1, 0.9) for _ in range(experts)] for _ in moe_layers]
    load = [[0] * experts for _ in moe_layers]
    for row, weights in zip(load, popular, strict=True):
        for expert in chance.choices(range(experts), weights, k=tokens):
            row[expert] += 1
    is_lossy = kind != "exact"
    gates = INT4_GATES if is_lossy else GATES
    metrics = {
        "top1_agreement": 1 - min(0.9, error**0.5 / 2),
        "kl_mean": error / 2,
        "kl_median": error / 5,
        "kl_p999": error * 40,
        "nmse": error,
        "max_abs_diff": 9 * error**0.5,
        "cosine": 1 - error / 2,
    }
    failed = [n for n, limit in gates.items() if (metrics[n] < limit if n == "top1_agreement" else metrics[n] > limit)]
    return {
        "passed": not failed,
        "path": "/data/models/scout-hf",
        "reference": "/data/models/Llama-4-Scout-17B-16E-Instruct/original",
        "version": "0.9.0",
        "runner": "llama4",
        "reference_runner": "llama4",
        "dtype": "bfloat16",
        "command": COMMAND,
        "kind": kind,
        "config_differences": [],
        "tensors_compared": 421 + 16 * layers + 3 * experts * len(moe_layers),
        "tensors_quantized": {
            kind: {
                "matrices": 3 * experts * len(moe_layers),
                "relative_mse_mean": 0.0117,
                "relative_mse_largest": 0.0284,
                "worst": "language_model.model.layers.3.feed_forward.experts.93.down_proj.weight",
            }
        }
        if is_lossy
        else {},
        "tensors_different": [],
        "tensors_unexpected": [],
        "weights_not_compared": None,
        "tokens": tokens,
        "near_ties": 3,
        **metrics,
        "perplexity_reference": 12.41,
        "perplexity_reference_error": 0.62,
        "perplexity_candidate": 12.41 * (1 + error),
        "perplexity_candidate_error": 0.63,
        "perplexity_ratio": 1 + error,
        "perplexity_ratio_error": error / 3,
        "gates": gates,
        "gates_failed": failed,
        "layers": said,
        "vision": [
            {"stage": f"vision.{stage}", "nmse_local": spread(size), "nmse_propagated": spread(size * (i + 1), 0.1)}
            for i, stage in enumerate(stages)
        ],
        "forced_routing": {
            name: value * (1 if name in ("top1_agreement", "cosine") else 0.3) for name, value in metrics.items()
        },
        "modules": None,
        "first_divergence": None,
        "candidate_failure": None,
        "pictures": {
            "kl_histogram": {"edges": edges, "counts": counts, "below": 4},
            "logit_sample": [[x, x + chance.gauss(0, 3.2 * error**0.5)] for x in logits],
            "routing_load": {"layers": moe_layers, "tokens": load},
            "quantization_error": {
                "layers": moe_layers,
                "relative_mse": [[spread(0.0115 + 0.00006 * i, 0.06) for _ in range(experts)] for i in moe_layers],
            }
            if is_lossy
            else None,
        },
    }


def failing() -> dict[str, Any]:
    """A wrong layer 17: 61 tensors and three fields differ."""
    result = plausible(jump=17)
    faults = [
        {
            "layer": 17 + i // 20,
            "module": f"feed_forward.experts.{i % 20}.gate",
            "tensor": TENSOR.format(17 + i // 20),
            "cause": "gate and up have changed places"
            if i < 3
            else "1,048,576 of 83,886,080 elements differ, by up to 0.0312",
            "kind": "swapped" if i < 3 else None,
        }
        for i in range(61)
    ]
    names = [
        "attention_norm",
        *(f"attention.{n}" for n in "qkvo"),
        "ffn_norm",
        "feed_forward.router",
        "feed_forward.shared",
    ]
    modules: dict[str, float | None] = {name: 10 ** (-14 + i / 3) for i, name in enumerate(names)}
    modules |= {f"feed_forward.experts.{i}": 0.3 / (i + 1) for i in range(16)}
    modules["feed_forward.experts.15"] = None
    return {
        **result,
        "passed": False,
        "config_differences": [
            {"field": "rope_scaling.factor", "expected": 16.0, "found": 8.0, "matters_from": 8193, "matters": False},
            {"field": "rms_norm_eps", "expected": 1e-5, "found": 1e-6, "matters_from": 1, "matters": True},
            {"field": "pad_token_id", "expected": 200018, "found": None, "matters_from": None, "matters": None},
        ],
        "tensors_different": faults,
        "tensors_unexpected": [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(48)],
        "first_divergence": {name: faults[0][name] for name in ("layer", "module", "tensor", "cause")},
        "modules": {"stage": "layers.17", "errors": modules},
    }


def maverick_int4() -> dict[str, Any]:
    return plausible(moe=2, experts=128, size=2e-4, kind="int4", tokens=1024) | {"path": "/data/models/maverick-int4"}


def bare(**more: Any) -> dict[str, Any]:
    """The least that every version printed."""
    least: dict[str, Any] = {
        "passed": False,
        "path": "x",
        "runner": "llama4",
        "dtype": "float32",
        "tensors_compared": 0,
    }
    lists = ("config_differences", "tensors_different", "gates_failed")
    return {**least, **{name: [] for name in lists}, "tensors_quantized": {}, **more}


def tiny() -> dict[str, Any]:
    """Exact in float32: a few layers, top-2 of four experts, a small vision tower."""
    result = plausible(layers=5, experts=4, vision=2, size=1e-14, tokens=256)
    for layer in result["layers"]:
        layer["router_agreement"] = 1.0
    result["layers"][0] |= {"nmse_local": 0.0, "nmse_propagated": 0.0}
    return result | {"path": "tiny-hf", "dtype": "float32", "forced_routing": None}


def not_running() -> dict[str, Any]:
    result = plausible()
    gone = [name for name in result if name.startswith(("top1", "kl_", "nmse", "max_", "cosine", "perplexity", "near"))]
    return result | {
        **dict.fromkeys([*gone, "modules", "forced_routing"]),
        "passed": False,
        "tokens": 0,
        "gates_failed": sorted(GATES),
        "layers": [],
        "vision": [],
        "pictures": {"quantization_error": None},
        "config_differences": [
            {"field": "intermediate_size_mlp", "expected": 16384, "found": 8192, "matters_from": 1, "matters": True}
        ],
        "candidate_failure": "model.layers.0.feed_forward.shared_expert.up_proj.weight has shape [8192, 5120], the configuration"
        " says [16384, 5120]",
    }


SMALL = {**plausible(layers=3, experts=3, vision=1, kind="int4"), "passed": False}
SMALL |= {key: failing()[key] for key in ("modules", "config_differences", "first_divergence")}
SMALL["pictures"]["logit_sample"] = SMALL["pictures"]["logit_sample"][:20]
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "passes": plausible,
    "fails": failing,
    "int4": maverick_int4,
    "tiny": tiny,
    "text only": lambda: plausible(layers=3, experts=3, vision=None),
    "does not run": not_running,
    "bare": bare,
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
VOID = {"meta", "br", "wbr"}


def saved(result: dict[str, Any]) -> Validation:
    """As `--json` prints it and as it is read back."""
    return decode(json.loads(json.dumps(result)), Validation, "result.json")


def render(result: dict[str, Any]) -> str:
    return page_of(json.dumps(result))


@functools.cache
def page_of(text: str) -> str:
    return report.render(decode(json.loads(text), Validation, "result.json"))


class Page(HTMLParser):
    """Lines of visible text, and every tag closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.lines: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3", "dt", "dd", "tr", "p", "figcaption", "footer", "svg"):
            self.lines.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        if "body" in self.open:
            self.lines[-1:] = [(self.lines or [""])[-1] + data]

    @property
    def visible(self) -> list[str]:
        return [" ".join(line.split()) for line in self.lines if line.strip()]

    def count(self, tag: str, style: str) -> int:
        return sum(tag == found and style in (attrs.get("class") or "").split() for found, attrs in self.tags)


def drawings(page: str) -> dict[str, ElementTree.Element]:
    """The charts by their titles."""
    parsed = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]
    return {svg.findtext("title") or "": svg for svg in parsed}


def tips(svg: ElementTree.Element) -> list[str]:
    """What the pointer is shown."""
    return [area.findtext("title") or "" for area in svg.findall("path[@class='hit']")]


def cells(svg: ElementTree.Element, page: str = "light") -> Image.Image:
    """The image of a heat map on a light or a dark page; the scale follows it."""
    data = next(image.get("href") or "" for image in svg.findall(f"image[@class='{page}']"))
    return Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))


def filled(svg: ElementTree.Element) -> list[ElementTree.Element]:
    """Bars."""
    return [path for path in svg.findall("path") if path.get("style") == "fill:var(--a)"]


def dots(svg: ElementTree.Element, color: str) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for path in svg.findall("path")
        if f"stroke:var(--{color})" in (path.get("style") or "")
        for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", path.get("d") or "")
    ]


# --- what every page is ---


@every_case
def test_the_verdict_is_the_first_line_and_the_command_the_last(case: Callable[[], dict[str, Any]]) -> None:
    result = case()
    lines = Page(render(result)).visible
    assert lines[0].startswith("Passed: " if result["passed"] else "Failed: ")
    assert lines[-1] == (f"Repeat it with {COMMAND}" if "command" in result else "The command was not recorded.")


def test_the_verdict_says_what_is_wrong() -> None:
    assert Page(render(failing())).visible[0] == (
        f"Failed: /data/models/scout-hf: {TENSOR.format(17)}: gate and up have changed places"
    )
    assert Page(render(maverick_int4())).visible[0] == (
        "Passed: /data/models/maverick-int4 differs from its reference by no more than int4 may"
    )
    beyond = bare(gates=GATES, gates_failed=["nmse"])
    assert Page(render(beyond)).visible[0] == "Failed: x: logits differ: nmse"
    unheld = {**plausible(), "weights_not_compared": "merged on the fly"}
    assert "not compared" in Page(render(unheld)).visible[0]


@every_case
def test_nothing_comes_from_anywhere_else(case: Callable[[], dict[str, Any]]) -> None:
    page = render(case())
    outside = re.sub(r'<image class="(light|dark)" href="data:image/png;base64,[\w+/=]*"', "", page)
    assert not re.search(r"https?://|\bsrc\s*=|href|url\(|@import", outside)
    assert not {tag for tag, _ in Page(page).tags} & {"script", "link", "img", "iframe", "object", "use", "base"}
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert " id=" not in page


@every_case
def test_every_chart_is_sound_svg_with_a_name_inside_its_frame(case: Callable[[], dict[str, Any]]) -> None:
    page = render(case())
    assert page.count("<svg") == len(drawings(page))  # no two of one name
    for name, svg in drawings(page).items():
        assert name
        assert svg.get("role") == "img"
        width, height = map(float, (svg.get("viewBox") or "").split()[2:])
        assert width == WIDTH
        for text in svg.iter("text"):
            x, y = float(text.get("x") or ""), float(text.get("y") or "")
            content = 7 * len("".join(text.itertext()).strip())  # of the screen's type, at least
            style = text.get("style") or ""
            start = x - content if "anchor:end" in style else x - content / 2 if "anchor:middle" in style else x
            assert start >= -2, ElementTree.tostring(text)
            assert start + content <= width + 8, ElementTree.tostring(text)
            assert 0 < y <= height
    assert not re.search(
        r"\b(nan|inf|None|undefined)\b", re.sub(r'href="[^"]*"', "", "".join(re.findall("<svg.*?</svg>", page)))
    )


@every_case
def test_under_every_picture_stands_what_to_look_for(case: Callable[[], dict[str, Any]]) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", render(case()))
    assert len(captions) == render(case()).count("<figure>")
    assert all(len(caption) > 30 and caption.endswith(".") for caption in captions)


@every_case
def test_a_saved_json_makes_the_same_page(case: Callable[[], dict[str, Any]]) -> None:
    assert render(case()) == report.render(msgspec.convert(case(), Validation))


def test_a_page_of_maverick_is_small() -> None:
    assert len(render(maverick_int4()).encode()) < 300_000


# --- what is drawn ---


def test_maverick_has_a_cell_for_every_expert_that_has_a_value() -> None:
    result = maverick_int4()
    svgs = drawings(render(result))
    errors, load = (svgs[name] for name in ("Quantization error of each expert", "Tokens sent to each expert"))
    assert all(cells(svg, page).size == (128, 24) for svg in (errors, load) for page in ("light", "dark"))
    assert cells(errors).getchannel("A").getextrema() == (255, 255)
    shown = [alpha > 0 for alpha in cells(load).getchannel("A").tobytes()]
    assert shown == [tokens > 0 for row in result["pictures"]["routing_load"]["tokens"] for tokens in row]
    assert not all(shown)


def test_a_dot_for_every_logit_and_layer_and_a_bar_for_every_bin() -> None:
    result = plausible()
    page = render(result)
    svgs = drawings(page)
    for name in ("Candidate against reference", "Difference of the logits"):
        assert len(dots(svgs[name], "a")) == 2000
    for name, n in (("Error after each layer", 48), ("Error after each stage of the vision tower", 37)):
        assert [len(dots(svgs[name], color)) for color in "ab"] == [n, n]
    assert len(dots(svgs["Router agreement"], "a")) == 48
    divergence = svgs["Divergence of each position"]
    bins = sum(n > 0 for n in result["pictures"]["kl_histogram"]["counts"]) + 1
    assert len(filled(divergence)) == len(tips(divergence)) == bins
    assert len(limit_lines(divergence)) == 2


def limit_lines(svg: ElementTree.Element) -> list[float]:
    """Where dotted lines stand, from left to right."""
    lines = [path.get("d") or "" for path in svg.findall("path") if "stroke-dasharray" in (path.get("style") or "")]
    return sorted(float(re.findall(r"M([\d.]+)", line)[0]) for line in lines)


def test_the_first_layer_to_stray_is_marked_and_its_modules_are_shown() -> None:
    svgs = drawings(render(failing()))
    assert "layer 17 strays first" in [
        (text.text or "").strip() for text in svgs["Error after each layer"].iter("text")
    ]
    vision = svgs["Error after each stage of the vision tower"]
    assert not any("strays" in (text.text or "") for text in vision.iter("text"))
    texts = [text.text for text in svgs["Modules of layer 17"].iter("text")]
    assert {"attention.q", "feed_forward.experts.0", "0.3", "not a number"} <= set(texts)
    result = plausible()
    result["first_divergence"] = {"layer": 3, "module": "vision.attention.q", "tensor": "v", "cause": "c"}
    assert "strays first" not in render(result)


def test_limits_divide_the_histogram_where_they_should() -> None:
    edges = [10.0**n for n in range(-9, 1)]
    svg = ElementTree.fromstring(charts.histogram("t", edges, [1] * 9, 0, {"a": 1e-4, "b": 1e-2}))
    bars = sorted(float(re.findall(r"M([\d.]+)", bar.get("d") or "")[0]) for bar in filled(svg))
    assert limit_lines(svg) == pytest.approx([bars[5], bars[7]], abs=0.1)


def test_a_log_axis_has_places_for_zero_and_for_what_is_no_number() -> None:
    svg = charts.error_chart("t", list("abcde"), {"local": [1e-9, 0.0, None, 1e-7, 1e-8]}, "x")
    drawn = ElementTree.fromstring(svg)
    heights = [y for _, y in dots(drawn, "a")]
    assert heights[1] > heights[0] > heights[2]
    assert [text.text for text in drawn.iter("text")].count("\N{MULTIPLICATION SIGN}") == 1
    assert "0" in [text.text for text in drawn.iter("text")]
    assert tips(drawn) == [
        "x a: local 1e-9",
        "x b: local 0",
        "x c: local not a number",
        "x d: local 1e-7",
        "x e: local 1e-8",
    ]
    style = re.compile(r"stroke:var\(--a\).*stroke-linecap:square")
    lines = (path.get("d") or "" for path in drawn.findall("path") if style.search(path.get("style") or ""))
    assert [line.count("M") for line in lines] == [
        2,
        1,
    ]  # the second is the legend's; the first does not go on through the gap


def test_what_is_the_same_everywhere_is_said_in_words() -> None:
    result = tiny()
    for layer in [*result["layers"], *result["vision"]]:
        layer |= {"nmse_local": 0.0, "nmse_propagated": 0.0}
    result["pictures"]["logit_sample"] = [[x, x] for x, _ in result["pictures"]["logit_sample"]]
    result["pictures"]["kl_histogram"] |= {"counts": [0] * 56, "below": 256}
    page = render(result)
    assert set(drawings(page)) == {"Candidate against reference", "Tokens sent to each expert"}
    text = " ".join(Page(page).visible)
    assert "All 256 positions diverge by less than 1e-12 nats." in text
    assert "Nothing differs, to the last bit, after any of the 5 stages." in text
    assert "The routers of all 5 MoE layers choose the same experts for every token." in text


def test_sections_with_nothing_to_show_are_absent() -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", render(not_running()))
    assert headings == ["What is wrong"]
    assert re.findall(r"<h2>(.*?)</h2>", render(bare())) == []
    text_only = render(CASES["text only"]())
    assert "vision" not in " ".join(Page(text_only).visible)
    assert "Quantized matrices" not in text_only


def test_the_three_answers_stand_under_the_verdict_in_a_few_words() -> None:
    def answers(result: dict[str, Any]) -> list[str]:
        lines = Page(render(result)).visible
        return lines[1 : next(i for i, line in enumerate(lines) if line.startswith("candidate"))]

    assert answers(failing())[:5] == [
        "Config failed",
        "3 fields differ",
        "rope_scaling.factor, rms_norm_eps, pad_token_id",
        "Weights failed",
        "4 tensors are wrong, in 61 matrices",
    ]
    passed = answers(maverick_int4())
    assert passed[4] == "9,216 matrices in int4"
    assert passed[7] == "93.4 % agree"
    assert passed[8].startswith("on the likeliest token; KL 0.00874 nats a token; perplexity +1")
    assert answers(plausible() | {"top1_agreement": 0.99999})[7] == "above 99.9 % agree"
    assert answers(plausible() | {"perplexity_reference": 2.5e6})[8].endswith("nats a token")  # of random tokens
    assert "it does not run" in answers(not_running())
    assert "not compared" in answers(plausible() | {"weights_not_compared": "merged on the fly"})


def test_matrices_of_a_tensor_that_are_wrong_in_one_way_are_one_line() -> None:
    lines = Page(render(failing())).visible
    assert f"17 {TENSOR.format(17)}feed_forward.experts 0-2 (gate) gate and up have changed places" in lines
    assert sum(TENSOR.format(17) in line for line in lines) == 3  # the verdict, and a line for each of two causes


def test_many_wrong_tensors_have_a_map_of_layers_and_modules() -> None:
    result = plausible(layers=8)
    result["tensors_different"] = [
        {"layer": layer, "module": module, "tensor": f"{layer}.{module}", "cause": "c"}
        for module in ("feed_forward.experts.3.up", "feed_forward.experts.4.up", "attention.q", "vision.wq")
        for layer in range(0, 8, 2)
    ]
    svg = drawings(render(result))["Where tensors are wrong"]
    assert tips(svg) == [
        "module vision.wq: mean 1, most 1 (layer 6)",
        "module attention.q: mean 1, most 1 (layer 6)",
        "module experts.up: mean 2, most 2 (layer 6)",
    ]
    assert sum(alpha > 0 for alpha in cells(svg).getchannel("A").tobytes()) == 3 * 4
    assert "Where tensors are wrong" not in drawings(render(failing()))  # a table of five lines says it


def test_the_summary_begins_with_the_verdict_and_fits_a_screen() -> None:
    result = failing() | {"vision": [], "forced_routing": None}
    result["config_differences"] *= 30
    result["tensors_different"] += [{**fault, "tensor": f"{i}"} for i, fault in enumerate(result["tensors_different"])]
    lines = wrapped(validate_summary(saved(result)), 80).split("\n")
    assert lines[:2] == ["FAILED   /data/models/scout-hf:", f"         {TENSOR.format(17)}: gate"]
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 40
    assert validate_summary(saved(maverick_int4())).startswith(
        "PASSED   /data/models/maverick-int4 differs from its reference by no more than int4 may\n"
    )


def test_metrics_stand_beside_their_limits() -> None:
    rows = {line.split(" ")[0]: line for line in Page(render(failing())).visible}
    assert rows["kl_mean"].endswith("failed")
    assert "at most 0.005" in rows["kl_mean"]
    assert "at least 0.9" in rows["top1_agreement"]
    assert "\N{PLUS-MINUS SIGN}" in rows["perplexity_ratio"]
    result = plausible()
    result |= {"nmse": None, "cosine": 1 - 1e-9, "gates_failed": ["nmse"]}
    rows = {line.split(" ")[0]: line for line in Page(render(result)).visible}
    assert "not a number" in rows["nmse"]
    assert "1 \N{MINUS SIGN} 1e-9" in rows["cosine"]  # 1 would say that nothing differs


def test_fields_say_from_which_length_they_matter() -> None:
    lines = Page(render(failing())).visible
    assert "rope_scaling.factor 16.0 8.0 from 8,193 tokens on" in lines
    assert "rms_norm_eps 1e-05 1e-06 always" in lines
    assert "pad_token_id 200018 null never" in lines


# --- what nobody vouches for ---


def replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy with `change` done to every value that is no list or dictionary, and to every key that is a name of others'."""
    if isinstance(value, dict):
        return {key: replaced(item, change) for key, item in value.items()}
    return [replaced(item, change) for item in value] if isinstance(value, list) else change(value)


EVIL = "</title></svg><script>alert(1)</script><img src=x onerror=alert(1)>\"' onload='x' {{ 7 * 7 }}"


@pytest.mark.parametrize("case", [failing, maverick_int4, not_running])
def test_no_text_becomes_markup(case: Callable[[], dict[str, Any]]) -> None:
    result = replaced(case(), lambda value: EVIL if isinstance(value, str) else value)
    result["modules"] = {"stage": EVIL, "errors": {EVIL: 1e-3, "b": 0.1}}
    loss = {"matrices": 1, "relative_mse_mean": 0.1, "relative_mse_largest": None, "worst": EVIL}
    result["tensors_quantized"] = {EVIL: loss}
    result["gates_failed"] = []
    result["tensors_unexpected"] = [EVIL]
    page = render(result)
    parsed = Page(page)
    assert not {tag for tag, _ in parsed.tags} & {"script", "img"}
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert drawings(page)
    assert "&lt;script&gt;" in page
    assert "{{ 7 * 7 }}" in " ".join(parsed.visible)


def test_text_that_would_hide_or_turn_around_shows_as_its_escape() -> None:
    assert printable("a\u202eb\nc\x00\udcff") == r"a\u202eb\nc\x00\udcff"
    assert printable("Modelle/größer") == "Modelle/größer"
    names = {"path": "a\u202e/b\udcff", "command": "x\u2028y"}
    page = report.render(
        Validation(**bare() | names | {"modules": ModuleErrors(stage="\udcff", errors={"\0\udcff": 1.0})})
    )
    assert page.encode()
    assert Page(page).visible[-1] == r"Repeat it with x\u2028y"


def test_lists_are_bounded_and_say_what_they_leave_out() -> None:
    result = failing()
    fault = {"layer": 0, "module": "m", "cause": "x" * 9999}
    result["tensors_different"] = [{**fault, "tensor": f"t{i}-"} for i in range(20_000)]
    result["tensors_unexpected"] = [f"u{i}-" for i in range(20_000)]
    long = [0] * 9999
    result["config_differences"] = [{"field": f"f{i}-", "expected": long, "found": 1} for i in range(20_000)]
    result["layers"] *= 1000
    result["modules"]["errors"] = {f"experts.{i}": i / 5000 for i in range(5000)}
    pictures = result["pictures"]
    pictures["logit_sample"] *= 100
    pictures["routing_load"] = {"layers": list(range(2000)), "tokens": [[1, 2] * 300] * 2000}
    page = report.render(msgspec.convert(result, Validation))
    assert len(page) < 1_000_000
    for name in "tuf":
        assert len(set(re.findall(rf"\b{name}\d+-", page))) == 50
    assert page.count("and 19,950 more") == 3
    assert "4,976 more err less." in page
    assert "experts.4999" in page
    assert "Only 128 of 2,000 layers and 256 of 600 experts are drawn." in page
    assert "20,000 tensors are wrong" in page


@pytest.mark.parametrize("key", sorted(plausible()))
def test_a_part_that_is_missing_or_something_else_is_left_out_or_refused_in_one_line(key: str) -> None:
    whole = {name: value for name, value in SMALL.items() if name != key}
    if key != "pictures":
        whole["pictures"] = {}  # drawn once is enough
    for part in ({}, *({key: value} for value in (None, 7, "text", [7, None], {"a": 7}))):
        try:
            result = saved({**whole, **part})
        except InvalidField as error:
            message = str(error)
        else:
            assert Page(report.render(result)).visible
            continue
        assert message.startswith("result.json: ")
        assert key in message
        assert "\n" not in message


def test_every_number_may_be_null() -> None:
    nulls = replaced(
        failing() | {"pictures": {}, "gates": {}}, lambda value: None if isinstance(value, float) else value
    )
    assert drawings(render(nulls)).keys() == {"Modules of layer 17"}


NUMBERS = st.none() | st.integers() | st.floats() | st.sampled_from([0, -1, 5e-324, 1e308, 1e-12, True, "1"])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 32), st.lists(NUMBERS, min_size=1, max_size=5))
def test_any_number_is_drawn_or_refused_wherever_it_stands(seed: int, numbers: list[Any]) -> None:
    chance = random.Random(seed)
    result = copy.deepcopy(SMALL)
    part = chance.choice(["layers", "vision", "modules", "pictures", "gates", "tensors_quantized", "nmse", "kl_mean"])
    result[part] = replaced(
        result[part], lambda value: value if isinstance(value, str) or chance.random() < 0.7 else chance.choice(numbers)
    )
    try:
        read = saved(result)
    except InvalidField:
        return
    page = report.render(read)
    Page(page)
    drawn = re.sub(r'href="[^"]*"', "", page)
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(re.findall(r' (?!class)[a-z]+="([^"]*)"', drawn)))
    drawings(page)


# --- axes and colours ---


def test_powers_of_ten_are_written_for_people() -> None:
    assert [power(n) for n in (-12, -1, 0, 1, 30)] == ["10⁻¹²", "0.1", "1", "10", "10³⁰"]


@given(st.lists(st.floats(1e-300, 1e300), min_size=1), st.integers(2, 8))
def test_a_log_axis_holds_its_values_and_few_ticks(values: list[float], most: int) -> None:
    low, high = charts.decades(values)
    assert low < high
    assert all(low <= math.log10(value) <= high for value in values)
    assert 1 <= len(charts.powers(low, high, most)) <= most + 1


@given(st.lists(st.text("0123456789ab", min_size=1, max_size=6), min_size=1, max_size=200), st.integers(1, 500))
def test_labels_never_touch(labels: list[str], room: int) -> None:
    step, sizes = room / len(labels), [10.0 * len(text) for text in labels]
    chosen = readable(labels, step, sizes)
    assert chosen
    assert all((j - i) * step >= (sizes[i] + sizes[j]) / 2 for i, j in pairwise(chosen))


def test_labels_of_layers_come_in_even_steps() -> None:
    layers = [str(i) for i in range(48)]
    assert [layers[i] for i in readable(layers, 10, [35.0] * 48)] == [str(i) for i in (*range(0, 44, 4), 47)]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.012345, "0.0123"),
        (1.234e-9, "1.23e-9"),
        (12345.6, "12,346"),
        (999.9, "1,000"),
        (2e8, "2e8"),
        (-3.0, "-3"),
    ],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_colours_go_evenly_from_the_page_to_what_stands_out() -> None:
    def luminance(color: Any) -> float:
        channels = [channel / 255 for channel in color]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def ramp(page: str) -> list[float]:
        shown = cells(ElementTree.fromstring(svg), page).convert("RGB")
        return [luminance(shown.getpixel((x, 0))) for x in range(shown.width)]

    svg = charts.heat_map("t", ["0"], [range(64)], x_label="x", y_label="y", unit="u")
    assert ramp("light") == sorted(ramp("light"), reverse=True)
    assert ramp("light")[0] > 10 * ramp("light")[-1]
    assert ramp("dark") == sorted(ramp("dark"))


# --- the file ---


def test_the_file_is_replaced_at_once_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(saved(tiny()), path)
    assert path.read_text(encoding="utf-8") == render(tiny())
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailed) as raised:
        write_report(saved(tiny()), tmp_path / "gone" / "report.html")
    assert "\n" not in str(raised.value)
    assert "report.html" in str(raised.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(EnvironmentFailed):
        write_report(saved(tiny()), tmp_path / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
