"""The geometries of the published models, from the params.json that they come with."""

from __future__ import annotations

from dataclasses import replace

from llama4.geometry import Geometry

VISION = {
    "image_size": {"height": 336, "width": 336},
    "patch_size": {"height": 14, "width": 14},
    "dim": 1408,
    "n_layers": 34,
    "n_heads": 16,
    "mlp_ratio": 4.0,
    "output_dim": 4096,
    "pixel_shuffle_ratio": 0.5,
}


def geometry(experts: int, step: int) -> Geometry:
    return Geometry.from_params(
        {
            "dim": 5120,
            "n_layers": 48,
            "n_heads": 40,
            "n_kv_heads": 8,
            "vocab_size": 202048,
            "multiple_of": 2048,
            "ffn_dim_multiplier": 1.2,
            "ffn_exp": 4.0,
            "nope_layer_interval": 4,
            "attention_chunk_size": 8192,
            "moe_args": {"num_experts": experts, "interleave_moe_layer_step": step},
            "vision_args": VISION,
        }
    )


SCOUT, MAVERICK = geometry(16, 1), geometry(128, 2)
# Guard 4: Scout without its routed experts, and without chunks.
GUARD = replace(SCOUT, n_experts=0, expert_dim=0, dense_dim=8192, chunk_size=None, nope_interval=None)
