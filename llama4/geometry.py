"""The geometry of a Llama 4: every size and switch that its weights and its forward pass depend on.

It comes from Meta's `params.json`. A field that is absent or null takes the default of Meta's `ModelArgs`
(llama-models, `llama4/args.py`), never Transformers'. Sizes that `params.json` leaves open (vocabulary, number of experts,
a width whose formula lacks an input) are None until `completed` fills them in from the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

# Far beyond any Llama (48 layers): a damaged number must end in a message, not in lists of its length.
_MAX_LAYERS = 4096
_MAX_INTEGER = 2**40
_MAX_NUMBER = 1e30


class InvalidModel(ValueError):
    """What a checkpoint says of itself, or holds, makes no Llama 4: a GeometryError, a ConfigError or a BindingError."""


class GeometryError(InvalidModel):
    """`params.json` is incomplete, of the wrong type, or contradicts itself; the message names the field."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3 style frequency scaling (`apply_scaling` in Meta's model.py, where low_freq and context are constants)."""

    factor: float
    high_freq_factor: float
    low_freq_factor: float = 1.0
    original_context: int = 8192


@dataclass(frozen=True)
class VisionGeometry:
    image_size: int
    patch_size: int
    dim: int
    n_layers: int
    n_heads: int
    mlp_dim: int
    output_dim: int
    pixel_shuffle_ratio: float

    @property
    def n_patches(self) -> int:
        """Patches a tile, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """Numbers in one unfolded RGB patch."""
        return 3 * self.patch_size**2

    @property
    def shuffled_dim(self) -> int:
        """Channels after pixel shuffle: the input width of the adapter."""
        return int(self.dim // self.pixel_shuffle_ratio**2)


@dataclass(frozen=True)
class Geometry:
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int | None
    n_experts: int | None  # 0: a dense model; None: MoE, the number is the tensors' to say
    top_k: int
    moe_step: int
    expert_dim: int | None
    dense_dim: int | None
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    use_qk_norm: bool
    nope_interval: int | None
    chunk_size: int | None
    attn_temperature_tuning: bool
    floor_scale: float
    attn_scale: float
    vision: VisionGeometry | None

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def is_dense(self) -> bool:
        return self.n_experts == 0

    def is_moe(self, layer: int) -> bool:
        return not self.is_dense and (layer + 1) % self.moe_step == 0

    def uses_rope(self, layer: int) -> bool:
        return self.nope_interval is None or (layer + 1) % self.nope_interval != 0

    def is_chunked(self, layer: int) -> bool:
        """Whether the layer's attention stays inside chunks: NoPE layers always see everything."""
        return self.chunk_size is not None and self.uses_rope(layer)

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.n_layers) if self.is_moe(layer)]

    def completed(self, vocab_size: int, n_experts: int, expert_dim: int, dense_dim: int) -> Geometry:
        """A copy in which sizes that `params.json` left open are the tensors'; what it did say stays as it is."""
        return replace(
            self,
            vocab_size=vocab_size if self.vocab_size is None else self.vocab_size,
            n_experts=n_experts if self.n_experts is None else self.n_experts,
            expert_dim=expert_dim if self.expert_dim is None else self.expert_dim,
            dense_dim=dense_dim if self.dense_dim is None else self.dense_dim,
        )

    @staticmethod
    def from_params(params: Mapping[str, Any]) -> Geometry:
        """Read the fields of a `params.json` (flat, or nested under "model"). Raises GeometryError."""
        p = _Fields(params["model"] if isinstance(params.get("model"), Mapping) else params, "")
        dim, n_layers, n_heads = p.positive("dim"), p.layers(), p.positive("n_heads")
        n_kv_heads = p.positive("n_kv_heads", n_heads)
        if dim % n_heads:
            raise GeometryError(f"dim ({dim}) must be a multiple of n_heads ({n_heads})")
        if n_heads % n_kv_heads:
            raise GeometryError(f"n_heads ({n_heads}) must be a multiple of n_kv_heads ({n_kv_heads})")
        if dim // n_heads % 2:
            raise GeometryError(f"dim / n_heads ({dim // n_heads}) must be even: RoPE rotates pairs")
        stated_head_dim = p.positive("head_dim", dim // n_heads)
        if stated_head_dim != dim // n_heads:
            raise GeometryError(
                f"head_dim ({stated_head_dim}) contradicts dim / n_heads ({dim // n_heads}), which is what Meta's code uses"
            )

        moe = p.nested("moe_args")
        if moe and moe.positive("interleave_moe_layer_step", 1) > n_layers:
            moe = None  # Meta's code then builds no layer with experts
        widths = _widths(p, moe, dim)
        vocab_size = p.integer("vocab_size", -1)
        n_experts: int | None = 0
        if moe is not None:
            stated = moe.integer("num_experts", -1)
            n_experts = stated if stated > 0 else None
        top_k = moe.positive("top_k", 1) if moe else 1
        if n_experts and top_k > n_experts:
            raise GeometryError(f"moe_args.top_k ({top_k}) is more than moe_args.num_experts ({n_experts})")
        scaling = None
        if p.boolean("use_scaled_rope", False):
            # The published params.json files lack both factors; Meta's ModelArgs supplies these two.
            scaling = RopeScaling(p.above_zero("rope_scaling_factor", 16.0), p.above_zero("rope_high_freq_factor", 1.0))
        return Geometry(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            vocab_size=vocab_size if vocab_size > 0 else None,
            n_experts=n_experts,
            top_k=top_k,
            moe_step=moe.positive("interleave_moe_layer_step", 1) if moe else 1,
            expert_dim=widths[0],
            dense_dim=widths[1],
            norm_eps=p.above_zero("norm_eps", 1e-5),
            rope_theta=p.above_zero("rope_theta", 500000.0),
            rope_scaling=scaling,
            use_qk_norm=p.boolean("use_qk_norm", False),
            nope_interval=p.optional_positive("nope_layer_interval"),
            # 0 reads as null: Meta's code tests the truth of the value.
            chunk_size=p.positive("attention_chunk_size") if p.integer("attention_chunk_size", 0) else None,
            attn_temperature_tuning=p.boolean("attn_temperature_tuning", False),
            floor_scale=p.above_zero("floor_scale", 8192.0),
            attn_scale=p.number("attn_scale", 0.1),
            vision=_vision(p.nested("vision_args")),
        )


def swiglu_width(base: int, multiplier: float, divisor: float, multiple_of: int) -> int:
    """Width of a SwiGLU block by Meta's rule (moe.py and model.py): two thirds of `base`, scaled, rounded up."""
    width = int(multiplier * int(2 * base / 3))
    if divisor != 1:
        width = int(width / divisor)
    return math.ceil(width / multiple_of) * multiple_of


def _width(what: str, width: float) -> int:
    """`width` as a whole number. Raises GeometryError, blaming `what`, if it is no width that a matrix can have."""
    if not 1 <= width <= _MAX_INTEGER:
        raise GeometryError(f"{what} makes a width of {width:g}")
    return int(width)


def _widths(p: _Fields, moe: _Fields | None, dim: int) -> tuple[int | None, int | None]:
    """(routed and shared expert width, dense width); None where an input of the formula is missing."""
    multiple_of = p.positive("multiple_of", 256)
    multiplier = p.above_zero("ffn_dim_multiplier", None)
    exponent = p.above_zero("ffn_exp", None)
    expert_dim = None
    if moe is None:
        expert_dim = 0
    elif multiplier is not None and exponent is not None:
        scaled = moe.boolean("auto_scale_F", True)
        divisor = moe.above_zero("capacity_factor", 1.0) + 1 if scaled else 1
        base = _width("ffn_exp", exponent * dim)
        _width("ffn_dim_multiplier", multiplier * base)
        expert_dim = _width("moe_args.capacity_factor", swiglu_width(base, multiplier, divisor, multiple_of))
    # The dense blocks ignore ffn_exp: Meta's code writes a literal 4 there.
    if multiplier is None:
        multiplier = 1.0
    _width("ffn_dim_multiplier", multiplier * 4 * dim)
    return expert_dim, _width("ffn_dim_multiplier", swiglu_width(4 * dim, multiplier, 1, multiple_of))


def _vision(v: _Fields | None) -> VisionGeometry | None:
    if v is None:
        return None
    image, patch = v.square("image_size"), v.square("patch_size")
    dim, n_heads = v.positive("dim"), v.positive("n_heads")
    ratio = v.number("pixel_shuffle_ratio")
    if image % patch:
        raise GeometryError(f"vision_args: image_size ({image}) must be a multiple of patch_size ({patch})")
    if dim % n_heads or dim // n_heads % 4:
        raise GeometryError(
            f"vision_args: dim / n_heads ({dim} / {n_heads}) must be a multiple of 4: 2-D RoPE rotates pairs on two axes"
        )
    if not 0 < ratio <= 1 or (image // patch * ratio) % 1:
        raise GeometryError(
            f"vision_args: pixel_shuffle_ratio ({ratio}) does not divide {image // patch} patches a side"
        )
    return VisionGeometry(
        image_size=image,
        patch_size=patch,
        dim=dim,
        n_layers=v.layers(),
        n_heads=n_heads,
        mlp_dim=_width("vision_args.mlp_ratio", v.number("mlp_ratio") * dim),
        output_dim=v.positive("output_dim"),
        pixel_shuffle_ratio=ratio,
    )


_REQUIRED: Any = object()


class _Fields:
    """Typed access to one JSON object: absent and null mean the default, a wrong type is an error that names the field."""

    def __init__(self, values: Mapping[str, Any], prefix: str) -> None:
        self.values, self.prefix = values, prefix

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise GeometryError(f"{self.prefix}{name} is missing")
        return default

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise GeometryError(f"{self.prefix}{name} must be a number, not {value!r:.60}")
        if not abs(value) < math.inf or abs(value) > _MAX_NUMBER:  # the first is false for NaN
            raise GeometryError(f"{self.prefix}{name} is beyond any sensible number: {value!r:.60}")
        return float(value)

    def above_zero(self, name: str, default: Any) -> Any:
        """A number greater than 0, or `default`, which may be None."""
        value = default if self.values.get(name) is None else self.number(name)
        if value is not None and value <= 0:
            raise GeometryError(f"{self.prefix}{name} must be greater than 0, not {value!r}")
        return value

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        value = self.number(name, default)
        if value != int(value) or abs(value) > _MAX_INTEGER:
            raise GeometryError(f"{self.prefix}{name} must be an integer, not {value!r}")
        return int(value)

    def positive(self, name: str, default: Any = _REQUIRED) -> int:
        value = self.integer(name, default)
        if value < 1:
            raise GeometryError(f"{self.prefix}{name} must be at least 1, not {value}")
        return value

    def optional_positive(self, name: str) -> int | None:
        return None if self.values.get(name) is None else self.positive(name)

    def layers(self) -> int:
        value = self.positive("n_layers")
        if value > _MAX_LAYERS:
            raise GeometryError(f"{self.prefix}n_layers is {value:,}: no Llama 4 has that many layers")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise GeometryError(f"{self.prefix}{name} must be true or false, not {value!r:.60}")
        return value

    def nested(self, name: str) -> _Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise GeometryError(f"{self.prefix}{name} must be an object, not {value!r:.60}")
        return _Fields(value, f"{self.prefix}{name}.")

    def square(self, name: str) -> int:
        """A side in pixels, from a number or from {height, width}, which must agree."""
        if not isinstance(self._get(name, _REQUIRED), Mapping):
            return self.positive(name)
        size = self.nested(name)
        assert size is not None
        height, width = size.positive("height"), size.positive("width")
        if height != width:
            raise GeometryError(f"{self.prefix}{name} is {height} x {width}: only squares are known to the model code")
        return height
