"""Transformers' layout bound by hand, fused experts: the same logical tensors as `weights_meta`, in the same order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llama4.geometry import Geometry
from llama4.weights import Bits, LogicalTensors, TensorReader


def logical_tensors(reader: TensorReader, g: Geometry) -> LogicalTensors:
    """Every logical tensor of a directory, in model order."""
    prefix = "language_model." if g.vision else ""

    def load(key: str) -> Callable[[], Bits]:
        return partial(reader.read, key)

    yield "tok_embeddings", load(f"{prefix}model.embed_tokens.weight")
    for layer in range(g.n_layers):
        at, hf = f"layers.{layer}.", f"{prefix}model.layers.{layer}."
        yield f"{at}attention_norm", load(f"{hf}input_layernorm.weight")
        for name in "qkvo":
            yield f"{at}attention.{name}", load(f"{hf}self_attn.{name}_proj.weight")
        yield f"{at}ffn_norm", load(f"{hf}post_attention_layernorm.weight")
        ffn, hf_ffn = f"{at}feed_forward.", f"{hf}feed_forward."
        if g.is_moe(layer):
            yield f"{ffn}router", load(f"{hf_ffn}router.weight")
            yield from _experts(reader, g, ffn, f"{hf_ffn}experts.")
            for name in ("gate", "up", "down"):
                yield f"{ffn}shared.{name}", load(f"{hf_ffn}shared_expert.{name}_proj.weight")
        else:
            for name in ("gate", "up", "down"):
                yield f"{ffn}{name}", load(f"{hf_ffn}{name}_proj.weight")
    yield "norm", load(f"{prefix}model.norm.weight")
    yield "output", load(f"{prefix}lm_head.weight")
    if g.vision:
        yield from _vision(g.vision.n_layers, load)


def _experts(reader: TensorReader, g: Geometry, ffn: str, hf: str) -> LogicalTensors:
    def half(e: int, index: int) -> Bits:
        gate_up: Bits = reader.read(f"{hf}gate_up_proj", (e, e + 1))[0]  # [in, gate | up]
        width = gate_up.shape[1] // 2
        columns: Bits = gate_up[:, index * width : (index + 1) * width]
        return columns.T

    def down(e: int) -> Bits:
        matrix: Bits = reader.read(f"{hf}down_proj", (e, e + 1))[0]
        return matrix.T

    for e in range(g.n_experts or 0):
        yield f"{ffn}experts.{e}.gate", partial(half, e, 0)
        yield f"{ffn}experts.{e}.up", partial(half, e, 1)
        yield f"{ffn}experts.{e}.down", partial(down, e)


def _vision(n_layers: int, load: Callable[[str], Callable[[], Bits]]) -> LogicalTensors:
    yield "vision.class_embedding", load("vision_model.class_embedding")
    yield "vision.position_embedding", load("vision_model.positional_embedding_vlm")
    yield "vision.patch_embedding", load("vision_model.patch_embedding.linear.weight")
    for norm, hf_norm in (("ln_pre", "layernorm_pre"), ("ln_post", "layernorm_post")):
        for kind in ("weight", "bias"):
            yield f"vision.{norm}.{kind}", load(f"vision_model.{hf_norm}.{kind}")
    for layer in range(n_layers):
        at, hf = f"vision.layers.{layer}.", f"vision_model.model.layers.{layer}."
        for name, hf_name in (
            *(("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm")),
            *((f"w{x}", f"self_attn.{x}_proj") for x in "qkvo"),
            *(("c_fc", "mlp.fc1"), ("c_proj", "mlp.fc2")),
        ):
            for kind in ("weight", "bias"):
                yield f"{at}{name}.{kind}", load(f"{hf}{hf_name}.{kind}")
    yield "vision.adapter.c_fc", load("vision_model.vision_adapter.mlp.fc1.weight")
    yield "vision.adapter.c_proj", load("vision_model.vision_adapter.mlp.fc2.weight")
    yield "vision.projection", load("multi_modal_projector.linear_1.weight")
