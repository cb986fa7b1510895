"""What a quantizing conversion has to tell: the error it made, by matrix and family, and what became of the bytes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from llama4_convert.planning.plan import Plan
from quant.config import Module, compressed_tensors_config
from quant.recipe import Recipe


def quantization_config(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What config.json says of it, in the words of the recipe's format."""
    # Linear layers that the recipe leaves alone are no planned matrices, but they must be named as left alone.
    modules = [Module(m.module, m.family, m.layer, m.expert, scheme) for m, scheme in plan.linear_layers]
    if recipe.format == "compressed-tensors":
        return compressed_tensors_config(modules)
    from quant.formats.bitsandbytes import bitsandbytes_config

    return bitsandbytes_config(modules)


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
