"""What a model takes of a GPU: its weights, its KV cache and its activations, in bytes, from sizes alone.

docs/fit.md has the formulas in words, and their arithmetic for Scout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from llama4.geometry import Geometry

if TYPE_CHECKING:
    from quant.recipe import Recipe

BF16 = 2
BLOCK = 16  # tokens; runtimes reserve whole blocks
FAMILIES = ("routed_experts", "shared_expert", "dense_mlp")
_LOGITS = 4 * 3  # bytes of a logit: float32, its probability, and a sorted copy for top-p
_TILES = 17  # of a picture: 16 and the whole, which is what Llama 4's processor makes of the largest


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has, by what recipes and tensor parallelism tell apart."""

    routed_experts: int
    shared_expert: int
    dense_mlp: int
    keys_values: int  # the projections of keys and values
    replicated: int  # routers, norms, embeddings of positions
    other: int

    @property
    def total(self) -> int:
        return (
            self.routed_experts + self.shared_expert + self.dense_mlp + self.keys_values + self.replicated + self.other
        )


def parameters(geometry: Geometry) -> Parameters:
    """Counts from the geometry alone, which must be complete. Raises ValueError where a size is still open."""
    g = geometry
    if g.vocab_size is None or g.n_experts is None or g.expert_dim is None or g.dense_dim is None:
        raise ValueError("the geometry is incomplete: fill it in from the tensors first")
    n_moe = len(g.moe_layers)
    other = 2 * g.vocab_size * g.dim + g.n_layers * 2 * g.dim * g.n_heads * g.head_dim
    replicated = g.dim + g.n_layers * 2 * g.dim + n_moe * g.dim * g.n_experts
    if (v := g.vision) is not None:
        # Attention and MLP have biases; a block has two norms, the tower two more, each with a bias.
        block = 4 * (v.dim * v.dim + v.dim) + 2 * v.dim * v.mlp_dim + v.mlp_dim + v.dim
        adapter = (v.shuffled_dim + v.output_dim) * v.output_dim
        other += v.patch_dim * v.dim + v.n_layers * block + adapter + v.output_dim * g.dim
        replicated += (1 + v.n_patches + 1) * v.dim + (v.n_layers + 1) * 4 * v.dim
    expert = 3 * g.dim * g.expert_dim
    return Parameters(
        routed_experts=n_moe * g.n_experts * expert,
        shared_expert=n_moe * expert,
        dense_mlp=(g.n_layers - n_moe) * 3 * g.dim * g.dense_dim,
        keys_values=g.n_layers * 2 * g.dim * g.n_kv_heads * g.head_dim,
        replicated=replicated,
        other=other,
    )


