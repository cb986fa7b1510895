"""The params.json of the published families, cut down or tiny."""

from __future__ import annotations

from typing import Any

from llama4_convert.errors import UsageError

# Special tokens of a Llama 4 tokenizer, in use or reserved: the vocabulary is the base tokens and these.
SPECIAL_TOKENS = 2048
_VISION = {
    "image_size": {"height": 336, "width": 336},
    "patch_size": {"height": 14, "width": 14},
    "dim": 1408,
    "n_layers": 34,
    "n_heads": 16,
    "mlp_ratio": 4.0,
    "output_dim": 4096,
    "pixel_shuffle_ratio": 0.5,
}
_TEXT = {
    "dim": 5120,
    "n_layers": 48,
    "n_heads": 40,
    "n_kv_heads": 8,
    "vocab_size": 202048,
    "multiple_of": 2048,
    "ffn_dim_multiplier": 1.2,
    "ffn_exp": 4.0,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}
_MOE = {"capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1}
_FAMILIES: dict[str, dict[str, Any]] = {
    "scout": {
        **_TEXT,
        "use_scaled_rope": True,
        "use_qk_norm": True,
        "nope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "moe_args": {"num_experts": 16, **_MOE, "interleave_moe_layer_step": 1},
        "vision_args": _VISION,
    },
    "maverick": {
        **_TEXT,
        "use_scaled_rope": False,
        "use_qk_norm": False,
        "nope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "moe_args": {"num_experts": 128, **_MOE, "interleave_moe_layer_step": 2},
        "vision_args": _VISION,
    },
    # Guard 4 is Scout without its routed experts: 12 B parameters, so the dense width is 8192, and 0.6 gives that
    # width.
    "guard": {
        **_TEXT,
        "ffn_dim_multiplier": 0.6,
        "use_scaled_rope": True,
        "use_qk_norm": True,
        "nope_layer_interval": None,
        "attention_chunk_size": None,
        "moe_args": None,
        "vision_args": _VISION,
    },
}
# Small, yet grouped-query, of unequal expert and dense widths (256, 512), with chunks that a short prompt outgrows.
_TINY_TEXT = {
    "dim": 256,
    "n_layers": 4,
    "n_heads": 16,
    "n_kv_heads": 8,
    "vocab_size": 256 + 256 + SPECIAL_TOKENS,
    "multiple_of": 128,
    "ffn_dim_multiplier": 0.6,
}
_TINY_CHUNK = 32
_TINY_EXPERTS = 4
_TINY_VISION = {
    "image_size": {"height": 56, "width": 56},
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "output_dim": 128,
}


def synth_params(
    geometry: str,
    layers: int | None = None,
    experts: int | None = None,
    vocab: int | None = None,
    vision_layers: int | None = None,
    tiny: bool = False,
) -> dict[str, Any]:
    """The `params.json` of a family, with some of its numbers replaced. Raises UsageError."""
    if geometry not in _FAMILIES:
        raise UsageError(f"geometry {geometry!r} is not known: choose one of {', '.join(_FAMILIES)}")
    params = dict(_FAMILIES[geometry])
    vision = dict(params["vision_args"])
    moe = dict(params["moe_args"]) if params["moe_args"] else None
    if tiny:
        params |= _TINY_TEXT
        vision |= _TINY_VISION
        params["attention_chunk_size"] = params["attention_chunk_size"] and _TINY_CHUNK
        if moe:
            moe["num_experts"] = _TINY_EXPERTS
    if experts is not None and moe is None:
        raise UsageError(f"{geometry} is a dense model: it has no experts to count")
    for target, field, value in (
        (params, "n_layers", layers),
        (moe, "num_experts", experts),
        (params, "vocab_size", vocab),
        (vision, "n_layers", vision_layers),
    ):
        if target is not None and value is not None:
            if value < 1:
                raise UsageError(f"{field} must be at least 1, not {value}")
            target[field] = value
    return params | {"moe_args": moe, "vision_args": vision}
