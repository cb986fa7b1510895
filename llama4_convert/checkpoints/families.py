"""Families of a model's tensors (experts, attention, embeddings ...), recognized by their names in Transformers' layout.

The feed-forward families are called as recipes call them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_LAYER = r"(language_model\.)?model\.layers\.\d+\."

# Family -> its keys in Transformers' layout; the first that fits decides.
_PATTERNS = {
    "quantization_scales": r".+\.(weight_(?!packed).+|weight\..+|(input|output)_scale)",
    "embeddings": r"(language_model\.)?model\.embed_tokens\.weight",
    "attention": _LAYER + r"self_attn\..+",
    "router": _LAYER + r"feed_forward\.router\..+",
    "routed_experts": _LAYER + r"feed_forward\.experts\..+",
    "shared_expert": _LAYER + r"feed_forward\.shared_expert\..+",
    "dense_mlp": _LAYER + r"feed_forward\.(gate|up|down)_proj\..+",
    "norms": rf"({_LAYER}.+_layernorm|(language_model\.)?model\.norm)\.weight",
    "output_head": r"(language_model\.)?lm_head\..+",
    "projector": r"vision_model\.vision_adapter\..+|multi_modal_projector\..+",
    "vision": r"vision_model\..+",
}
_COMPILED = {family: re.compile(pattern) for family, pattern in _PATTERNS.items()}
_SCALES = "quantization_scales"

# In the order in which they are listed. What `convert` leaves behind is dropped, what no Llama 4 has is other.
FAMILIES = (*(name for name in _PATTERNS if name != _SCALES), _SCALES, "dropped", "other")


def family_of(key: str) -> str:
    """The family of a tensor, by its key in Transformers' layout."""
    return _SCALES if _COMPILED[_SCALES].fullmatch(key) else matrix_family_of(key)


def matrix_family_of(key: str) -> str:
    """The same, but scales are of the family of the matrix that they belong to."""
    return next((name for name, pattern in _COMPILED.items() if name != _SCALES and pattern.fullmatch(key)), "other")


def in_words(family: str) -> str:
    """A family for people: "dense MLP"."""
    return family.replace("_", " ").replace("mlp", "MLP")


def active_parameters(parameters: Mapping[str, int], experts: object, top_k: object) -> int | None:
    """How many numbers a token of text meets: of the routed experts `top_k`, and nothing of vision.

    `parameters`: family -> its numbers. Embeddings count whole, as in the published figures. `experts` and `top_k` are what
    config.json says; None if they are no numbers of experts.
    """
    total = sum(n for family, n in parameters.items() if family not in ("vision", "projector"))
    routed = parameters.get("routed_experts", 0)
    if not routed:
        return total
    if not (isinstance(experts, int) and isinstance(top_k, int) and 0 < top_k <= experts):
        return None
    return total - routed + routed * top_k // experts
