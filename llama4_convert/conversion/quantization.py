"""The quantization_config of config.json: what a recipe did with every linear layer, in the words of its format."""

from __future__ import annotations

from typing import Any

from llama4_convert.planning.plan import Plan
from quant.config import Module, compressed_tensors_config
from quant.recipe import Recipe


def quantization_config(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The entry for the recipe's format, compressed-tensors or bitsandbytes."""
    # Linear layers that the recipe leaves alone are not encoded, but the configuration must name them as left alone.
    modules = [Module(m.module, m.family, m.layer, m.expert, scheme) for m, scheme in plan.linear_layers]
    if recipe.format == "compressed-tensors":
        return compressed_tensors_config(modules)
    from quant.formats.bitsandbytes import bitsandbytes_config

    return bitsandbytes_config(modules)
