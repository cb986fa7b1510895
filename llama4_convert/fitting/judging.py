"""The verdicts of all runtimes on a case, the recipes that would fit it, and what to do where nothing does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama4_convert.errors import UsageError
from llama4_convert.fitting.gpus import allowances, gpus
from llama4_convert.fitting.memory import Weights, chunked_layers, kv_bytes
from llama4_convert.fitting.runtimes import FORMATS, RUNTIMES, Case, memory
from llama4_convert.fitting.serving import verdict

if TYPE_CHECKING:
    from quant.recipe import Recipe

GOOD_CONTEXT = 131_072  # what a recipe should reach where nobody asks for a context
# The built-in recipes, least error first; what is not named comes last. The second are not for every runtime.
_ORDER = ("fp8", "int4-experts", "mixed", "int4", "int4-signed", "nf4")
_ONLY = {"mixed": "vLLM", "nf4": "Transformers", "int4-signed": "no int8 activations"}


def judge(case: Case, unquantized: Weights | None = None) -> dict[str, Any]:
    """The verdict of every runtime on a case, as the `fit` of the design's JSON.

    Of its `runtimes`, one a name of RUNTIMES: `fits`; `max_context`, 0 where the weights alone are too much;
    `max_context_fp8_kv`, the same with an FP8 KV cache, None where there is none; `command` for the context asked, else for the
    largest, and empty where there is nothing to serve; `note`; and `memory` at that context. `weights`, `kv_cache` (what is
    left for it), `activations` and `context_overhead` are bytes of one GPU in vLLM, `weight_bytes` those of all.
    `best_recipe` is the built-in recipe of the least error that vLLM and SGLang both load here with the context asked (or
    GOOD_CONTEXT), "bf16" for none, None if no recipe fits; recipes are counted on `unquantized` (None: the case's own if
    it is not quantized, else all in bf16).
    `advice` says what fits instead; it is empty where any runtime fits. Raises UsageError for what cannot be asked.
    """
    if case.format is not None and case.format not in FORMATS:
        raise ValueError(f"format must be None or one of {', '.join(FORMATS)}, not {case.format!r}")
    for what, value in (
        ("number of GPUs", case.n_gpus),
        ("number of sequences", case.sequences),
        ("context", case.context),
    ):
        if value is not None and value < 1:
            raise UsageError(f"the {what} must be at least 1, not {value}")
    runtimes = [verdict(case, runtime) for runtime in RUNTIMES]
    fits = any(r["fits"] for r in runtimes)
    if unquantized is None:
        unquantized = case.weights if case.format is None else Weights.of_geometry(case.geometry)
    candidates = _recipes_that_fit(case, unquantized)
    elsewhere = [] if fits else list(_elsewhere(case))
    token, chunked = (
        kv_bytes(case.geometry, case.n_gpus, 1 if case.fp8_kv and case.gpu.fp8 else 2),
        chunked_layers(case.geometry),
    )
    weights = case.weights.of_tensor_parallel(case.n_gpus, case.geometry.n_kv_heads)
    activations = memory(case, "vllm").activations
    return {
        "gpu": case.gpu.key,
        "n_gpus": case.n_gpus,
        "gpu_bytes": case.gpu.nbytes,
        "weight_bytes": case.weights.total,
        "weight_bytes_by_kind": dict(vars(case.weights)),
        "format": case.format,
        "context": case.context,
        "sequences": case.sequences,
        "fits": fits,
        "weights": weights,
        "kv_cache": max(0, case.usable - activations - weights),
        "activations": activations,
        "context_overhead": allowances().overhead,
        "kv_bytes_per_token_per_layer": token,
        "kv_bytes_per_token": token * (case.geometry.n_layers - chunked),
        "kv_bytes_of_chunked_layers": token * chunked * (case.geometry.chunk_size or 0),
        "runtimes": runtimes,
        "best_recipe": _best(case, candidates),
        "elsewhere": [] if fits else elsewhere,
        "advice": "" if fits else _advice(case, candidates, elsewhere),
    }


def recipe_cases(case: Case, unquantized: Weights) -> Iterator[tuple[str, Case]]:
    """("bf16" or the name of a built-in recipe, the case with its weights), least error first; without those it does not fit."""
    from quant.recipe import built_in

    yield "bf16", replace(case, weights=unquantized, format=None, group=None)
    known = {name: recipe for name, recipe in built_in().items() if recipe.format != "meta"}  # no runtime loads that
    for name in sorted(known, key=lambda n: _ORDER.index(n) if n in _ORDER else len(_ORDER)):
        try:
            weights = unquantized.quantized(case.geometry, known[name])
        except ValueError:
            continue  # widths that the scheme cannot store
        if weights != unquantized:
            format, group = stored(known[name])
            yield name, replace(case, weights=weights, format=format, group=group)


def stored(recipe: Recipe) -> tuple[str | None, int | None]:
    """`format` and `group` of a case in which the recipe is followed."""
    from quant.config import parted_group, storage_format

    kinds = {rule.scheme.kind for rule in recipe.rules if rule.scheme}
    return storage_format(kinds), parted_group(recipe)


def _recipes_that_fit(case: Case, unquantized: Weights) -> dict[str, int]:
    """Each recipe, and "bf16", that fits the GPUs of `case` with the context asked: the most tokens of any runtime."""
    found = {}
    for name, other in recipe_cases(case, unquantized):
        tokens = [v["max_context"] for v in (verdict(other, runtime) for runtime in RUNTIMES) if v["fits"]]
        if tokens:
            found[name] = max(tokens)
    return found


def _best(case: Case, candidates: Mapping[str, int]) -> str | None:
    everywhere = {name: tokens for name, tokens in candidates.items() if name not in _ONLY}
    goal = min(GOOD_CONTEXT, case.max_context) if case.context is None else case.context
    for name, tokens in everywhere.items():
        if tokens >= goal:
            return name
    return max(everywhere, key=lambda name: everywhere[name], default=None)


def _elsewhere(case: Case) -> Iterator[str]:
    """GPUs that hold this format: more of the same, and the smallest larger kind."""
    for n in (2, 4, 8):
        if n > case.n_gpus and _fits(case, n_gpus=n):
            yield f"{n} x {case.gpu.key}"
            break
    for gpu in gpus().values():
        if gpu.nbytes > case.gpu.nbytes and _fits(case, gpu=gpu):
            yield _gpus(replace(case, gpu=gpu))
            break


def _advice(case: Case, candidates: Mapping[str, int], elsewhere: Iterable[str]) -> str:
    if case.needed > case.max_context:
        return f"ask for {case.max_context:,} tokens or fewer: the model itself ends there"
    ways = []
    here = _gpus(case)
    if not case.fp8_kv and _fits(case, fp8_kv=True):
        ways.append(f"this format on {here} with --kv-cache-dtype fp8")
    if candidates:
        best = _best(case, candidates)
        ordered = sorted((name for name in candidates if name != "int4-signed"), key=lambda name: name != best)
        names = [f"{n} ({candidates[n]:,} tokens{', ' + _ONLY[n] if n in _ONLY else ''})" for n in ordered]
        ways.append(f"{here} with {'' if ordered[0] == 'bf16' else 'recipe '}{', or '.join(names)}")
    ways += [f"this format on {there}" for there in elsewhere]
    return "; or ".join(ways) if ways else f"nothing here fits {case.needed:,} tokens: more or larger GPUs are needed"


def _gpus(case: Case) -> str:
    return case.gpu.key if case.n_gpus == 1 else f"{case.n_gpus} x {case.gpu.key}"


def _fits(case: Case, **changes: Any) -> bool:
    return any(verdict(replace(case, **changes), runtime)["fits"] for runtime in RUNTIMES)
