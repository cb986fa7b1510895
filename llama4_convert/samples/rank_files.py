"""Rank files of the demo's model: the tensors of a published base model's, made of logical tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llama4.config import Llama4Config

if TYPE_CHECKING:
    from torch import Tensor

RANKS = 2


def rank_tensors(config: Llama4Config, weights: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What one rank's file of a published base model holds, from logical tensors."""
    import torch

    out: dict[str, Tensor] = {}

    def put(key: str, axis: int | None, *names: str, transposed: bool = False) -> None:
        """The rank's parts of logical tensors along `axis` (None: all of them), joined along the first."""
        parts = [weights[name] if axis is None else weights[name].chunk(RANKS, axis)[rank] for name in names]
        # A copy: a view would be saved with all that it is a view of.
        out[key] = torch.cat([part.T if transposed else part for part in parts])

    text, vision = config.text_config, config.vision_config
    assert vision
    put("tok_embeddings.weight", 0, "tok_embeddings")
    for layer in range(text.num_hidden_layers):
        at = f"layers.{layer}."
        ffn = f"{at}feed_forward."
        put(f"{at}attention.wqkv.layer_norm_weight", None, f"{at}attention_norm")
        put(f"{at}attention.wqkv.weight", 0, *(f"{at}attention.{x}" for x in "qkv"))
        put(f"{at}attention.wo.weight", 1, f"{at}attention.o")
        if not text.is_moe(layer):
            put(f"{ffn}mlp.layer_norm_weight", None, f"{at}ffn_norm")
            put(f"{ffn}mlp.fc1_weight", 0, f"{ffn}gate", f"{ffn}up")
            put(f"{ffn}mlp.fc2_weight", 1, f"{ffn}down")
            continue
        put(f"{ffn}norm.weight", None, f"{at}ffn_norm")
        put(f"{ffn}router_DE", None, f"{ffn}router", transposed=True)
        for key, name, axis in (("w_in_eD_F", "gate", 0), ("w_swiglu_eD_F", "up", 0), ("w_out_eF_D", "down", 1)):
            experts = [f"{ffn}experts.{e}.{name}" for e in range(text.num_local_experts)]
            put(f"{ffn}experts.moe_{key}", axis, *experts, transposed=True)
        put(f"{ffn}w_in_shared_FD.weight", 0, f"{ffn}shared.gate")
        put(f"{ffn}w_swiglu_FD.weight", 0, f"{ffn}shared.up")
        put(f"{ffn}w_out_shared_DF.weight", 1, f"{ffn}shared.down")
        # Base models carry the router's statistics, and nothing reads them.
        sizes = {"expert_activation_DE": text.hidden_size, "global_gate_stats_3E": 3, "running_gate_stats_3E": 3}
        for key, height in sizes.items():
            out[f"{ffn}{key}"] = torch.zeros(height, text.num_local_experts, dtype=torch.bfloat16)
    put("norm.weight", None, "norm")
    put("output.weight", 0, "output")

    encoder = "vision_embeddings.vision_encoder."
    put(f"{encoder}class_embedding", None, "vision.class_embedding")
    put(f"{encoder}positional_embedding_vlm", None, "vision.position_embedding")
    put(f"{encoder}conv1._linear.weight", 0, "vision.patch_embedding")
    for layer in range(vision.num_hidden_layers):
        at, block = f"vision.layers.{layer}.", f"{encoder}transformer.resblocks.{layer}."
        for norm in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            put(f"{block}{norm}", None, f"{at}{norm}")
        for place, name in (("attn.", "wq"), ("attn.", "wk"), ("attn.", "wv"), ("mlp.", "c_fc")):
            put(f"{block}{place}{name}.weight", 0, f"{at}{name}.weight")
            put(f"{block}{place}{name}.bias", 0, f"{at}{name}.bias")
        for place, name in (("attn.", "wo"), ("mlp.", "c_proj")):
            put(f"{block}{place}{name}.weight", 1, f"{at}{name}.weight")
            put(f"{block}{place}{name}.bias", None, f"{at}{name}.bias")
    for norm in ("ln_pre.weight", "ln_pre.bias", "ln_post.weight", "ln_post.bias"):
        put(f"{encoder}{norm}", None, f"vision.{norm}")
    put("vision_embeddings.vision_adapter.mlp.c_fc.weight", 0, "vision.adapter.c_fc")
    put("vision_embeddings.vision_adapter.mlp.c_proj.weight", 1, "vision.adapter.c_proj")
    put("vision_projection.weight", 0, "vision.projection")
    return out
