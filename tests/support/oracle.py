"""The slow, obvious conversion, family by family and by hand: what every fast path is compared with.

It knows neither the mapping tables nor the converter, nor how `meta_model` wrote a file. One spelling after the other,
`torch.cat`, `split` and `transpose`, everything in memory.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_DROPPED = re.compile(
    r".*\._extra_state|rope\.freqs|freq_cis"
    r"|layers\.\d+\.feed_forward\.(global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)"
)


def slow_convert(src: Path, *, text_only: bool = False) -> dict[str, Tensor]:
    """The Transformers tensors of Meta's directory `src`, text under `language_model.` iff there is a vision tower."""
    params = json.loads((src / "params.json").read_text())
    params = params.get("model", params)
    # Published files hold BytesIO objects, which PyTorch's safe unpickler must be told of.
    with torch.serialization.safe_globals([io.BytesIO, codecs.encode]):
        ranks = [torch.load(path, weights_only=True) for path in sorted(src.glob("consolidated.*.pth"))]
    source = _Source(ranks)
    vision = source.has("vision_projection.weight")

    text = _text(source, params)
    seen = _vision(source) if vision else {}
    left = [key for key in source.unread() if not _DROPPED.fullmatch(key)]
    assert not left, f"keys that no line of the oracle reads: {left}"

    if vision and not text_only:
        return {f"language_model.{name}": tensor for name, tensor in text.items()} | seen
    return text


def read_safetensors_dir(dst: Path) -> dict[str, Tensor]:
    """Every tensor of a Transformers directory through its index, which must tell the truth about its files."""
    index = json.loads((dst / "model.safetensors.index.json").read_text())
    weight_map: dict[str, str] = index["weight_map"]
    on_disk = {path.name for path in dst.glob("*.safetensors")}
    assert on_disk == set(weight_map.values()), "the index and the directory name different files"
    tensors: dict[str, Tensor] = {}
    for name in sorted(on_disk):
        with safe_open(dst / name, framework="pt") as file:
            keys = set(file.keys())
            assert keys == {key for key, where in weight_map.items() if where == name}, (
                f"the index is wrong about {name}"
            )
            tensors |= {key: file.get_tensor(key) for key in keys}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == size, "total_size of the index is not the tensors' size"
    return tensors


class _Source:
    """All ranks in memory, and which of their keys have been read."""

    def __init__(self, ranks: list[dict[str, Any]]) -> None:
        assert ranks, "no consolidated.*.pth"
        assert all(rank.keys() == ranks[0].keys() for rank in ranks), "the ranks hold different keys"
        self._ranks = ranks
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        return key in self._ranks[0]

    def each(self, key: str) -> list[Tensor]:
        self._read.add(key)
        return [rank[key].detach() for rank in self._ranks]

    def same(self, key: str) -> Tensor:
        first, *others = self.each(key)
        assert all(torch.equal(first, other) for other in others), f"{key} should be the same in every rank"
        return first

    def cat(self, key: str, dim: int) -> Tensor:
        return torch.cat(self.each(key), dim)

    def unread(self) -> list[str]:
        return [key for key in self._ranks[0] if key not in self._read]


def _text(src: _Source, params: dict[str, Any]) -> dict[str, Tensor]:
    out = {
        "model.embed_tokens.weight": src.cat("tok_embeddings.weight", 0),
        "model.norm.weight": src.same("norm.weight"),
        "lm_head.weight": src.cat("output.weight", 0),
    }
    for layer in range(params["n_layers"]):
        old, new = f"layers.{layer}.", f"model.layers.{layer}."
        out |= {new + name: tensor for name, tensor in _attention(src, old, params).items()}
        if src.has(old + "feed_forward.router_DE"):
            out |= {new + name: tensor for name, tensor in _moe(src, old).items()}
        else:
            out |= {new + name: tensor for name, tensor in _dense(src, old).items()}
    return out


