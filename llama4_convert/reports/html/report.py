"""The parity report: one HTML file made of the result of `validate`, or of its saved JSON.

It needs nothing but itself: no script, font or picture from anywhere. Whatever a result lacks (a run that ended early, an older
version) is left out. Names and paths come from files that nobody vouches for: the template escapes all, and lists are bounded.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from llama4_convert.errors import from_os_error
from llama4_convert.files import write_small
from llama4_convert.formatting import counted, differ, number
from llama4_convert.reports.html.color_ramp import ramp
from llama4_convert.reports.html.figures import fault_map, sections
from llama4_convert.reports.html.untrusted import as_count, as_dict, as_dicts, as_list, as_number, as_share, printable
from llama4_convert.reports.validation import count_of_faults, grouped_faults, validate_headline

_OPEN, _LISTED = 10, 50  # faults of a kind: shown at once, and shown at all
_NAMED, _SCHEMES = 3, 4  # in a summary
_LEAST = 0.01  # per cent that a summary mentions
_NOISE = 1e4  # perplexity, of no text that a model has learned to read
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
        is_of_noise=_is_of_noise(told),
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
    environment.filters["dotted"] = _dotted
    environment.filters["svg"] = Markup  # charts escape their own texts
    return environment.get_template("report.html.jinja")


def _dotted(text: object) -> Markup:
    """A long name that may go on in the next line behind each dot."""
    return Markup(str(escape(printable(text))).replace(".", ".<wbr>"))


def _verdict(told: _Result) -> str:
    lists = {
        key: [_Result(item) for item in as_dicts(told[key])] for key in ("tensors_different", "config_differences")
    }
    failed = [str(gate) for gate in as_list(told["gates_failed"])]
    if told["passed"] is True or any(lists.values()) or failed or told["candidate_failure"]:
        first = _Result(as_dict(told["first_divergence"]))
        return validate_headline(_Result({**told, **lists, "gates_failed": failed, "first_divergence": first}))
    return f"{printable(told['path'] or 'the candidate', 60)}: the validation did not come to its end"


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
        "near ties": counted(near_ties, "position") if positions and near_ties is not None else None,
        "llama4-convert": told["version"],
    }
    return [(name, str(value)) for name, value in found.items() if value]


@dataclass(frozen=True)
class Answer:
    """One of the three questions: whether all is well (None where nobody knows), in a few words and in more."""

    name: str
    passed: bool | None
    words: str
    more: str


def _answers(told: _Result) -> list[Answer]:
    return [one for one in (_config(told), _weights(told), _computed(told)) if one is not None]


def _config(told: _Result) -> Answer | None:
    if told["config_differences"] is None:
        return None
    fields = [str(field.get("field")) for field in as_dicts(told["config_differences"])]
    if not fields:
        return Answer("Config", True, "every field agrees", "config.json means what the reference's does")
    return Answer("Config", False, differ(len(fields), "field"), _names(fields))


def _weights(told: _Result) -> Answer | None:
    if told["weights_not_compared"]:
        return Answer("Weights", None, "not compared", str(told["weights_not_compared"]))
    if told["tensors_different"] is None:
        return None
    different, unexpected = as_dicts(told["tensors_different"]), as_list(told["tensors_unexpected"])
    compared = as_count(told["tensors_compared"]) or 0
    if different or unexpected:
        told_apart = f"of {compared:,} compared" if different else "and every tensor it should have is right"
        words = count_of_faults(different) if different else f"{counted(len(unexpected), 'tensor')} too many"
        return Answer("Weights", False if different else None, words, told_apart)
    lossy = {kind: as_dict(entry) for kind, entry in as_dict(told["tensors_quantized"]).items()}
    matrices = {kind: as_count(entry.get("matrices")) or 0 for kind, entry in lossy.items()}
    equal = max(compared - sum(matrices.values()), 0)
    if not lossy:
        return Answer("Weights", True, f"{counted(equal, 'tensor')} equal", "bit by bit")
    words = ", ".join(f"{n:,} matrices in {kind}" for kind, n in list(matrices.items())[:_SCHEMES])
    errors = ", ".join(_number(entry.get("relative_mse_mean")) for entry in list(lossy.values())[:_SCHEMES])
    more = f"relative squared error {errors}; {counted(equal, 'other tensor')} equal bit by bit"
    return Answer("Weights", True, words, more)


def _computed(told: _Result) -> Answer | None:
    if told["candidate_failure"]:
        return Answer("Logits", False, "it does not run", str(told["candidate_failure"]))
    gates = as_dict(told["gates"])
    if not gates:
        return None
    share, failed = as_share(told["top1_agreement"]), [str(gate) for gate in as_list(told["gates_failed"])]
    words = "not a number" if share is None else f"{_per_cent(share)} agree"
    kl = f"KL {_value('kl_mean', told['kl_mean'])} nats a token"
    if failed:
        return Answer("Logits", False, words, f"on the likeliest token; {kl}; beyond the limit: {', '.join(failed)}")
    ratio = as_number(told["perplexity_ratio"])
    percent = 0.0 if ratio is None or _is_of_noise(told) else 100 * (ratio - 1)
    change = f"; perplexity {percent:+.2g} %" if abs(percent) >= _LEAST else ""
    return Answer("Logits", True, words, f"on the likeliest token; {kl}{change}".replace("-", "\N{MINUS SIGN}"))


def _is_of_noise(told: _Result) -> bool:
    """Whether the perplexity is that of tokens that mean nothing, so that its change does not either."""
    return (as_number(told["perplexity_reference"]) or 0) > _NOISE


def _per_cent(share: float) -> str:
    """Never 100 % where one position differs."""
    shown = f"{100 * share:.3g}"
    return f"{shown} %" if share == 1 or shown != "100" else "above 99.9 %"


def _names(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")


def _faults(told: _Result) -> dict[str, Any]:
    """Everything wrong that has a name: each list as what to show at once, what more, and how many are left out."""
    tensors = grouped_faults(as_dicts(told["tensors_different"]))
    first = as_dict(told["first_divergence"]) if not tensors else {}  # else it is the first of them
    return {
        "first": _fault(first) if first else None,
        "fields": _bounded(as_dicts(told["config_differences"]), _field),
        "tensors": _bounded(tensors, _fault),
        "map": fault_map(told) if len(tensors) > _OPEN else None,
        "unexpected": _bounded(as_list(told["tensors_unexpected"]), str),
    }


def _bounded(items: list[Any], row: Callable[[Any], Any]) -> tuple[list[Any], list[Any], int]:
    rows = [row(item) for item in items[:_LISTED]]
    return rows[:_OPEN], rows[_OPEN:], max(len(items) - _LISTED, 0)


def _fault(fault: Mapping[str, Any]) -> dict[str, Any]:
    return {key: fault.get(key) for key in ("layer", "module", "tensor", "cause")}


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
    return "never" if field.get("matters_from", "") is None else "unknown"


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
        shown = f"{known:.5g}" if abs(known) < 1e5 else number(float(f"{known:.3g}"))
        return shown + (f" \N{PLUS-MINUS SIGN} {number(float(f'{spread:.2g}'))}" if spread is not None else "")
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
