"""The kinds of a model's tensors (experts, attention, embeddings, ...), recognized by their Transformers names."""

from __future__ import annotations

import re
from collections.abc import Mapping

_LAYER = r"(language_model\.)?model\.layers\.\d+\."

# Kind -> the Transformers keys of it; the first that fits decides. The feed-forward kinds are called as recipes call them.
_KINDS = {
    kind: re.compile(pattern)
    for kind, pattern in {
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
    }.items()
}

# In the order in which they are listed. What `convert` leaves behind is dropped, what no Llama 4 has is other.
KINDS = (*(kind for kind in _KINDS if kind != "quantization_scales"), "quantization_scales", "dropped", "other")


def kind_of(key: str) -> str:
    """The kind of a tensor, by its key in Transformers' layout."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.fullmatch(key)), "other")


def words(kind: str) -> str:
    """A kind for people."""
    return kind.replace("_", " ").replace("mlp", "MLP")


def active_parameters(parameters: Mapping[str, int], experts: object, top_k: object) -> int | None:
    """How many numbers a token of text meets, of so many by kind: of the routed experts `top_k`, and nothing of vision.

    Embeddings count whole, as in the published figures. None if the numbers of experts are not known.
    """
    total = sum(n for kind, n in parameters.items() if kind not in ("vision", "projector"))
    routed = parameters.get("routed_experts", 0)
    if not routed:
        return total
    if not (isinstance(experts, int) and isinstance(top_k, int) and 0 < top_k <= experts):
        return None
    return total - routed + routed * top_k // experts
