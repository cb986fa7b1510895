"""The parity report: one HTML file made of the result of `validate`, or of its saved JSON.

It needs nothing but itself: no script, font or picture from anywhere. Whatever a result lacks (a run that ended early, an older
version) is left out. Names and paths come from files that nobody vouches for: the template escapes all, and lists are bounded.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from llama4_convert.errors import from_os_error
from llama4_convert.html.chart_axes import number
from llama4_convert.html.color_ramp import ramp
from llama4_convert.html.figures import sections
from llama4_convert.html.untrusted import as_count, as_dict, as_dicts, as_list, as_number, as_share, printable
from llama4_convert.report import differ, validate_verdict
from llama4_convert.writer import write_small

_OPEN, _LISTED = 10, 50  # faults of a kind: shown at once, and shown at all
_METRICS = {
    "top1_agreement": "positions where both find the same token likeliest",
    "kl_mean": "mean KL divergence from the reference, nats",
    "kl_median": "median KL divergence, nats",
    "kl_p999": "KL divergence that one position in 1,000 exceeds, nats",
    "nmse": "squared difference of the logits over the reference's squares",
    "max_abs_diff": "largest difference of a logit",
    "cosine": "cosine between the logits of both",
    "perplexity_reference": "of the prompts' own next tokens, in the reference",
    "perplexity_candidate": "the same in the candidate",
    "perplexity_ratio": "candidate's over reference's",
}
_AT_LEAST = {"top1_agreement", "cosine"}
_RUNNERS = {"llama4": "our reference model", "transformers": "Transformers"}


class _Result(dict[str, Any]):
    """None for what a result lacks."""

    def __missing__(self, key: str) -> None:
        return None


def write_report(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the report to `path`, whole or not at all. Raises EnvironmentFailed."""
    data = render(result).encode()
    try:
        write_small(Path(path), data)
    except OSError as error:
        raise from_os_error(error, f"writing {path}") from error


