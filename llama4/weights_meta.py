"""Meta's layout bound by hand: which keys hold a logical tensor, and how the parts of the ranks join."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from llama4.geometry import Geometry
from llama4.weights import Bits, LogicalTensors, TensorReader, first_key

_VISION_LAYER = "vision_embeddings.vision_encoder.transformer.resblocks."


def logical_tensors(ranks: Sequence[TensorReader], g: Geometry) -> LogicalTensors:
    """Every logical tensor of a checkpoint of any number of ranks, in model order."""
    keys = ranks[0].keys()

    def whole(key: str) -> Callable[[], Bits]:
        return partial(ranks[0].read, key)

    def joined(key: str, axis: int) -> Callable[[], Bits]:
        return lambda: np.concatenate([rank.read(key) for rank in ranks], axis)

    def block(key: str, index: int, sizes: Sequence[int]) -> Callable[[], Bits]:
        """Rows `index` of the blocks that every rank stacks on its dimension 0; `sizes` are the full model's."""
        local = [size // len(ranks) for size in sizes]
        start = sum(local[:index])
        return lambda: np.concatenate([rank.read(key, (start, start + local[index])) for rank in ranks])

    yield "tok_embeddings", joined("tok_embeddings.weight", 0)
    for layer in range(g.n_layers):
        at = f"layers.{layer}."
        attention, ffn = f"{at}attention.", f"{at}feed_forward."
        yield (
            f"{at}attention_norm",
            whole(first_key(keys, f"{attention}wqkv.layer_norm_weight", f"{at}attention_norm.weight")),
        )
        heads = [g.n_heads * g.head_dim, g.n_kv_heads * g.head_dim, g.n_kv_heads * g.head_dim]
        for i, name in enumerate("qkv"):
            fused = f"{attention}wqkv.weight"
            yield (
                f"{attention}{name}",
                block(fused, i, heads) if fused in keys else joined(f"{attention}w{name}.weight", 0),
            )
        yield f"{attention}o", joined(f"{attention}wo.weight", 1)
        norms = (f"{ffn}norm.weight", f"{ffn}mlp.layer_norm_weight", f"{at}ffn_norm.weight")
        yield f"{at}ffn_norm", whole(first_key(keys, *norms))
        if g.is_moe(layer):
            yield from _experts(ranks, g, ffn)
            for name, published, module in (
                ("gate", "w_in_shared_FD", "w1"),
                ("up", "w_swiglu_FD", "w3"),
                ("down", "w_out_shared_DF", "w2"),
            ):
                key = first_key(keys, f"{ffn}{published}.weight", f"{ffn}shared_expert.{module}.weight")
                yield f"{ffn}shared.{name}", joined(key, int(name == "down"))
        else:
            for i, (name, module) in enumerate((("gate", "w1"), ("up", "w3"))):
                fused, width = f"{ffn}mlp.fc1_weight", g.dense_dim or 0
                yield (
                    f"{ffn}{name}",
                    block(fused, i, [width, width]) if fused in keys else joined(f"{ffn}{module}.weight", 0),
                )
            yield f"{ffn}down", joined(first_key(keys, f"{ffn}mlp.fc2_weight", f"{ffn}w2.weight"), 1)
    yield "norm", whole("norm.weight")
    yield "output", joined("output.weight", 0)
    if g.vision:
        yield from _vision(g.vision.n_layers, whole, joined)


def _experts(ranks: Sequence[TensorReader], g: Geometry, ffn: str) -> LogicalTensors:
    keys = ranks[0].keys()
    yield f"{ffn}router", lambda: ranks[0].read(f"{ffn}router_DE").T
    width = (g.expert_dim or 0) // len(ranks)

    def expert(flat: str, stacked: str, rows: int, e: int, axis: int) -> Bits:
        """Expert `e` as [in, out], from the flattened 2-D key or the 3-D one."""
        if flat in keys:
            parts = [rank.read(flat, (e * rows, (e + 1) * rows)) for rank in ranks]
        else:
            parts = [rank.read(stacked, (e, e + 1))[0] for rank in ranks]
        return np.concatenate(parts, axis).T

    for e in range(g.n_experts or 0):
        for name, flat, stacked, rows, axis in (
            ("gate", "moe_w_in_eD_F", "w1", g.dim, 1),
            ("up", "moe_w_swiglu_eD_F", "w3", g.dim, 1),
            ("down", "moe_w_out_eF_D", "w2", width, 0),
        ):
            load = partial(expert, f"{ffn}experts.{flat}", f"{ffn}experts.{stacked}", rows, e, axis)
            yield f"{ffn}experts.{e}.{name}", load


def _vision(
    n_layers: int, whole: Callable[[str], Callable[[], Bits]], joined: Callable[[str, int], Callable[[], Bits]]
) -> LogicalTensors:
    encoder = "vision_embeddings.vision_encoder."
    yield "vision.class_embedding", whole(f"{encoder}class_embedding")
    yield "vision.position_embedding", whole(f"{encoder}positional_embedding_vlm")
    yield "vision.patch_embedding", joined(f"{encoder}conv1._linear.weight", 0)
    for norm in ("ln_pre", "ln_post"):
        for kind in ("weight", "bias"):
            yield f"vision.{norm}.{kind}", whole(f"{encoder}{norm}.{kind}")
    for layer in range(n_layers):
        meta, at = f"{_VISION_LAYER}{layer}.", f"vision.layers.{layer}."
        for norm in ("ln_1", "ln_2"):
            for kind in ("weight", "bias"):
                yield f"{at}{norm}.{kind}", whole(f"{meta}{norm}.{kind}")
        for name in ("wq", "wk", "wv"):
            for kind in ("weight", "bias"):
                yield f"{at}{name}.{kind}", joined(f"{meta}attn.{name}.{kind}", 0)
        yield f"{at}wo.weight", joined(f"{meta}attn.wo.weight", 1)
        yield f"{at}wo.bias", whole(f"{meta}attn.wo.bias")
        for kind in ("weight", "bias"):
            yield f"{at}c_fc.{kind}", joined(f"{meta}mlp.c_fc.{kind}", 0)
        yield f"{at}c_proj.weight", joined(f"{meta}mlp.c_proj.weight", 1)
        yield f"{at}c_proj.bias", whole(f"{meta}mlp.c_proj.bias")
    yield "vision.adapter.c_fc", joined("vision_embeddings.vision_adapter.mlp.c_fc.weight", 0)
    yield "vision.adapter.c_proj", joined("vision_embeddings.vision_adapter.mlp.c_proj.weight", 1)
    yield "vision.projection", joined("vision_projection.weight", 0)
