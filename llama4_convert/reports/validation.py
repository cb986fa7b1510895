"""What `validate` prints: the verdict, what is wrong by tensor and field, and how far the logits lie apart."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from llama4_convert.formatting import counted, differ, number
from llama4_convert.validation.parity.gates import AT_LEAST
from llama4_convert.validation.results import FieldFault, TensorFault, Validation

_MAX_LISTED = 5  # fields, tensors, and runs of experts
_MAX_PATH = 40  # characters of a path that a headline has room for


def validate_summary(result: Validation) -> str:
    different, fields = grouped_faults(result.tensors_different), result.config_differences
    lines = [
        f"{'PASSED' if result.passed else 'FAILED'}   {validate_headline(result)}",
        f"config   {differ(len(fields), 'field')}" if fields else "config   every field says what the reference says",
        *(
            f"         {one.field} is {_short(one.found)}, should be {_short(one.expected)}{_matters(one)}"
            for one in fields[:_MAX_LISTED]
        ),
        *_more(fields),
        f"weights  {count_of_faults(result.tensors_different) if different else _equal(result)}",
        *(f"         {fault.tensor} ({fault.module}): {fault.cause}" for fault in different[:_MAX_LISTED]),
        *_more(different),
    ]
    if names := result.tensors_unexpected:
        lines.append(f"         {counted(len(names), 'tensor')} that no Llama 4 has, first {names[0]}")
    if result.candidate_failure:
        return "\n".join([*lines, f"logits   it does not run: {result.candidate_failure}"])
    return "\n".join([*lines, *_layer_lines(result), *_logit_lines(result)])


def wrapped(text: str, width: int) -> str:
    """A summary on a terminal: what is longer than a line goes on below where it began."""
    return "\n".join(
        textwrap.fill(
            line,
            width,
            subsequent_indent=" " * (11 if line.startswith(" ") else 9),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.split("\n")
    )


def _more(items: Sequence[object]) -> list[str]:
    return [f"         and {len(items) - _MAX_LISTED:,} more"] if len(items) > _MAX_LISTED else []


def count_of_faults(different: Sequence[TensorFault]) -> str:
    """How many tensors are wrong or missing, and, where a tensor holds several matrices, how many of those."""
    tensors = len({fault.tensor for fault in different})
    matrices = f", in {len(different):,} matrices" if len(different) > tensors else ""
    return f"{counted(tensors, 'tensor')} {'is' if tensors == 1 else 'are'} wrong{matrices}"


def grouped_faults(different: Sequence[TensorFault]) -> list[TensorFault]:
    """The matrices of one tensor that are wrong in one way as one fault: the cause of the first, `module` in words."""
    groups: dict[tuple[str | None, str | None], list[TensorFault]] = {}
    for fault in different:
        groups.setdefault((fault.tensor, fault.kind), []).append(fault)
    return [replace(group[0], module=_modules([fault.module for fault in group])) for group in groups.values()]


def _modules(names: list[str]) -> str:
    """ "feed_forward.experts 0-3, 7 (gate, up)" of many."""
    if len(names) == 1:
        return names[0]
    experts = [re.fullmatch(r"(.*\.experts)\.(\d{1,6})\.(\w+)", name) for name in names]
    known = [match for match in experts if match]
    if len(known) < len(names) or len({match[1] for match in known}) > 1:
        return f"{names[0]} and {len(names) - 1:,} more"
    runs: list[list[int]] = []
    for n in sorted({int(match[2]) for match in known}):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    shown = ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs[:_MAX_LISTED])
    more = " ..." if len(runs) > _MAX_LISTED else ""
    return f"{known[0][1]} {shown}{more} ({', '.join(dict.fromkeys(match[3] for match in known))})"


def _matters(difference: FieldFault) -> str:
    """At what length a field shows, if it does not show here."""
    if difference.matters is not False:
        return ""
    return f" (changes logits from {difference.matters_from:,} tokens on, or with a picture: not here)"


def _layer_lines(result: Validation) -> list[str]:
    """The worst of what lies between tokens and logits, and where the first error is made."""
    stages = [(one.stage, one.nmse_local) for one in result.vision]
    stages += [(f"layer {one.layer}", one.nmse_local) for one in result.layers]
    local = [(error, stage) for stage, error in stages if error is not None]
    lines = []
    if local:
        error, stage = max(local, key=lambda one: one[0])
        lines.append(f"layers   {len(stages)}, each given the reference's input: nmse {error:.3g} at most ({stage})")
    agreements = [one.router_agreement for one in result.layers if one.router_agreement is not None]
    forced = result.forced_routing
    if agreements and min(agreements) < 1 and forced and forced.kl_mean is not None:
        lines.append(
            f"         {min(agreements):.2%} of the tokens at least go to the same experts; with routing forced mean KL"
            f" {forced.kl_mean:.3g}"
        )
    first = result.first_divergence
    if first and first.tensor is None:
        lines.append(f"         it strays first at {place_of(first)}: {first.cause}")
    return lines


def _logit_lines(result: Validation) -> list[str]:
    both = (result.perplexity_reference, result.perplexity_candidate)
    perplexity = " and ".join("none" if one is None else number(one) for one in both)
    ratio, error = result.perplexity_ratio, result.perplexity_ratio_error
    change = f", {ratio:.6g} ± {error:.2g} times" if ratio is not None and error is not None else ""
    runners = result.runner
    if result.reference_runner != "llama4":
        runners = f"{result.reference_runner} and {runners}"
    ties = f", {counted(result.near_ties, 'near-tie')} set aside" if result.near_ties else ""
    lines = [
        f"logits   {counted(result.tokens, 'token')}{ties}; {runners}, {result.dtype}",
        f"         perplexity {perplexity}{change}",
    ]
    for name, limit in result.gates.items():
        value = getattr(result, name)
        shown = "not a number" if value is None else f"{value:.3g}"
        direction = "at least" if name in AT_LEAST else "at most"
        verdict = "FAILED" if name in result.gates_failed else "ok"
        lines.append(f"         {name:15} {shown:>12}  {direction:8} {limit:<6g}  {verdict}")
    return lines


def _equal(result: Validation) -> str:
    if result.weights_not_compared:
        return result.weights_not_compared
    n = sum(loss.matrices for loss in result.tensors_quantized.values())
    if not n:
        return f"{result.tensors_compared} tensors are equal bit by bit"
    kinds = "; ".join(
        f"{loss.matrices} in {scheme}, relative squared error {_error(loss.relative_mse_mean)} on average,"
        f" {_error(loss.relative_mse_largest)} at most"
        for scheme, loss in result.tensors_quantized.items()
    )
    return f"{result.tensors_compared - n} tensors are equal bit by bit; {kinds}"


def _error(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}"


def validate_headline(result: Validation) -> str:
    """The verdict in a sentence, the same on the terminal and on the page."""
    name = result.path if len(result.path) <= _MAX_PATH else Path(result.path).name or result.path
    if not result.passed:
        return f"{name}: {validate_verdict(result)}"
    if result.weights_not_compared:
        return f"{name} has the config and the logits of its reference; the weights were not compared"
    if result.kind == "exact":
        return f"{name} has the config, the weights and the logits of its reference"
    return f"{name} differs from its reference by no more than {result.kind} may"


def validate_verdict(result: Validation) -> str:
    """The reason of a failed validation, the most telling first."""
    if result.tensors_different:
        first = result.tensors_different[0]
        cause = first.cause.partition(";")[0]  # behind it are details
        return cause if str(first.tensor) in cause else f"{first.tensor}: {cause}"
    if result.config_differences:
        field = result.config_differences[0]
        return f"config.json: {field.field} is {_short(field.found)}, should be {_short(field.expected)}"
    if result.candidate_failure:
        return result.candidate_failure
    if result.first_divergence:
        return f"logits differ, first at {place_of(result.first_divergence)}: {result.first_divergence.cause}"
    return f"logits differ: {', '.join(result.gates_failed)}"


def place_of(divergence: TensorFault) -> str:
    return divergence.module if divergence.layer is None else f"layer {divergence.layer}, {divergence.module}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:60] + " ..."
