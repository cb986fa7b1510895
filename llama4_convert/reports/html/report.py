"""The parity report: one HTML file made of the result of `validate`, or of its saved JSON.

It needs nothing but itself: no script, font or picture from anywhere. What a result lacks (the candidate does not run, it has no
experts) is left out. Names and paths come from files that nobody vouches for: the template escapes all, and lists are bounded.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from llama4_convert.errors import from_os_error, printable
from llama4_convert.files import write_small
from llama4_convert.formatting import counted, differ, number
from llama4_convert.reports.html.figures import fault_map, sections
from llama4_convert.reports.validation import count_of_faults, grouped_faults, validate_headline
from llama4_convert.validation.parity.gates import AT_LEAST
from llama4_convert.validation.results import FieldFault, Validation

_MAX_OPEN, _MAX_LISTED = 10, 50  # faults of a kind: shown at once, and shown at all
_MAX_NAMES, _MAX_SCHEMES = 3, 4  # in an answer
_LEAST_PERCENT = 0.01  # that an answer mentions
_NOISE_PERPLEXITY = 1e4  # of no text that a model has learned to read
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
_RUNNERS = {"llama4": "our reference model", "transformers": "Transformers"}


def write_report(result: Validation, path: str | os.PathLike[str]) -> None:
    """Write the report to `path`, whole or not at all. Raises EnvironmentFailed."""
    data = render(result).encode()
    try:
        write_small(Path(path), data)
    except OSError as error:
        raise from_os_error(error, f"writing {path}") from error


def render(result: Validation) -> str:
    """The page, the same for the same result."""
    different = grouped_faults(result.tensors_different)
    return _template().render(
        result=result,
        verdict=validate_headline(result),
        facts=_facts(result),
        answers=_answers(result),
        fields=_bounded(result.config_differences),
        tensors=_bounded(different),
        unexpected=_bounded(result.tensors_unexpected),
        fault_map=fault_map(result) if len(different) > _MAX_OPEN else None,
        metrics=_metrics(result),
        is_of_noise=_is_of_noise(result),
        sections=sections(result),
        max_layers=8 * _MAX_LISTED,
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
    environment.filters |= {
        "shown": lambda value, limit=300: printable(str(value), limit),
        "dotted": _dotted,
        "svg": Markup,  # of charts, whose texts are escaped
        "as_json": _as_json,
        "matters": _matters,
        "number": lambda value: "" if value is None else number(value),
    }
    return environment.get_template("report.html.jinja")


def _dotted(text: str) -> Markup:
    """A long name that may go on in the next line behind each dot."""
    return Markup(str(escape(printable(text))).replace(".", ".<wbr>"))


def _facts(result: Validation) -> list[tuple[str, str]]:
    """What was run: name and value."""
    runner, reference_runner = (_RUNNERS.get(name, name) for name in (result.runner, result.reference_runner))
    ties = counted(result.near_ties, "position") if result.tokens and result.near_ties is not None else ""
    facts = {
        "candidate": result.path,
        "reference": result.reference,
        "weights": "" if result.kind == "exact" else f"quantized, {result.kind}",
        "run by": runner if reference_runner == runner else f"{runner}; the reference by {reference_runner}",
        "computed in": result.dtype,
        "positions": f"{result.tokens:,}" if result.tokens else "",
        "near ties": ties,
        "llama4-convert": result.version,
    }
    return [(name, value) for name, value in facts.items() if value]


@dataclass(frozen=True)
class Answer:
    """One of the three questions: whether all is well (None where nobody knows), in a few words and in more."""

    name: str
    passed: bool | None
    words: str
    more: str


def _answers(result: Validation) -> list[Answer]:
    return [answer for answer in (_config(result), _weights(result), _logits(result)) if answer is not None]


def _config(result: Validation) -> Answer:
    fields = [fault.field for fault in result.config_differences]
    if not fields:
        return Answer("Config", True, "every field agrees", "config.json means what the reference's does")
    more = f" and {len(fields) - _MAX_NAMES:,} more" if len(fields) > _MAX_NAMES else ""
    return Answer("Config", False, differ(len(fields), "field"), ", ".join(fields[:_MAX_NAMES]) + more)


def _weights(result: Validation) -> Answer:
    if result.weights_not_compared:
        return Answer("Weights", None, "not compared", result.weights_not_compared)
    compared = result.tensors_compared
    if different := result.tensors_different:
        return Answer("Weights", False, count_of_faults(different), f"of {compared:,} compared")
    if names := result.tensors_unexpected:
        more = "and every tensor it should have is right"
        return Answer("Weights", None, f"{counted(len(names), 'tensor')} too many", more)
    lossy = result.tensors_quantized
    equal = max(compared - sum(loss.matrices for loss in lossy.values()), 0)
    if not lossy:
        return Answer("Weights", True, f"{counted(equal, 'tensor')} equal", "bit by bit")
    schemes = list(lossy.items())[:_MAX_SCHEMES]
    words = ", ".join(f"{loss.matrices:,} matrices in {scheme}" for scheme, loss in schemes)
    errors = ", ".join(number(loss.relative_mse_mean) for _, loss in schemes if loss.relative_mse_mean is not None)
    more = f"relative squared error {errors}; {counted(equal, 'other tensor')} equal bit by bit"
    return Answer("Weights", True, words, more)


def _logits(result: Validation) -> Answer | None:
    if result.candidate_failure:
        return Answer("Logits", False, "it does not run", result.candidate_failure)
    if not result.gates:
        return None
    share = result.top1_agreement
    words = "not a number" if share is None else f"{_per_cent(share)} agree"
    kl = f"KL {_value('kl_mean', result.kl_mean)} nats a token"
    if failed := result.gates_failed:
        return Answer("Logits", False, words, f"on the likeliest token; {kl}; beyond the limit: {', '.join(failed)}")
    ratio = result.perplexity_ratio
    percent = 0.0 if ratio is None or _is_of_noise(result) else 100 * (ratio - 1)
    change = f"; perplexity {percent:+.2g} %" if abs(percent) >= _LEAST_PERCENT else ""
    return Answer("Logits", True, words, f"on the likeliest token; {kl}{change}".replace("-", "\N{MINUS SIGN}"))


def _is_of_noise(result: Validation) -> bool:
    """Whether the perplexity is that of tokens that mean nothing, so that its change does not either."""
    return (result.perplexity_reference or 0) > _NOISE_PERPLEXITY


def _per_cent(share: float) -> str:
    """Never 100 % where one position differs."""
    shown = f"{100 * share:.3g}"
    return f"{shown} %" if share == 1 or shown != "100" else "above 99.9 %"


@dataclass(frozen=True)
class _Bounded:
    """A list of faults: what to show at once, what more when asked for, and how many are left out."""

    at_once: Sequence[Any]
    asked: Sequence[Any]
    left_out: int


def _bounded(items: Sequence[Any]) -> _Bounded:
    return _Bounded(items[:_MAX_OPEN], items[_MAX_OPEN:_MAX_LISTED], max(len(items) - _MAX_LISTED, 0))


def _as_json(value: Any) -> str:
    """A value as config.json spells it; text without its quotes."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _matters(fault: FieldFault) -> str:
    """From which length of prompt on a field changes a logit."""
    if fault.matters_from is None:
        return "never"
    return f"from {fault.matters_from:,} tokens on" if fault.matters_from > 1 else "always"


