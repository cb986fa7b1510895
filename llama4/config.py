"""The configuration of a Llama 4 in the words of config.json, from either layout.

`Llama4Config.from_geometry` says what params.json means, with Meta's defaults for what it leaves out;
`Llama4Config.from_json` says what a reader makes of a config.json, with Transformers' defaults for what it leaves out. The model
runs from either; `config_differences` names the fields in which two of them disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama4.config_fields import DEFAULT_CONTEXT, ConfigFields
from llama4.config_fields import ConfigError as ConfigError
from llama4.geometry import Geometry, RopeScaling, VisionGeometry

# The model's code has these as constants; a config.json can say otherwise.
_VISION_NORM_EPS = 1e-5
_ROPE_THETA, _VISION_ROPE_THETA = 500000.0, 10000.0
_HIDDEN_ACT, _VISION_HIDDEN_ACT = "silu", "gelu"
_MAX_LIST_LENGTH = 1024  # layers, experts: far beyond any Llama 4; a damaged number must not make lists of its length

# Fields with one meaning: in config.json -> in `Geometry`, as Meta calls them.
_TEXT_IN_GEOMETRY = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "expert_dim",
    "intermediate_size_mlp": "dense_dim",
    "num_experts_per_tok": "top_k",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "use_qk_norm": "use_qk_norm",
    "attn_temperature_tuning": "attn_temperature_tuning",
    "floor_scale": "floor_scale",
    "attn_scale": "attn_scale",
}
_VISION_IN_GEOMETRY = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "mlp_dim",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "vision_output_dim": "output_dim",
    "pixel_shuffle_ratio": "pixel_shuffle_ratio",
}


@dataclass(frozen=True)
class Llama4TextConfig:
    """Sizes and switches of the text model. Lists have one entry a layer."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # of a routed expert and of the shared one
    intermediate_size_mlp: int  # of a dense layer
    num_local_experts: int
    num_experts_per_tok: int
    interleave_moe_layer_step: int  # 0: no layer is MoE
    moe_layers: tuple[int, ...]
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    no_rope_layer_interval: int | None  # None: every layer rotates
    no_rope_layers: tuple[bool, ...]  # the field's name says the opposite: True where a layer rotates
    layer_types: tuple[str, ...]  # "chunked_attention" or "full_attention"
    attention_chunk_size: int | None  # None: no layer is chunked
    use_qk_norm: bool
    attn_temperature_tuning: bool
    floor_scale: float
    attn_scale: float
    hidden_act: str = _HIDDEN_ACT
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    def is_moe(self, layer: int) -> bool:
        return layer in self.moe_layers

    def chunk_size(self, layer: int) -> int | None:
        """Tokens a chunk that attention stays inside of; None where the layer sees everything."""
        return self.attention_chunk_size if self.layer_types[layer] == "chunked_attention" else None

    @staticmethod
    def from_geometry(g: Geometry) -> Llama4TextConfig:
        """`g` must be complete (`Geometry.completed`)."""
        if g.vocab_size is None or g.n_experts is None or g.expert_dim is None or g.dense_dim is None:
            raise ConfigError("params.json leaves sizes open, and no tensor told them")
        layers = range(g.n_layers)
        rotates = tuple(g.uses_rope(layer) for layer in layers)
        return Llama4TextConfig(
            **{field: getattr(g, name) for field, name in _TEXT_IN_GEOMETRY.items()},
            head_dim=g.head_dim,
            num_local_experts=g.n_experts,
            interleave_moe_layer_step=g.moe_step if g.moe_layers else 0,
            moe_layers=tuple(g.moe_layers),
            no_rope_layer_interval=None if all(rotates) else g.nope_interval,
            no_rope_layers=rotates,
            layer_types=tuple("chunked_attention" if g.is_chunked(layer) else "full_attention" for layer in layers),
            attention_chunk_size=g.chunk_size if any(g.is_chunked(layer) for layer in layers) else None,
        )

    @staticmethod
    def from_json(body: Mapping[str, Any], tied: bool = False) -> Llama4TextConfig:
        """From the `text_config` of a config.json (or the whole, of a text model). Raises ConfigError."""
        c = ConfigFields(body, "")
        n_layers, n_heads = c.whole("num_hidden_layers", 48, most=_MAX_LIST_LENGTH), c.whole("num_attention_heads", 40)
        hidden = c.whole("hidden_size", 5120)
        interval = c.whole("no_rope_layer_interval", 0)
        rotates = tuple(bool(x) for x in c.integers("no_rope_layers") or ())
        if not rotates:
            rotates = tuple((layer + 1) % (interval or 4) != 0 for layer in range(n_layers))
        stated_step = body.get("interleave_moe_layer_step") is not None
        step = c.whole("interleave_moe_layer_step", 1, least=0)
        moe_layers = c.integers("moe_layers")
        if moe_layers is None:
            moe_layers = tuple(range(step - 1, n_layers, step)) if step else ()
        elif not stated_step:
            step = moe_layers[0] + 1 if moe_layers else 0
        types = c.strings("layer_types")
        if types is None:
            types = tuple("chunked_attention" if r else "full_attention" for r in rotates)
        # Transformers passes over entries beyond the layers. Lists that are too short are for `differences` to name.
        rotates, types = rotates[:n_layers], types[:n_layers]
        if not interval:
            interval = next((layer + 1 for layer, r in enumerate(rotates) if not r), 0)
        chunk = c.whole("attention_chunk_size", 8192) if body.get("attention_chunk_size", 0) is not None else 0
        if chunk >= c.whole("max_position_embeddings", DEFAULT_CONTEXT) and "chunked_attention" not in types:
            chunk = 0  # a number for readers that look at nothing else: it never cuts
        return Llama4TextConfig(
            vocab_size=c.whole("vocab_size", 202048),
            hidden_size=hidden,
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            num_key_value_heads=c.whole("num_key_value_heads", 8),
            head_dim=c.whole("head_dim", 128 if "head_dim" not in body else hidden // n_heads),
            intermediate_size=c.whole("intermediate_size", 8192),
            intermediate_size_mlp=c.whole("intermediate_size_mlp", 16384),
            num_local_experts=c.whole("num_local_experts", 16, least=0, most=_MAX_LIST_LENGTH),
            num_experts_per_tok=c.whole("num_experts_per_tok", 1),
            interleave_moe_layer_step=step if step <= n_layers else 0,
            moe_layers=moe_layers,
            rms_norm_eps=c.number("rms_norm_eps", 1e-5),
            rope_theta=c.rope_theta(_ROPE_THETA),
            rope_scaling=c.rope_scaling(),
            no_rope_layer_interval=interval if 0 < interval <= n_layers else None,
            no_rope_layers=rotates,
            layer_types=types,
            attention_chunk_size=chunk or None,
            use_qk_norm=c.boolean("use_qk_norm", True),
            attn_temperature_tuning=c.boolean("attn_temperature_tuning", True),
            floor_scale=c.number("floor_scale", 8192),
            attn_scale=c.number("attn_scale", 0.1),
            hidden_act=str(body.get("hidden_act") or _HIDDEN_ACT),
            attention_bias=c.boolean("attention_bias", False),
            tie_word_embeddings=tied or c.boolean("tie_word_embeddings", False),
        )


@dataclass(frozen=True)
class Llama4VisionConfig:
    """Sizes of the vision tower, its adapter and the width that it hands to the projector."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int  # of a tile's side, in pixels
    patch_size: int
    vision_output_dim: int
    pixel_shuffle_ratio: float
    norm_eps: float = _VISION_NORM_EPS
    rope_theta: float = _VISION_ROPE_THETA
    hidden_act: str = _VISION_HIDDEN_ACT

    @property
    def patches_a_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_a_tile(self) -> int:
        """Patch tokens that one tile becomes in the text."""
        return int(self.patches_a_side * self.pixel_shuffle_ratio) ** 2

    @property
    def shuffled_size(self) -> int:
        """Channels after pixel shuffle: the input width of the adapter."""
        return int(self.hidden_size / self.pixel_shuffle_ratio**2)

    @staticmethod
    def from_geometry(v: VisionGeometry) -> Llama4VisionConfig:
        return Llama4VisionConfig(**{field: getattr(v, name) for field, name in _VISION_IN_GEOMETRY.items()})

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Llama4VisionConfig:
        """From the `vision_config` of a config.json. Raises ConfigError."""
        c = ConfigFields(body, "vision_config.")
        output = c.whole("vision_output_dim", 7680)
        for name in ("projector_input_dim", "projector_output_dim"):
            if c.whole(name, 4096) != output:
                raise ConfigError(f"vision_config.{name} ({c.whole(name, 4096)}) is not vision_output_dim ({output})")
        # Transformers' code never reads norm_eps, but other readers do.
        return Llama4VisionConfig(
            hidden_size=c.whole("hidden_size", 768),
            num_hidden_layers=c.whole("num_hidden_layers", 34, most=_MAX_LIST_LENGTH),
            num_attention_heads=c.whole("num_attention_heads", 16),
            intermediate_size=c.whole("intermediate_size", 5632),
            image_size=c.side("image_size", 448),
            patch_size=c.side("patch_size", 14),
            vision_output_dim=output,
            pixel_shuffle_ratio=c.ratio("pixel_shuffle_ratio", 0.5),
            norm_eps=c.number("norm_eps", _VISION_NORM_EPS),
            rope_theta=c.rope_theta(_VISION_ROPE_THETA),
            hidden_act=str(body.get("hidden_act") or _VISION_HIDDEN_ACT),
        )


@dataclass(frozen=True)
class Llama4Config:
    """A whole model. `image_token_index` is the id that a tile's features replace (`<|patch|>`); None if it is not known."""

    text_config: Llama4TextConfig
    vision_config: Llama4VisionConfig | None = None
    image_token_index: int | None = None
    boi_token_index: int | None = None
    eoi_token_index: int | None = None

    @staticmethod
    def from_geometry(g: Geometry) -> Llama4Config:
        """Token ids are the tokenizer's to say and stay None; see `dataclasses.replace`."""
        vision = Llama4VisionConfig.from_geometry(g.vision) if g.vision else None
        return Llama4Config(Llama4TextConfig.from_geometry(g), vision)

    def to_geometry(self) -> Geometry:
        """In Meta's words, as far as these have them: layers that follow no interval are counted as if they did."""
        c, v = self.text_config, self.vision_config
        vision = VisionGeometry(**{name: getattr(v, f) for f, name in _VISION_IN_GEOMETRY.items()}) if v else None
        return Geometry(
            **{name: getattr(c, field) for field, name in _TEXT_IN_GEOMETRY.items()},
            n_experts=c.num_local_experts if c.moe_layers else 0,
            moe_step=c.interleave_moe_layer_step or 1,
            nope_interval=c.no_rope_layer_interval,
            chunk_size=c.attention_chunk_size,
            vision=vision,
        )

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Llama4Config:
        """From a parsed config.json: of `llama4` with a vision tower, or of `llama4_text`. Raises ConfigError."""
        text, vision = body.get("text_config"), body.get("vision_config")
        if text is None:
            return Llama4Config(Llama4TextConfig.from_json(body))
        if not isinstance(text, Mapping) or not isinstance(vision, Mapping | None):
            raise ConfigError("text_config and vision_config must be objects")
        c = ConfigFields(body, "")
        return Llama4Config(
            Llama4TextConfig.from_json(text, tied=c.boolean("tie_word_embeddings", False)),
            None if vision is None else Llama4VisionConfig.from_json(vision),
            image_token_index=c.token("image_token_index", 200092),
            boi_token_index=c.token("boi_token_index", 200080),
            eoi_token_index=c.token("eoi_token_index", 200081),
        )


def check_runnable(config: Llama4Config) -> None:
    """Raises ConfigError for what contradicts itself, or what no Llama 4 computes with and the model would pass over."""
    c, v = config.text_config, config.vision_config
    if c.moe_layers and not 1 <= c.num_experts_per_tok <= c.num_local_experts:
        raise ConfigError(
            f"num_experts_per_tok is {c.num_experts_per_tok}, and there are {c.num_local_experts} experts"
        )
    for name, entries in (("no_rope_layers", c.no_rope_layers), ("layer_types", c.layer_types)):
        if len(entries) < c.num_hidden_layers:
            raise ConfigError(f"{name} has {len(entries)} entries for num_hidden_layers = {c.num_hidden_layers}")
    if c.head_dim % 2:
        raise ConfigError(f"head_dim ({c.head_dim}) must be even: RoPE rotates pairs")
    if c.num_attention_heads % c.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads ({c.num_attention_heads}) must be a multiple of num_key_value_heads"
            f" ({c.num_key_value_heads})"
        )
    if c.hidden_act != _HIDDEN_ACT or c.attention_bias:
        raise ConfigError(
            f"hidden_act is {c.hidden_act!r} and attention_bias {c.attention_bias}: Llama 4 has silu and none"
        )
    for kind in c.layer_types:
        if kind not in ("chunked_attention", "full_attention"):
            raise ConfigError(f"layer_types has {kind!r:.40}: Llama 4 has chunked_attention and full_attention")
    if v is None:
        return
    if v.hidden_size % v.num_attention_heads or v.hidden_size // v.num_attention_heads % 4:
        raise ConfigError(
            f"vision_config: hidden_size / num_attention_heads ({v.hidden_size} / {v.num_attention_heads}) must be a multiple"
            " of 4: 2-D RoPE rotates pairs on two axes"
        )
    if v.hidden_act != _VISION_HIDDEN_ACT:
        raise ConfigError(f"vision_config.hidden_act is {v.hidden_act!r:.40}: Llama 4 has gelu")
    if v.patches_a_side * v.pixel_shuffle_ratio % 1 > 1e-6:
        raise ConfigError(f"vision_config.pixel_shuffle_ratio does not divide {v.patches_a_side} patches a side")