def _attention(src: _Source, old: str, params: dict[str, Any]) -> dict[str, Tensor]:
    out = {}
    if src.has(old + "attention.wqkv.weight"):
        heads, kv_heads = params["n_heads"], params["n_kv_heads"]
        queries, keys, values = [], [], []
        for wqkv in src.each(old + "attention.wqkv.weight"):  # each rank: its queries, then its keys, then its values
            rows = wqkv.shape[0] // (heads + 2 * kv_heads)
            q, k, v = wqkv.split([rows * heads, rows * kv_heads, rows * kv_heads])
            queries.append(q)
            keys.append(k)
            values.append(v)
        out["self_attn.q_proj.weight"] = torch.cat(queries)
        out["self_attn.k_proj.weight"] = torch.cat(keys)
        out["self_attn.v_proj.weight"] = torch.cat(values)
    else:
        out["self_attn.q_proj.weight"] = src.cat(old + "attention.wq.weight", 0)
        out["self_attn.k_proj.weight"] = src.cat(old + "attention.wk.weight", 0)
        out["self_attn.v_proj.weight"] = src.cat(old + "attention.wv.weight", 0)
    out["self_attn.o_proj.weight"] = src.cat(old + "attention.wo.weight", 1)

    if src.has(old + "attention.wqkv.layer_norm_weight"):
        out["input_layernorm.weight"] = src.same(old + "attention.wqkv.layer_norm_weight")
    else:
        out["input_layernorm.weight"] = src.same(old + "attention_norm.weight")

    if src.has(old + "feed_forward.mlp.layer_norm_weight"):
        out["post_attention_layernorm.weight"] = src.same(old + "feed_forward.mlp.layer_norm_weight")
    elif src.has(old + "feed_forward.norm.weight"):
        out["post_attention_layernorm.weight"] = src.same(old + "feed_forward.norm.weight")
    else:
        out["post_attention_layernorm.weight"] = src.same(old + "ffn_norm.weight")
    return out


def _moe(src: _Source, old: str) -> dict[str, Tensor]:
    ffn = old + "feed_forward."
    router_de = src.same(ffn + "router_DE")
    dim, experts = router_de.shape

    if src.has(ffn + "experts.moe_w_in_eD_F"):
        gate = torch.cat([part.reshape(experts, dim, -1) for part in src.each(ffn + "experts.moe_w_in_eD_F")], 2)
    else:
        gate = src.cat(ffn + "experts.w1", 2)
    if src.has(ffn + "experts.moe_w_swiglu_eD_F"):
        up = torch.cat([part.reshape(experts, dim, -1) for part in src.each(ffn + "experts.moe_w_swiglu_eD_F")], 2)
    else:
        up = src.cat(ffn + "experts.w3", 2)
    if src.has(ffn + "experts.moe_w_out_eF_D"):
        down = torch.cat([part.reshape(experts, -1, dim) for part in src.each(ffn + "experts.moe_w_out_eF_D")], 1)
    else:
        down = src.cat(ffn + "experts.w2", 1)

    if src.has(ffn + "w_in_shared_FD.weight"):
        shared_gate = src.cat(ffn + "w_in_shared_FD.weight", 0)
    else:
        shared_gate = src.cat(ffn + "shared_expert.w1.weight", 0)
    if src.has(ffn + "w_swiglu_FD.weight"):
        shared_up = src.cat(ffn + "w_swiglu_FD.weight", 0)
    else:
        shared_up = src.cat(ffn + "shared_expert.w3.weight", 0)
    if src.has(ffn + "w_out_shared_DF.weight"):
        shared_down = src.cat(ffn + "w_out_shared_DF.weight", 1)
    else:
        shared_down = src.cat(ffn + "shared_expert.w2.weight", 1)

    return {
        "feed_forward.router.weight": router_de.transpose(0, 1),
        "feed_forward.experts.gate_up_proj": torch.cat([gate, up], 2),
        "feed_forward.experts.down_proj": down,
        "feed_forward.shared_expert.gate_proj.weight": shared_gate,
        "feed_forward.shared_expert.up_proj.weight": shared_up,
        "feed_forward.shared_expert.down_proj.weight": shared_down,
    }