_KINDS = (
    ("other", re.compile(r"vision_model\.(?!.*(norm|embedding))|multi_modal_projector")),
    ("routed_experts", re.compile(r"\.feed_forward\.experts\.")),
    ("shared_expert", re.compile(r"\.feed_forward\.shared_expert\.")),
    ("replicated", re.compile(r"\.feed_forward\.router\.|norm|class_embedding|positional_embedding")),
    ("dense_mlp", re.compile(r"\.feed_forward\.")),
    ("keys_values", re.compile(r"\.self_attn\.[kv]_proj\.")),
)


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights, of the kinds that `Parameters` counts."""

    routed_experts: int = 0
    shared_expert: int = 0
    dense_mlp: int = 0
    keys_values: int = 0
    replicated: int = 0
    other: int = 0

    @staticmethod
    def of(tensors: Iterable[tuple[str, int]]) -> Weights:
        """From (name in Transformers' layout, bytes) of every tensor."""
        found = dict.fromkeys(Weights.__dataclass_fields__, 0)
        for name, nbytes in tensors:
            found[next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")] += nbytes
        return Weights(**found)

    @staticmethod
    def of_geometry(geometry: Geometry) -> Weights:
        """All of them in bf16. Raises ValueError where a size is still open."""
        return Weights(**{kind: n * BF16 for kind, n in vars(parameters(geometry)).items()})

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def of_tensor_parallel(self, n_gpus: int, n_kv_heads: int) -> int:
        """Bytes on one of `n_gpus`: GPUs beyond the KV heads hold copies of theirs, and all hold what is replicated."""
        shared = self.routed_experts + self.shared_expert + self.dense_mlp + self.other
        return -(-shared // n_gpus) + -(-self.keys_values // min(n_gpus, n_kv_heads)) + self.replicated

    def of_whole_layers(self, n_gpus: int, geometry: Geometry) -> int:
        """Bytes on the fullest of `n_gpus` that share out whole layers: at most one layer more than an even share."""
        if n_gpus == 1:
            return self.total
        n_moe = len(geometry.moe_layers)
        moe = (self.routed_experts + self.shared_expert) // max(1, n_moe)
        dense = self.dense_mlp // max(1, geometry.n_layers - n_moe)
        attention = 2 * geometry.dim * (geometry.n_heads + geometry.n_kv_heads) * geometry.head_dim * BF16
        return min(self.total, -(-self.total // n_gpus) + max(moe, dense) + attention)

    def quantized(self, geometry: Geometry, recipe: Recipe) -> Weights:
        """What `recipe` makes of weights that are not quantized yet, to the byte. Raises ValueError where widths do not suit."""
        counts = parameters(geometry)
        sizes: dict[str, int] = {}
        for family in FAMILIES:
            taken, made = _quantized(geometry, family, recipe)
            total = getattr(counts, family)
            sizes[family] = made + (getattr(self, family) * (total - taken) // total if total else 0)
        return replace(self, **sizes)


def _quantized(geometry: Geometry, family: str, recipe: Recipe) -> tuple[int, int]:
    """(numbers that the recipe quantizes in the family, bytes that they become)."""
    from llama4_convert.checkpoints.tensors import ITEM_SIZES
    from quant.encoders import encoder_for
    from quant.recipe import Scheme

    g = geometry
    width = (g.dense_dim if family == "dense_mlp" else g.expert_dim) or 0
    known: dict[Scheme, int] = {}

    def nbytes(scheme: Scheme) -> int:
        if scheme not in known:
            encoder = encoder_for(scheme)
            pairs = ((width, g.dim), (width, g.dim), (g.dim, width))  # gate, up, down
            outputs = [output for n, k in pairs for output in encoder.outputs(n, k)]
            known[scheme] = sum(prod(output.shape) * ITEM_SIZES[output.dtype] for output in outputs)
        return known[scheme]

    taken = made = 0
    for layer in range(g.n_layers):
        if g.is_moe(layer) == (family == "dense_mlp"):
            continue
        for expert in range(g.n_experts or 0) if family == "routed_experts" else (None,):
            scheme = recipe.scheme(family, layer, g.n_layers, expert)
            if scheme is not None:
                taken += 3 * g.dim * width
                made += nbytes(scheme)
    return taken, made


@dataclass(frozen=True)
class KVCache:
    """The KV cache of one GPU. A full layer keeps every token of a sequence, a chunked one at most a chunk of them."""

    token_bytes: int  # of one token in one layer
    full_layers: int
    chunked_layers: int
    chunk: int  # tokens
    piece: int  # tokens behind the chunk that the runtime keeps as well, once for all sequences

    def nbytes(self, context: int, sequences: int = 1) -> int:
        """For `sequences` of `context` tokens each."""
        tokens = sequences * self.full_layers * _blocks(context)
        if self.chunked_layers:
            behind = min(self.piece, max(0, context - self.chunk))
            tokens += self.chunked_layers * (sequences * _blocks(min(context, self.chunk)) + _blocks(behind))
        return self.token_bytes * tokens


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK


def chunked_layers(geometry: Geometry) -> int:
    return sum(geometry.is_chunked(layer) for layer in range(geometry.n_layers))


def kv_bytes(geometry: Geometry, n_gpus: int = 1, element: int = BF16) -> int:
    """Bytes of a token in a layer on one of `n_gpus`, which share KV heads; more of them than heads hold copies."""
    return 2 * -(-geometry.n_kv_heads // n_gpus) * geometry.head_dim * element


def grouped_layers(full: int, chunked: int) -> tuple[int, int]:
    """(full, chunked) layers that vLLM's hybrid KV cache stores: groups of one size, filled up with layers that are none.

    The size is the smaller of the two counts, or the larger if that is less than 1.5 times as much
    (`_get_kv_cache_groups_uniform_page_size` in vLLM's kv_cache_utils.py).
    """
    if not full or not chunked:
        return full, chunked
    least, most = sorted((full, chunked))
    size = most if most < 1.5 * least else least
    return -(-full // size) * size, -(-chunked // size) * size


def prefill_bytes(geometry: Geometry, tokens: int, batch: int, n_gpus: int) -> int:
    """What activations of a serving runtime take: a piece of a prompt of `tokens`, a picture, and `batch` rows of logits.

    Counted in bf16 as if all of a layer's activations lived at once; widths that tensor parallelism splits are one GPU's.
    """
    g = geometry
    attention = 2 * (g.n_heads + g.n_kv_heads) * g.head_dim // n_gpus
    # Gate and up, their product; of routed experts the scaled input and the output as well.
    moe = g.top_k * (3 * (g.expert_dim or 0) // n_gpus + 2 * g.dim) + 3 * (g.expert_dim or 0) // n_gpus + g.dim
    dense = 3 * (g.dense_dim or 0) // n_gpus + g.dim
    n_moe = len(g.moe_layers)
    width = 3 * g.dim + attention + max(moe if n_moe else 0, dense if n_moe < g.n_layers else 0)
    picture = 0
    if (v := g.vision) is not None:
        picture = _TILES * (v.n_patches + 1) * (4 * v.dim + v.mlp_dim)
    return (tokens * width + picture) * BF16 + batch * (g.vocab_size or 0) * _LOGITS


def all_experts_bytes(geometry: Geometry) -> int:
    """Activations of one token where every expert runs on every token: input, scaled input, output; gate, up, their product."""
    g = geometry
    return max(1, g.n_experts or 0) * 3 * (g.dim + (g.expert_dim or g.dense_dim or 0)) * BF16


def repeated_kv_bytes(geometry: Geometry) -> int:
    """Bytes a token of context that Transformers' attention takes beside the cache, in one layer at a time.

    A piece of a prompt behind others has a mask, and with one, keys and values are repeated for every query head
    (sdpa_attention.py: `repeat_kv` unless `use_gqa_in_sdpa`). Where heads need no repeating, growing the cache copies keys.
    """
    g = geometry
    heads = 2 * g.n_heads if g.n_heads > g.n_kv_heads else g.n_kv_heads
    return heads * g.head_dim * BF16
