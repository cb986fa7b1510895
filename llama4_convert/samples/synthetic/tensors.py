"""The tensors of a rank's file: names, shapes and places as in the published checkpoints.

The spelling is the one that the load hooks of llama-models (`llama4/model.py`, `moe.py`, `ffn.py`) undo. The tables are written
from Meta's code alone and share nothing with the mapping that the converter uses, so a test that converts a synthetic checkpoint
compares two readings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llama4.geometry import Geometry, VisionGeometry
from llama4_convert.checkpoints.state_dict_pickle import PthBytes, PthTensor
from llama4_convert.errors import UsageError
from llama4_convert.samples.synthetic.numbers import gaussian

_NORM_STD = 0.1
_BIAS_STD = 0.02
# Transformer Engine leaves a serialized None where it has no FP8 state to keep; loaders must step over it.
_EXTRA_STATE = b"\x80\x02N."


@dataclass(frozen=True)
class Tensor:
    """One entry of every rank's file; `shape` is one rank's, None for a `_extra_state`."""

    key: str
    shape: tuple[int, ...] | None
    std: float = 0.0
    mean: float = 0.0
    split: bool = False  # ranks hold different parts; otherwise copies
    weight: bool = True  # part of the model; otherwise loaders drop it

    @property
    def numel(self) -> int:
        return 0 if self.shape is None else math.prod(self.shape)

    def parameters(self, ranks: int) -> int:
        return self.numel * (ranks if self.split else 1) if self.weight else 0

    def entry(self, dtype: str) -> PthTensor | PthBytes:
        return PthBytes(self.key, _EXTRA_STATE) if self.shape is None else PthTensor(self.key, dtype, self.shape)

    def values(self, dtype: str, seed: int, rank: int) -> Iterator[memoryview]:
        return gaussian(dtype, self.numel, self.mean, self.std, f"{seed} {self.key} {rank if self.split else 'all'}")


def _split(key: str, *shape: int, fan_in: int) -> Tensor:
    return Tensor(key, shape, fan_in**-0.5, split=True)


def _copied(key: str, *shape: int, fan_in: int) -> Tensor:
    return Tensor(key, shape, fan_in**-0.5)


def _norm(key: str, dim: int) -> Tensor:
    return Tensor(key, (dim,), _NORM_STD, mean=1.0)


def _bias(key: str, dim: int, *, split: bool) -> Tensor:
    return Tensor(key, (dim,), _BIAS_STD, split=split)


def _dropped(key: str, *shape: int) -> Tensor:
    return Tensor(key, shape, 1.0, weight=False)


def _extra_state(module: str) -> Tensor:
    return Tensor(f"{module}._extra_state", None)


def tensors_of(geometry: Geometry, ranks: int, *, base: bool) -> list[Tensor]:
    """Every entry of a rank's file, in order; all ranks hold the same entries."""
    g, dim = geometry, geometry.dim
    assert g.vocab_size is not None
    assert g.vision is not None
    plan = [_split("tok_embeddings.weight", g.vocab_size // ranks, dim, fan_in=dim)]
    for layer in range(g.n_layers):
        plan += _attention(g, f"layers.{layer}.attention", ranks)
        if g.is_moe(layer):
            plan += _moe(g, f"layers.{layer}.feed_forward", ranks, base)
        else:
            plan += _dense(g, f"layers.{layer}.feed_forward", ranks)
    plan += [
        _norm("norm.weight", dim),
        _split("output.weight", g.vocab_size // ranks, dim, fan_in=dim),
        _dropped("rope.freqs", g.head_dim // 2),
    ]
    plan += _vision(g.vision, ranks)
    plan.append(_split("vision_projection.weight", dim // ranks, g.vision.output_dim, fan_in=g.vision.output_dim))
    return plan


def _attention(g: Geometry, prefix: str, ranks: int) -> list[Tensor]:
    heads = g.n_heads * g.head_dim
    return [
        _norm(f"{prefix}.wqkv.layer_norm_weight", g.dim),
        # A rank's rows: its query heads, its key heads, its value heads.
        _split(f"{prefix}.wqkv.weight", (g.n_heads + 2 * g.n_kv_heads) * g.head_dim // ranks, g.dim, fan_in=g.dim),
        _extra_state(f"{prefix}.wqkv"),
        _split(f"{prefix}.wo.weight", g.dim, heads // ranks, fan_in=heads),
        _extra_state(f"{prefix}.wo"),
    ]


def _moe(g: Geometry, prefix: str, ranks: int, base: bool) -> list[Tensor]:
    assert g.n_experts is not None
    assert g.expert_dim is not None
    dim, experts, width = g.dim, g.n_experts, g.expert_dim
    statistics = [
        _dropped(f"{prefix}.expert_activation_DE", dim, experts),
        _dropped(f"{prefix}.global_gate_stats_3E", 3, experts),
        _dropped(f"{prefix}.running_gate_stats_3E", 3, experts),
    ]
    return [
        _norm(f"{prefix}.norm.weight", dim),
        _copied(f"{prefix}.router_DE", dim, experts, fan_in=dim),
        # Three axes flattened to two: [experts, dim, width / ranks] and [experts, width / ranks, dim].
        _split(f"{prefix}.experts.moe_w_in_eD_F", experts * dim, width // ranks, fan_in=dim),
        _split(f"{prefix}.experts.moe_w_swiglu_eD_F", experts * dim, width // ranks, fan_in=dim),
        _split(f"{prefix}.experts.moe_w_out_eF_D", experts * (width // ranks), dim, fan_in=width),
        _extra_state(f"{prefix}.experts.mlp"),
        _split(f"{prefix}.w_in_shared_FD.weight", width // ranks, dim, fan_in=dim),
        _split(f"{prefix}.w_swiglu_FD.weight", width // ranks, dim, fan_in=dim),
        _split(f"{prefix}.w_out_shared_DF.weight", dim, width // ranks, fan_in=width),
        _extra_state(f"{prefix}.mlp_shared"),
        *(statistics if base else []),
    ]


def _dense(g: Geometry, prefix: str, ranks: int) -> list[Tensor]:
    assert g.dense_dim is not None
    return [
        _norm(f"{prefix}.mlp.layer_norm_weight", g.dim),
        # A rank's rows: its part of the gate, then its part of the up projection.
        _split(f"{prefix}.mlp.fc1_weight", 2 * (g.dense_dim // ranks), g.dim, fan_in=g.dim),
        _split(f"{prefix}.mlp.fc2_weight", g.dim, g.dense_dim // ranks, fan_in=g.dense_dim),
    ]


def _vision(v: VisionGeometry, ranks: int) -> list[Tensor]:
    dim, encoder = v.dim, "vision_embeddings.vision_encoder"
    plan = [
        _copied(f"{encoder}.class_embedding", dim, fan_in=dim),
        _copied(f"{encoder}.positional_embedding_vlm", v.n_patches + 1, dim, fan_in=dim),
        _split(f"{encoder}.conv1._linear.weight", dim // ranks, v.patch_dim, fan_in=v.patch_dim),
    ]
    for layer in range(v.n_layers):
        block = f"{encoder}.transformer.resblocks.{layer}"
        for projection in ("wq", "wk", "wv"):
            plan.append(_split(f"{block}.attn.{projection}.weight", dim // ranks, dim, fan_in=dim))
            plan.append(_bias(f"{block}.attn.{projection}.bias", dim // ranks, split=True))
        plan += [
            _split(f"{block}.attn.wo.weight", dim, dim // ranks, fan_in=dim),
            _bias(f"{block}.attn.wo.bias", dim, split=False),
            _split(f"{block}.mlp.c_fc.weight", v.mlp_dim // ranks, dim, fan_in=dim),
            _bias(f"{block}.mlp.c_fc.bias", v.mlp_dim // ranks, split=True),
            _split(f"{block}.mlp.c_proj.weight", dim, v.mlp_dim // ranks, fan_in=v.mlp_dim),
            _bias(f"{block}.mlp.c_proj.bias", dim, split=False),
        ]
        for norm in ("ln_1", "ln_2"):
            plan += [_norm(f"{block}.{norm}.weight", dim), _bias(f"{block}.{norm}.bias", dim, split=False)]
    for norm in ("ln_pre", "ln_post"):
        plan += [_norm(f"{encoder}.{norm}.weight", dim), _bias(f"{encoder}.{norm}.bias", dim, split=False)]
    adapter, out = "vision_embeddings.vision_adapter.mlp", v.output_dim
    return [
        *plan,
        _split(f"{adapter}.c_fc.weight", out // ranks, v.shuffled_dim, fan_in=v.shuffled_dim),
        _split(f"{adapter}.c_proj.weight", out, out // ranks, fan_in=out),
    ]


def check_ranks(g: Geometry, ranks: int) -> None:
    assert g.vision is not None
    sizes: dict[str, int | None] = {
        "n_heads": g.n_heads,
        "n_kv_heads": g.n_kv_heads,
        "dim": g.dim,
        "vocab_size": g.vocab_size,
        "the expert width": g.expert_dim if g.moe_layers else None,
        "the dense width": g.dense_dim if len(g.moe_layers) < g.n_layers else None,
        "vision n_heads": g.vision.n_heads,
        "the vision MLP width": g.vision.mlp_dim,
        "vision output_dim": g.vision.output_dim,
    }
    known = {name: size for name, size in sizes.items() if size is not None}
    common = math.gcd(*known.values())
    for name, size in known.items():
        if ranks < 1 or size % ranks:
            choices = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise UsageError(f"{ranks} ranks do not divide {name} ({size}): choose one of {choices}")
