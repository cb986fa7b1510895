"""Makes params.json, from which Meta's code builds a model, of a config.json.

Widths are no fields of it: Meta's code computes them from factors (`llama4.geometry.swiglu_width`). Published factors are taken
where they give the widths that the model has; else factors that do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from llama4.config import Llama4Config
from llama4.config_differences import Difference, differences
from llama4.geometry import Geometry, GeometryError, swiglu_width
from llama4_convert.errors import BadInput

_PUBLISHED = {"multiple_of": 2048, "ffn_dim_multiplier": 1.2, "ffn_exp": 4.0}
_CAPACITY_FACTOR = 1.0  # published; Meta's code scales a width by it, and reads it for nothing else


def params_json(config: Llama4Config) -> bytes:
    """The content of params.json. Raises BadInput, naming the field of config.json that params.json cannot express."""
    params = _params(config)
    try:
        made = Llama4Config.from_geometry(Geometry.from_params(params))
    except GeometryError as error:
        raise BadInput(f"config.json cannot be said in params.json: {error}") from error
    if found := next(contradictions(made, config), None):
        raise BadInput(
            f"config.json says {found.field} is {_short(found.found)}, which params.json has no words for:"
            f" Meta's code would have {_short(found.expected)}"
        )
    return (json.dumps(params, indent=2) + "\n").encode()


def contradictions(made: Llama4Config, config: Llama4Config) -> Iterator[Difference]:
    """Fields of `config` that a model built by params.json would not have; those that the tokenizer decides are left out."""
    return (d for d in differences(made, config) if not d.field.endswith("_token_index"))


def _short(value: Any) -> str:
    return f"{value!s:.60}"


def _params(config: Llama4Config) -> dict[str, Any]:
    c, g = config.text_config, config.to_geometry()
    assert g.dense_dim is not None
    params: dict[str, Any] = {
        "dim": g.dim,
        "n_layers": g.n_layers,
        "n_heads": g.n_heads,
        "n_kv_heads": g.n_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": g.vocab_size,
        **_factors(g, bool(c.moe_layers)),
        "norm_eps": g.norm_eps,
        "rope_theta": g.rope_theta,
        "use_scaled_rope": g.rope_scaling is not None,
        "nope_layer_interval": g.nope_interval,
        "use_qk_norm": g.use_qk_norm,
        "attention_chunk_size": g.chunk_size,
        "attn_temperature_tuning": g.attn_temperature_tuning,
        "floor_scale": g.floor_scale,
        "attn_scale": g.attn_scale,
    }
    if g.rope_scaling:
        params["rope_scaling_factor"] = g.rope_scaling.factor
        params["rope_high_freq_factor"] = g.rope_scaling.high_freq_factor
    if v := g.vision:
        params["vision_args"] = {
            "image_size": {"height": v.image_size, "width": v.image_size},
            "patch_size": {"height": v.patch_size, "width": v.patch_size},
            "dim": v.dim,
            "n_layers": v.n_layers,
            "n_heads": v.n_heads,
            "mlp_ratio": v.mlp_dim / v.dim,
            "output_dim": v.output_dim,
            "pixel_shuffle_ratio": v.pixel_shuffle_ratio,
        }
    return params


def _factors(g: Geometry, has_moe: bool) -> dict[str, Any]:
    """The fields that widths are computed from. A dense model has no moe_args."""
    dense, base = g.dense_dim or 0, int(2 * 4 * g.dim / 3)
    published = swiglu_width(4 * g.dim, _PUBLISHED["ffn_dim_multiplier"], 1, int(_PUBLISHED["multiple_of"])) == dense
    factors: dict[str, Any] = dict(_PUBLISHED)
    if not published:
        # Half a unit above the width, so that cutting the fraction off gives it.
        factors = {"multiple_of": 1, "ffn_dim_multiplier": (dense + 0.5) / base, "ffn_exp": 4.0}
    if not has_moe:
        return factors
    moe: dict[str, Any] = {
        "num_experts": g.n_experts,
        "capacity_factor": _CAPACITY_FACTOR,
        "auto_scale_F": True,
        "top_k": g.top_k,
        "interleave_moe_layer_step": g.moe_step,
    }
    expert = g.expert_dim or 0
    multiplier, multiple = float(factors["ffn_dim_multiplier"]), int(factors["multiple_of"])
    if swiglu_width(4 * g.dim, multiplier, 1 + _CAPACITY_FACTOR, multiple) != expert:
        # A width before scaling down that is above the expert's, and the divisor 1 + capacity_factor that makes it that.
        if multiple > 1:
            factors = {"multiple_of": 1, "ffn_dim_multiplier": (dense + 0.5) / base, "ffn_exp": 4.0}
            multiplier = float(factors["ffn_dim_multiplier"])
        factors["ffn_exp"] = 4.0 * (1 + (2 * expert) // dense)
        wide = swiglu_width(int(factors["ffn_exp"] * g.dim), multiplier, 1, 1)
        moe["capacity_factor"] = wide / (expert + 0.5) - 1
    return {**factors, "moe_args": moe}


def without_vision(params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` of the text model alone."""
    if isinstance(params.get("model"), Mapping):
        return {**params, "model": without_vision(params["model"])}
    return {key: value for key, value in params.items() if key != "vision_args" or value is None}
