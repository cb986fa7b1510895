"""What a quantizing conversion has to tell: the error it made, by matrix and family, and what became of the bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from llama4_convert.composition import kind_of
from llama4_convert.planned import Plan
from quant.config import Module, compressed_tensors_config
from quant.recipe import Recipe

_WORST = 5


def relative_mse(squared_error: float, squared_sum: float) -> float:
    """Error over power; 0 for a matrix of zeros."""
    return squared_error / squared_sum if squared_sum else 0.0


def sqnr_db(relative: float) -> float | None:
    """Signal to quantization noise, in decibels; None where there is no noise."""
    return -10 * math.log10(relative) if relative > 0 else None


def describe_errors(errors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Of every matrix in `errors` (module -> sums of squares, error and weight): overall, by family, and the worst."""
    groups: dict[str, list[Sequence[float]]] = defaultdict(list)
    for module, pair in errors.items():
        groups[kind_of(f"{module}.weight")].append(pair)

    def summed(pairs: Iterable[Sequence[float]]) -> dict[str, Any]:
        pairs = list(pairs)
        relative = relative_mse(math.fsum(e for e, _ in pairs), math.fsum(s for _, s in pairs))
        return {"matrices": len(pairs), "relative_mse": relative, "sqnr_db": sqnr_db(relative)}

    each = {module: relative_mse(*pair) for module, pair in errors.items()}
    worst = sorted(each, key=lambda module: (-each[module], module))[:_WORST]
    return {
        **summed(pair for pairs in groups.values() for pair in pairs),
        "families": {family: summed(pairs) for family, pairs in sorted(groups.items())},
        "worst": [{"module": m, "relative_mse": each[m], "sqnr_db": sqnr_db(each[m])} for m in worst],
    }


def quantization_config(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What config.json says of it, in the words of the recipe's format."""
    # Linear layers that the recipe leaves alone are no planned matrices, but they must be named as left alone.
    modules = [Module(m.module, m.family, m.layer, m.expert, scheme) for m, scheme in plan.linear_layers]
    if recipe.format == "compressed-tensors":
        return compressed_tensors_config(modules)
    from quant.formats.bitsandbytes import bitsandbytes_config

    return bitsandbytes_config(modules)


def storage_format(kinds: Collection[str]) -> str | None:
    """How runtimes know what matrices of these schemes are stored in; None where nothing is quantized."""
    if not kinds:
        return None
    if set(kinds) == {"nf4"}:
        return "bitsandbytes-nf4"
    return f"compressed-tensors-{'mixed' if len(kinds) > 1 else next(iter(kinds))}"


def parted_group(recipe: Recipe) -> int | None:
    """Inputs that share a scale and must stay on one GPU: int4's groups, FP8's blocks; None where there are none."""
    schemes = [rule.scheme for rule in recipe.rules if rule.scheme]
    groups = [s.group_size for s in schemes if s.kind == "int4"]
    groups += [128 for s in schemes if s.kind == "fp8" and s.granularity == "block"]
    return max(groups, default=None)


def describe_sizes(plan: Plan) -> dict[str, Any]:
    """Bytes before and after, by kind, and the bits that a quantized weight comes to, scales included.

    Before: as it is gathered, which of a quantized source is bf16. `kept_bits`: matrices with the codes and scales of the source.
    """
    before: dict[str, int] = defaultdict(int)
    after: dict[str, int] = defaultdict(int)
    weights = quantized = 0
    kept = [planned for planned in plan.matrices if planned.keeps_bits]
    scales = {f"{planned.matrix.module}.weight_scale": planned for planned in kept}  # which are copied as they are
    for tensor in plan.tensors:
        planned = tensor.part.matrix if tensor.part else scales.get(tensor.name)
        if planned is None:
            before["other"] += tensor.nbytes
            after["other"] += tensor.nbytes
            continue
        after[planned.matrix.family] += tensor.nbytes
        if planned.scheme:
            quantized += tensor.nbytes
    for planned in plan.matrices:
        of_weights = planned.matrix.n * planned.matrix.k
        before[planned.matrix.family] += 2 * of_weights if planned.keeps_bits else planned.gathered.nbytes
        if planned.scheme:
            weights += of_weights
    return {
        "kept_bits": len(kept),
        "bytes_before": dict(sorted(before.items())),
        "bytes_after": dict(sorted(after.items())),
        "bits_per_quantized_weight": 8 * quantized / weights if weights else None,
    }