def _dense(src: _Source, old: str) -> dict[str, Tensor]:
    ffn = old + "feed_forward."
    if src.has(ffn + "mlp.fc1_weight"):  # each rank: its gate rows, then its up rows
        halves = [fc1.split(fc1.shape[0] // 2) for fc1 in src.each(ffn + "mlp.fc1_weight")]
        gate = torch.cat([half[0] for half in halves])
        up = torch.cat([half[1] for half in halves])
    else:
        gate = src.cat(ffn + "w1.weight", 0)
        up = src.cat(ffn + "w3.weight", 0)
    if src.has(ffn + "mlp.fc2_weight"):
        down = src.cat(ffn + "mlp.fc2_weight", 1)
    else:
        down = src.cat(ffn + "w2.weight", 1)
    return {
        "feed_forward.gate_proj.weight": gate,
        "feed_forward.up_proj.weight": up,
        "feed_forward.down_proj.weight": down,
    }


def _vision(src: _Source) -> dict[str, Tensor]:
    encoder, adapter = "vision_embeddings.vision_encoder.", "vision_embeddings.vision_adapter."
    out = {
        "vision_model.class_embedding": src.same(encoder + "class_embedding"),
        "vision_model.positional_embedding_vlm": src.same(encoder + "positional_embedding_vlm"),
        "vision_model.patch_embedding.linear.weight": src.cat(encoder + "conv1._linear.weight", 0),
        "vision_model.layernorm_pre.weight": src.same(encoder + "ln_pre.weight"),
        "vision_model.layernorm_pre.bias": src.same(encoder + "ln_pre.bias"),
        "vision_model.layernorm_post.weight": src.same(encoder + "ln_post.weight"),
        "vision_model.layernorm_post.bias": src.same(encoder + "ln_post.bias"),
        "vision_model.vision_adapter.mlp.fc1.weight": src.cat(adapter + "mlp.c_fc.weight", 0),
        "vision_model.vision_adapter.mlp.fc2.weight": src.cat(adapter + "mlp.c_proj.weight", 1),
        "multi_modal_projector.linear_1.weight": src.cat("vision_projection.weight", 0),
    }
    layer = 0
    while src.has(f"{encoder}transformer.resblocks.{layer}.ln_1.weight"):
        old, new = f"{encoder}transformer.resblocks.{layer}.", f"vision_model.model.layers.{layer}."
        out |= {
            new + "self_attn.q_proj.weight": src.cat(old + "attn.wq.weight", 0),
            new + "self_attn.q_proj.bias": src.cat(old + "attn.wq.bias", 0),
            new + "self_attn.k_proj.weight": src.cat(old + "attn.wk.weight", 0),
            new + "self_attn.k_proj.bias": src.cat(old + "attn.wk.bias", 0),
            new + "self_attn.v_proj.weight": src.cat(old + "attn.wv.weight", 0),
            new + "self_attn.v_proj.bias": src.cat(old + "attn.wv.bias", 0),
            new + "self_attn.o_proj.weight": src.cat(old + "attn.wo.weight", 1),
            new + "self_attn.o_proj.bias": src.same(old + "attn.wo.bias"),
            new + "mlp.fc1.weight": src.cat(old + "mlp.c_fc.weight", 0),
            new + "mlp.fc1.bias": src.cat(old + "mlp.c_fc.bias", 0),
            new + "mlp.fc2.weight": src.cat(old + "mlp.c_proj.weight", 1),
            new + "mlp.fc2.bias": src.same(old + "mlp.c_proj.bias"),
            new + "input_layernorm.weight": src.same(old + "ln_1.weight"),
            new + "input_layernorm.bias": src.same(old + "ln_1.bias"),
            new + "post_attention_layernorm.weight": src.same(old + "ln_2.weight"),
            new + "post_attention_layernorm.bias": src.same(old + "ln_2.bias"),
        }
        layer += 1
    return out
