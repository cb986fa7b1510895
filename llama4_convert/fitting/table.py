"""The verdicts of `fit` for people: tables, the advice, the commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama4_convert.fitting.gpus import gpus
from llama4_convert.fitting.runtimes import RUNTIMES
from llama4_convert.formatting import gib


def fit_summary(fit: dict[str, Any]) -> str:
    """The verdict on one format: a line on the memory, one or two a runtime, and what would fit where nothing does."""
    each = " each" if fit["n_gpus"] > 1 else ""
    asked = f", {fit['context']:,} tokens asked" if fit["context"] is not None else ""
    lines = [
        f"fit      {'yes' if fit['fits'] else 'no'}: {_gpus(fit)}, {gib(fit['gpu_bytes'])}{each};"
        f" weights {gib(fit['weight_bytes'])}, room for KV cache {gib(fit['kv_cache'])}{each}{asked}"
    ]
    for r in fit["runtimes"]:
        told = f"{'yes' if r['fits'] else 'no ':3}  {r['max_context']:>10,} tokens" if r["max_context"] else "no"
        lines.append(f"         {r['runtime']:20}  {told}{'  ' if r['note'] else ''}{r['note']}")
        if r["fits"]:
            lines.append(f"         {'':20}  $ {r['command']}")
    if fit["advice"]:
        lines.append(f"         fits instead: {fit['advice']}")
    return "\n".join(lines)


def fit_table(result: dict[str, Any]) -> str:
    """The text of the command: a table of formats and runtimes, or of GPUs and formats; the advice; how to serve it."""
    several = f", {result['sequences']} sequences at a time" if result["sequences"] > 1 else ""
    kv = ", FP8 KV cache" if result["kv_cache_dtype"] == "fp8" else ""
    lines = [f"{result['path']}: {result['model']}, context of {result['max_context']:,} tokens at most{several}{kv}"]
    if len({v["gpu"] for v in result["verdicts"]}) > 1:
        lines += _of_gpus(result["verdicts"])
    else:
        lines += _of_runtimes(result["verdicts"])
    lines += ["", result["advice"]]
    return "\n".join([*lines, *_commands(result)])


def _commands(result: dict[str, Any]) -> list[str]:
    """For each runtime the format that is advised, or where that is not for it, the first that is."""
    advised = result["fit"]
    here = [advised, *(v for v in result["verdicts"] if v["gpu"] == advised["gpu"])]
    lines: list[str] = []
    made = ""
    for i, runtime in enumerate(RUNTIMES):
        chosen = next((v for v in here if v["runtimes"][i]["fits"]), None)
        if chosen is None:
            continue
        if chosen["convert"] != made:
            made = chosen["convert"]
            lines += ["", f"{chosen['name']}:", f"  $ {made}"]
        r = chosen["runtimes"][i]
        lines += [
            "",
            f"{runtime}, {r['max_context']:,} tokens{': ' if r['note'] else ''}{r['note']}",
            f"  $ {r['command']}",
        ]
    return lines


def _of_runtimes(verdicts: Sequence[dict[str, Any]]) -> list[str]:
    """A row a format: what its weights and its KV cache take of one GPU, and the largest context in each runtime."""
    first = verdicts[0]
    each = " each" if first["n_gpus"] > 1 else ""
    lines = [
        f"{_gpus(first)}, {gpus()[first['gpu']].name}: {gib(first['gpu_bytes'])}{each}, of which {gib(first['context_overhead'])}"
        " are left to CUDA and the runtime"
        f" and {gib(first['activations'])} to activations (allowances, see docs/fit.md)",
    ]
    if first["kv_bytes_of_chunked_layers"]:
        lines.append(
            f"of keys and values, chunked layers keep {gib(first['kv_bytes_of_chunked_layers'])}"
            " a sequence at most where the runtime knows them; all others keep what is said for 1,000 tokens"
        )
    rows = [["format", "weights", "KV, 1,000 tokens", "left for KV", *RUNTIMES, "verdict"]]
    for v in verdicts:
        contexts = [f"{r['max_context']:,}" if r["max_context"] else "-" for r in v["runtimes"]]
        token = f"{v['kv_bytes_per_token'] * 1000 / (1 << 20):.1f} MiB"
        rows.append([v["name"], gib(v["weights"]), token, gib(v["kv_cache"]), *contexts, "fits" if v["fits"] else "no"])
    return [*lines, "", *_aligned(rows)]


def _of_gpus(verdicts: Sequence[dict[str, Any]]) -> list[str]:
    """A row a GPU, a column a format: the largest context in any runtime that fits."""
    names = list(dict.fromkeys(v["name"] for v in verdicts))
    rows = [
        ["", *names],
        ["weights", *(gib(next(v["weight_bytes"] for v in verdicts if v["name"] == n)) for n in names)],
    ]
    for key in dict.fromkeys(v["gpu"] for v in verdicts):
        row = {v["name"]: v for v in verdicts if v["gpu"] == key}
        cells = []
        for name in names:
            tokens = max((r["max_context"] for r in row[name]["runtimes"] if r["fits"]), default=0)
            cells.append(f"{tokens:,}" if tokens else "-")
        rows.append([_gpus(row[names[0]]), *cells])
    return ["largest context in tokens, in the runtime that holds most; - where it does not fit", "", *_aligned(rows)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _gpus(fit: dict[str, Any]) -> str:
    return f"{fit['n_gpus']} x {fit['gpu']}" if fit["n_gpus"] > 1 else str(fit["gpu"])
