"""The verdicts of `fit` for people: tables, the advice, the commands."""

from __future__ import annotations

from collections.abc import Sequence

from llama4_convert.fitting.gpus import gpus
from llama4_convert.fitting.results import Fit, FitVerdict
from llama4_convert.formatting import gib


def fit_summary(verdict: FitVerdict) -> str:
    """The verdict on one format: a line on the memory, one or two a runtime, and what would fit where nothing does."""
    each = " each" if verdict.n_gpus > 1 else ""
    asked = f", {verdict.context:,} tokens asked" if verdict.context is not None else ""
    lines = [
        f"fit      {'yes' if verdict.fits else 'no'}: {_gpus(verdict)}, {gib(verdict.gpu_bytes)}{each};"
        f" weights {gib(verdict.weight_bytes)}, room for KV cache {gib(verdict.kv_cache)}{each}{asked}"
    ]
    for r in verdict.runtimes:
        answer = f"{'yes' if r.fits else 'no ':3}  {r.max_context:>10,} tokens" if r.max_context else "no"
        lines.append(f"         {r.runtime:20}  {answer}{'  ' if r.note else ''}{r.note}")
        if r.fits:
            lines.append(f"         {'':20}  $ {r.command}")
    if verdict.advice:
        lines.append(f"         fits instead: {verdict.advice}")
    return "\n".join(lines)


def fit_table(fit: Fit) -> str:
    """The text of the command: a table of formats and runtimes, or of GPUs and formats; the advice; how to serve it."""
    several = f", {fit.sequences} sequences at a time" if fit.sequences > 1 else ""
    kv = ", FP8 KV cache" if fit.kv_cache_dtype == "fp8" else ""
    several_gpus = len({v.gpu for v in fit.verdicts}) > 1
    lines = [
        f"{fit.path}: {fit.model}, context of {fit.max_context:,} tokens at most{several}{kv}",
        *(_gpu_rows(fit.verdicts) if several_gpus else _format_rows(fit.verdicts)),
        "",
        fit.advice,
        *_commands(fit),
    ]
    return "\n".join(lines)


def _commands(fit: Fit) -> list[str]:
    """For each runtime how to serve the format that is advised, or where that does not fit there, the first that does."""
    here = [fit.fit, *(v for v in fit.verdicts if v.gpu == fit.fit.gpu)]
    lines: list[str] = []
    made: object = ""
    for i, runtime in enumerate(fit.fit.runtimes):
        chosen = next((v for v in here if v.runtimes[i].fits), None)
        if chosen is None:
            continue
        if chosen.convert != made:
            made = chosen.convert
            lines += ["", f"{chosen.name}:", f"  $ {made}"]
        r = chosen.runtimes[i]
        note = f": {r.note}" if r.note else ""
        lines += ["", f"{runtime.runtime}, {r.max_context:,} tokens{note}", f"  $ {r.command}"]
    return lines


def _format_rows(verdicts: Sequence[FitVerdict]) -> list[str]:
    """A row a format: what its weights and its KV cache take of one GPU, and the largest context in each runtime."""
    first = verdicts[0]
    each = " each" if first.n_gpus > 1 else ""
    lines = [
        f"{_gpus(first)}, {gpus()[first.gpu].name}: {gib(first.gpu_bytes)}{each}, of which {gib(first.context_overhead)}"
        " are left to CUDA and the runtime"
        f" and {gib(first.activations)} to activations (allowances, see docs/fit.md)",
    ]
    if first.kv_bytes_of_chunked_layers:
        lines.append(
            f"of keys and values, chunked layers keep {gib(first.kv_bytes_of_chunked_layers)}"
            " a sequence at most where the runtime knows them; all others keep what is said for 1,000 tokens"
        )
    runtimes = [r.runtime for r in first.runtimes]
    rows = [["format", "weights", "KV, 1,000 tokens", "left for KV", *runtimes, "verdict"]]
    for v in verdicts:
        contexts = [f"{r.max_context:,}" if r.max_context else "-" for r in v.runtimes]
        token = f"{v.kv_bytes_per_token * 1000 / (1 << 20):.1f} MiB"
        rows.append([str(v.name), gib(v.weights), token, gib(v.kv_cache), *contexts, "fits" if v.fits else "no"])
    return [*lines, "", *_aligned(rows)]


def _gpu_rows(verdicts: Sequence[FitVerdict]) -> list[str]:
    """A row a GPU, a column a format: the largest context in any runtime that fits."""
    by_gpu: dict[str, list[FitVerdict]] = {}
    for v in verdicts:
        by_gpu.setdefault(v.gpu, []).append(v)
    formats = next(iter(by_gpu.values()))
    rows = [["", *(str(v.name) for v in formats)], ["weights", *(gib(v.weight_bytes) for v in formats)]]
    for here in by_gpu.values():
        contexts = [max((r.max_context for r in v.runtimes if r.fits), default=0) for v in here]
        rows.append([_gpus(here[0]), *(f"{tokens:,}" if tokens else "-" for tokens in contexts)])
    return ["largest context in tokens, in the runtime that holds most; - where it does not fit", "", *_aligned(rows)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width, the first and the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _gpus(verdict: FitVerdict) -> str:
    return f"{verdict.n_gpus} x {verdict.gpu}" if verdict.n_gpus > 1 else verdict.gpu