def render(result: Mapping[str, Any]) -> str:
    """The page, the same for the same result."""
    told = _Result(result)
    return _template().render(
        passed=told["passed"] is True,
        verdict=_verdict(told),
        facts=_facts(told),
        answers=_answers(told),
        faults=_faults(told),
        metrics=_metrics(told),
        has_forced=bool(as_dict(told["forced_routing"])),
        sections=sections(told),
        layers=_layers(told),
        quantized=_quantized(told),
        command=told["command"],
        light=ramp(dark=False),
        dark=ramp(dark=True),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = printable
    environment.filters["svg"] = Markup  # charts escape their own texts
    return environment.get_template("report.html.jinja")


def _verdict(told: _Result) -> str:
    name = (Path(str(told["path"])).name or str(told["path"])) if told["path"] else "the candidate"
    if told["passed"] is True:
        if told["weights_not_compared"]:
            return f"{name} says and computes what its reference does; the weights were not compared"
        if told["kind"] in (None, "exact"):
            return f"{name} says, holds and computes what its reference does"
        return f"{name} computes what its reference does, within what {told['kind']} may lose"
    lists = {
        key: [_Result(item) for item in as_dicts(told[key])] for key in ("tensors_different", "config_differences")
    }
    failed = [str(gate) for gate in as_list(told["gates_failed"])]
    if any(lists.values()) or failed or told["candidate_failure"]:
        return f"{name}: {validate_verdict(_Result({**told, **lists, 'gates_failed': failed}))}"
    return f"{name}: the validation did not come to its end"


def _facts(told: _Result) -> list[tuple[str, str]]:
    """What was run: name and value."""
    runner, reference_runner = (_RUNNERS.get(str(told[key]), told[key]) for key in ("runner", "reference_runner"))
    positions, near_ties = as_count(told["tokens"]), as_count(told["near_ties"])
    found = {
        "candidate": told["path"],
        "reference": told["reference"],
        "weights": None if told["kind"] in (None, "exact") else f"quantized, {told['kind']}",
        "run by": runner if reference_runner in (None, runner) else f"{runner}; the reference by {reference_runner}",
        "computed in": told["dtype"],
        "positions": f"{positions:,}" if positions else None,
        "near ties": f"{near_ties:,} positions" if positions and near_ties is not None else None,
        "llama4-convert": told["version"],
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _answers(told: _Result) -> list[tuple[str, bool | None, str]]:
    """The three questions: whether the answer is yes (None where nobody knows), and in words."""
    found: list[tuple[str, bool | None, str]] = []
    if told["config_differences"] is not None:
        n = len(as_list(told["config_differences"]))
        found.append(("Says", not n, f"{differ(n, 'field')} in config.json" if n else "every field means the same"))
    if told["weights_not_compared"]:
        found.append(("Holds", None, f"the weights were not compared: {told['weights_not_compared']}"))
    elif told["tensors_different"] is not None:
        n = len(as_list(told["tensors_different"]))
        found.append(("Holds", not n, differ(n, "tensor") if n else _equal(told)))
    failed = [str(gate) for gate in as_list(told["gates_failed"])]
    if told["candidate_failure"]:
        found.append(("Computes", False, f"it does not run: {told['candidate_failure']}"))
    elif as_dict(told["gates"]):
        words = f"beyond the limit: {', '.join(failed)}" if failed else "every metric is within its limit"
        found.append(("Computes", not failed, words))
    return found


def _equal(told: _Result) -> str:
    quantized = sum(
        as_count(as_dict(entry).get("matrices")) or 0 for entry in as_dict(told["tensors_quantized"]).values()
    )
    equal = max((as_count(told["tensors_compared"]) or 0) - quantized, 0)
    lossy = f", {quantized:,} matrices lose what their scheme may" if quantized else ""
    return f"{equal:,} tensors are equal bit by bit{lossy}"


def _faults(told: _Result) -> dict[str, Any]:
    """Everything wrong that has a name: each list as what to show at once, what more, and how many are left out."""
    tensors = as_dicts(told["tensors_different"])
    first = as_dict(told["first_divergence"]) if not tensors else {}  # else it is the first of them
    return {
        "first": _fault(first) if first else None,
        "fields": _bounded(as_dicts(told["config_differences"]), _field),
        "tensors": _bounded(tensors, _fault),
        "unexpected": _bounded(as_list(told["tensors_unexpected"]), str),
    }


def _bounded(items: list[Any], row: Callable[[Any], Any]) -> tuple[list[Any], list[Any], int]:
    rows = [row(item) for item in items[:_LISTED]]
    return rows[:_OPEN], rows[_OPEN:], max(len(items) - _LISTED, 0)


def _fault(fault: Mapping[str, Any]) -> dict[str, Any]:
    return {key: fault.get(key) for key in ("layer", "module", "tensor", "cause", "kind")}


def _field(field: Mapping[str, Any]) -> dict[str, str]:
    return {
        "field": str(field.get("field")),
        "expected": _as_json(field.get("expected")),
        "found": _as_json(field.get("found")),
        "matters": _matters(field),
    }


def _as_json(value: Any) -> str:
    """A value as config.json spells it; text without its quotes."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _matters(field: Mapping[str, Any]) -> str:
    """From which length of prompt on it changes a logit."""
    length = as_count(field.get("matters_from"))
    if length is not None:
        return f"from {length:,} tokens on" if length > 1 else "always"
    return "never" if field.get("matters") is False else "yes" if field.get("matters") is True else "unknown"


def _metrics(told: _Result) -> list[dict[str, Any]]:
    """The rows of the table; none if nothing ran."""
    if not as_count(told["tokens"]):
        return []
    gates, forced = as_dict(told["gates"]), as_dict(told["forced_routing"])
    failed = {str(gate) for gate in as_list(told["gates_failed"])}
    names = [*_METRICS, *(name for name in list(gates)[:_LISTED] if name not in _METRICS)]
    return [
        {
            "name": name,
            "words": _METRICS.get(name, ""),
            "value": _value(name, told[name], told[f"{name}_error"]),
            "forced": _value(name, forced[name]) if name in forced else "",
            "limit": _limit(name, gates[name]) if name in gates else "",
            "passed": name not in failed if name in gates else None,
        }
        for name in names
        if told[name] is not None or name in gates
    ]


def _value(name: str, value: Any, error: Any = None) -> str:
    known, spread = as_number(value), as_number(error)
    if known is None:
        return "not a number"
    if name.startswith("perplexity"):
        return f"{known:.5g}" + (f" \N{PLUS-MINUS SIGN} {number(float(f'{spread:.2g}'))}" if spread is not None else "")
    if name not in _AT_LEAST:
        return number(known)
    shown = f"{known:.6f}".rstrip("0").rstrip(".")
    return f"1 \N{MINUS SIGN} {number(1 - known)}" if shown == "1" and known < 1 else shown


def _limit(name: str, limit: Any) -> str:
    return f"{'at least' if name in _AT_LEAST else 'at most'} {_number(limit)}"


def _number(value: Any) -> str:
    known = as_number(value)
    return "" if known is None else number(known)


def _layers(told: _Result) -> list[dict[str, str]]:
    """The rows of the table of layers."""
    rows = []
    for layer in as_dicts(told["layers"])[: 8 * _LISTED]:
        share = as_share(layer.get("router_agreement"))
        rows.append(
            {
                "layer": str(layer.get("layer")),
                "local": _number(layer.get("nmse_local")),
                "propagated": _number(layer.get("nmse_propagated")),
                "router": "" if share is None else f"{100 * share:.2f} %",
            }
        )
    return rows


def _quantized(told: _Result) -> list[dict[str, Any]]:
    """What became of the matrices of each scheme."""
    return [
        {
            "kind": kind,
            "matrices": f"{as_count(entry.get('matrices')) or 0:,}",
            "mean": _number(entry.get("relative_mse_mean")),
            "largest": _number(entry.get("relative_mse_largest")),
            "worst": entry.get("worst"),
        }
        for kind, entry in (
            (kind, as_dict(entry)) for kind, entry in list(as_dict(told["tensors_quantized"]).items())[:_LISTED]
        )
    ]