def _metrics(result: Validation) -> list[dict[str, Any]]:
    """The rows of the table; none if nothing ran."""
    if not result.tokens:
        return []
    gates = result.gates
    return [
        {
            "name": name,
            "words": words,
            "value": _value(name, getattr(result, name), getattr(result, f"{name}_error", None)),
            "forced": _value(name, getattr(result.forced_routing, name))
            if hasattr(result.forced_routing, name)
            else "",
            "limit": f"{'at least' if name in AT_LEAST else 'at most'} {number(gates[name])}" if name in gates else "",
            "passed": name not in result.gates_failed if name in gates else None,
        }
        for name, words in _METRICS.items()
        if getattr(result, name) is not None or name in gates
    ]


def _value(name: str, value: float | None, error: float | None = None) -> str:
    if value is None:
        return "not a number"
    if name.startswith("perplexity"):
        shown = f"{value:.5g}" if abs(value) < 1e5 else number(float(f"{value:.3g}"))
        return shown + (f" \N{PLUS-MINUS SIGN} {number(float(f'{error:.2g}'))}" if error is not None else "")
    if name not in AT_LEAST:
        return number(value)
    shown = f"{value:.6f}".rstrip("0").rstrip(".")
    return f"1 \N{MINUS SIGN} {number(1 - value)}" if shown == "1" and value < 1 else shown
