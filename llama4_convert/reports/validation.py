"""What `validate` prints: the verdict, what is wrong by tensor and field, and how far the logits lie apart."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama4_convert.formatting import counted, differ, number

_SHOWN = 5  # fields, and tensors, that are listed
_PATH = 40  # characters of a path that a headline has room for


def validate_summary(result: dict[str, Any]) -> str:
    different, said = grouped_faults(result["tensors_different"]), result["config_differences"]
    lines = [
        f"{'PASSED' if result['passed'] else 'FAILED'}   {validate_headline(result)}",
        f"config   {differ(len(said), 'field')}" if said else "config   every field says what the reference says",
        *(
            f"         {d['field']} is {_short(d['found'])}, should be {_short(d['expected'])}{_matters(d)}"
            for d in said[:_SHOWN]
        ),
        *_more(said),
        f"weights  {count_of_faults(result['tensors_different']) if different else _equal(result)}",
        *(f"         {d['tensor']} ({d['module']}): {d['cause']}" for d in different[:_SHOWN]),
        *_more(different),
    ]
    if result["tensors_unexpected"]:
        names = result["tensors_unexpected"]
        lines.append(f"         {counted(len(names), 'tensor')} that no Llama 4 has, first {names[0]}")
    if result["candidate_failure"]:
        return "\n".join([*lines, f"logits   it does not run: {result['candidate_failure']}"])
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


def _more(items: list[Any]) -> list[str]:
    return [f"         and {len(items) - _SHOWN:,} more"] if len(items) > _SHOWN else []


def count_of_faults(different: Sequence[Mapping[str, Any]]) -> str:
    """How many tensors are wrong or missing, and, where a tensor holds several matrices, how many of those."""
    tensors = len({str(fault.get("tensor")) for fault in different})
    matrices = f", in {len(different):,} matrices" if len(different) > tensors else ""
    return f"{counted(tensors, 'tensor')} {'is' if tensors == 1 else 'are'} wrong{matrices}"


def grouped_faults(different: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The matrices of one tensor that are wrong in one way as one fault: the cause of the first, `module` in words."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for fault in different:
        groups.setdefault((str(fault.get("tensor")), str(fault.get("kind"))), []).append(fault)
    return [
        {**group[0], "module": _modules([str(fault.get("module")) for fault in group])} for group in groups.values()
    ]


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
    shown = ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs[:_SHOWN])
    more = " ..." if len(runs) > _SHOWN else ""
    return f"{known[0][1]} {shown}{more} ({', '.join(dict.fromkeys(match[3] for match in known))})"


def _matters(difference: dict[str, Any]) -> str:
    """At what length a field shows, if it does not show here."""
    least = difference["matters_from"]
    if difference["matters"] is not False:
        return ""
    return f" (changes logits from {least:,} tokens on, or with a picture: not here)"


def _layer_lines(result: dict[str, Any]) -> list[str]:
    """The worst of what lies between tokens and logits, and where the first error is made."""
    stages = [*({"layer": v["stage"], **v} for v in result["vision"]), *result["layers"]]
    local = [one for one in stages if one["nmse_local"] is not None]
    lines = []
    if local:
        worst = max(local, key=lambda one: one["nmse_local"])
        at = worst["layer"] if isinstance(worst["layer"], str) else f"layer {worst['layer']}"
        lines.append(
            f"layers   {len(stages)}, each given the reference's input: nmse {worst['nmse_local']:.3g} at most ({at})"
        )
    agreements = [one["router_agreement"] for one in result["layers"] if one["router_agreement"] is not None]
    forced = result["forced_routing"]
    if agreements and min(agreements) < 1 and forced and forced["kl_mean"] is not None:
        lines.append(
            f"         {min(agreements):.2%} of the tokens at least go to the same experts; with routing forced mean KL"
            f" {forced['kl_mean']:.3g}"
        )
    first = result["first_divergence"]
    if first and first["tensor"] is None:
        lines.append(f"         it strays first at {place_of(first)}: {first['cause']}")
    return lines


def _logit_lines(result: dict[str, Any]) -> list[str]:
    perplexity = " and ".join(
        "none" if result[f"perplexity_{side}"] is None else number(result[f"perplexity_{side}"])
        for side in ("reference", "candidate")
    )
    ratio, error = result["perplexity_ratio"], result["perplexity_ratio_error"]
    change = f", {ratio:.6g} ± {error:.2g} times" if ratio is not None and error is not None else ""
    runners = result["runner"]
    if result["reference_runner"] != "llama4":
        runners = f"{result['reference_runner']} and {runners}"
    ties = f", {counted(result['near_ties'], 'near-tie')} set aside" if result["near_ties"] else ""
    lines = [
        f"logits   {counted(result['tokens'], 'token')}{ties}; {runners}, {result['dtype']}",
        f"         perplexity {perplexity}{change}",
    ]
    for name, limit in result["gates"].items():
        value = result[name]
        least = name in ("top1_agreement", "cosine")
        verdict = "FAILED" if name in result["gates_failed"] else "ok"
        shown = "not a number" if value is None else f"{value:.3g}"
        lines.append(f"         {name:15} {shown:>12}  {'at least' if least else 'at most':8} {limit:<6g}  {verdict}")
    return lines


def _equal(result: dict[str, Any]) -> str:
    if result["weights_not_compared"]:
        return str(result["weights_not_compared"])
    quantized = result["tensors_quantized"]
    n = sum(told["matrices"] for told in quantized.values())
    if not n:
        return f"{result['tensors_compared']} tensors are equal bit by bit"
    kinds = "; ".join(
        f"{told['matrices']} in {kind}, relative squared error {told['relative_mse_mean']:.4g} on average,"
        f" {told['relative_mse_largest']:.4g} at most"
        for kind, told in quantized.items()
    )
    return f"{result['tensors_compared'] - n} tensors are equal bit by bit; {kinds}"


def validate_headline(result: Mapping[str, Any]) -> str:
    """The verdict in a sentence, the same on the terminal and on the page."""
    path = str(result["path"] or "the candidate")
    name = path if len(path) <= _PATH else Path(path).name or path
    if not result["passed"]:
        return f"{name}: {validate_verdict(result)}"
    if result["weights_not_compared"]:
        return f"{name} has the config and the logits of its reference; the weights were not compared"
    if result["kind"] in (None, "exact"):
        return f"{name} has the config, the weights and the logits of its reference"
    return f"{name} differs from its reference by no more than {result['kind']} may"


def validate_verdict(result: Mapping[str, Any]) -> str:
    """The reason of a failed validation, the most telling first."""
    if result["tensors_different"]:
        first = result["tensors_different"][0]
        tensor, cause = str(first["tensor"]), str(first["cause"]).partition(";")[0]  # behind it are details
        return cause if tensor in cause else f"{tensor}: {cause}"
    if result["config_differences"]:
        d = result["config_differences"][0]
        return f"config.json: {d['field']} is {_short(d['found'])}, should be {_short(d['expected'])}"
    if result["candidate_failure"]:
        return str(result["candidate_failure"])
    first = result["first_divergence"]
    where = f", first at {place_of(first)}: {first['cause']}" if first else f": {', '.join(result['gates_failed'])}"
    return f"logits differ{where}"


def place_of(divergence: Mapping[str, Any]) -> str:
    where = str(divergence["module"])
    return where if divergence["layer"] is None else f"layer {divergence['layer']}, {where}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:60] + " ..."
