"""What fits: the built-in recipes that GPUs hold, the GPUs that hold a format, and both in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from llama4_convert.fitting.deployment import Deployment, largest_context
from llama4_convert.fitting.gpus import gpus
from llama4_convert.fitting.memory import Weights
from llama4_convert.fitting.results import FitVerdict
from llama4_convert.fitting.runtimes import runtimes
from llama4_convert.formatting import gib
from quant.config import parted_group, storage_format
from quant.recipe import built_in

GOOD_CONTEXT_TOKENS = 131_072  # what a recipe should reach where nobody asks for a context
# The built-in recipes, least error first; one that is not named comes last.
_BY_ERROR = ("fp8", "int4-experts", "mixed", "int4", "int4-signed", "nf4")
# Recipes that are not for every runtime, and what they are for.
_ONLY_FOR = {"mixed": "vLLM", "nf4": "Transformers", "int4-signed": "no int8 activations"}


def recipe_deployments(deployment: Deployment) -> Iterator[tuple[str, Deployment]]:
    """("bf16" or the name of a built-in recipe, the deployment so quantized), least error first.

    Recipes that change nothing of the model, and those whose schemes cannot store its widths, are left out.
    """
    unquantized = deployment.unquantized
    if unquantized is None:
        is_quantized = deployment.format is not None
        unquantized = Weights.from_geometry(deployment.geometry) if is_quantized else deployment.weights
    yield "bf16", replace(deployment, weights=unquantized, format=None, group=None)
    known = {name: recipe for name, recipe in built_in().items() if recipe.format != "meta"}  # no runtime loads that
    for name in sorted(known, key=lambda n: _BY_ERROR.index(n) if n in _BY_ERROR else len(_BY_ERROR)):
        recipe = known[name]
        try:
            weights = unquantized.quantized(deployment.geometry, recipe)
        except ValueError:
            continue
        if weights != unquantized:
            format = storage_format({rule.scheme.kind for rule in recipe.rules if rule.scheme})
            yield name, replace(deployment, weights=weights, format=format, group=parted_group(recipe))


def recipes_that_fit(deployment: Deployment) -> dict[str, int]:
    """Each recipe, and "bf16", that these GPUs hold with the context asked: the most tokens in any runtime."""
    found = {name: _most_tokens(other) for name, other in recipe_deployments(deployment)}
    return {name: tokens for name, tokens in found.items() if tokens >= deployment.needed_context}


def best_recipe(deployment: Deployment, recipes: Mapping[str, int]) -> str | None:
    """Of `recipes` (name -> most tokens, least error first) for every runtime, the first that reaches the context asked.

    Where none was asked that is GOOD_CONTEXT_TOKENS; where none reaches it, the one with the most tokens.
    """
    everywhere = {name: tokens for name, tokens in recipes.items() if name not in _ONLY_FOR}
    goal = min(GOOD_CONTEXT_TOKENS, deployment.max_context) if deployment.context is None else deployment.context
    reaching = (name for name, tokens in everywhere.items() if tokens >= goal)
    return next(reaching, max(everywhere, key=lambda name: everywhere[name], default=None))


def gpus_that_fit(deployment: Deployment) -> Iterator[str]:
    """GPUs that hold this format: more of the same, and the smallest larger kind."""
    more = [replace(deployment, n_gpus=n) for n in (2, 4, 8) if n > deployment.n_gpus]
    larger = [replace(deployment, gpu=gpu) for gpu in gpus().values() if gpu.nbytes > deployment.gpu.nbytes]
    for others in (more, larger):
        if found := next(filter(_fits, others), None):
            yield found.gpus


def advice(deployment: Deployment, recipes: Mapping[str, int], elsewhere: Iterable[str]) -> str:
    """What to do where the deployment does not fit; `recipes` are those that fit, `elsewhere` the GPUs that hold its format."""
    if deployment.needed_context > deployment.max_context:
        return f"ask for {deployment.max_context:,} tokens or fewer: the model itself ends there"
    ways = []
    if not deployment.fp8_kv and _fits(replace(deployment, fp8_kv=True)):
        ways.append(f"this format on {deployment.gpus} with --kv-cache-dtype fp8")
    if recipes:
        best = best_recipe(deployment, recipes)
        ordered = sorted((name for name in recipes if name != "int4-signed"), key=lambda name: name != best)
        only = {name: f", {_ONLY_FOR[name]}" if name in _ONLY_FOR else "" for name in ordered}
        names = ", or ".join(f"{name} ({recipes[name]:,} tokens{only[name]})" for name in ordered)
        ways.append(f"{deployment.gpus} with {'' if ordered[0] == 'bf16' else 'recipe '}{names}")
    ways += [f"this format on {there}" for there in elsewhere]
    nothing = f"nothing here fits {deployment.needed_context:,} tokens: more or larger GPUs are needed"
    return "; or ".join(ways) or nothing


def advised_verdict(verdicts: Sequence[FitVerdict]) -> FitVerdict:
    """The best recipe on the smallest GPU on which anything fits; where nothing does, the smallest weights on the largest GPU."""
    fitting = [v for v in verdicts if v.fits]
    if not fitting:
        return min(verdicts, key=lambda v: (v.weight_bytes, -v.gpu_bytes))
    here = [v for v in fitting if v.gpu == fitting[0].gpu]
    return next((v for v in here if v.recipe is not None and v.recipe == v.best_recipe), here[0])


def in_words(verdicts: Iterable[FitVerdict], advised: FitVerdict) -> str:
    """The verdicts on the advised GPU: formats that do not fit, and where they would; those that do, with how much context."""
    yes, no = [], []
    for v in verdicts:
        if v.gpu != advised.gpu or v.recipe == "int4-signed":
            continue
        size = f"{v.name} ({gib(v.weight_bytes)})"
        best = max((r for r in v.runtimes if r.fits), key=lambda r: r.max_context, default=None)
        if best is not None:
            yes.append(f"{size} fits with {best.max_context:,} tokens in {best.runtime}")
        else:
            no.append(f"{size} does not fit{' (' + ' or '.join(v.elsewhere) + ' would)' if v.elsewhere else ''}")
    several = f"{advised.n_gpus} x " if advised.n_gpus > 1 else ""
    text = f"On {several}{advised.gpu}: {'; '.join(no + yes)}."
    return f"{text} Instead: {advised.advice}." if advised.advice else text


def _fits(deployment: Deployment) -> bool:
    return _most_tokens(deployment) >= deployment.needed_context


def _most_tokens(deployment: Deployment) -> int:
    """The largest context in any runtime."""
    return max(largest_context(deployment, runtime) for runtime in runtimes())
