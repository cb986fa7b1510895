"""What a model takes of a GPU: its weights, its KV cache and its activations, in bytes, from sizes alone.

docs/fit.md has the formulas in words, and their arithmetic for Scout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import prod

from msgspec import structs

from llama4.geometry import Geometry
from llama4_convert.checkpoints.families import matrix_family_of
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.fitting.results import FamilySizes
from quant.recipe import FAMILIES, Recipe, Scheme

BF16_BYTES = 2
BLOCK_TOKENS = 16  # runtimes reserve KV cache in whole blocks
_LOGIT_BYTES = 4 * 3  # float32, its probability, and a sorted copy for top-p
_TILES = 17  # of a picture: 16 and the whole, which is what Llama 4's processor makes of the largest


def parameters(geometry: Geometry) -> FamilySizes:
    """The number of parameters by family, from the geometry alone. Raises ValueError where a size of it is None."""
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
    return FamilySizes(
        routed_experts=n_moe * g.n_experts * expert,
        shared_expert=n_moe * expert,
        dense_mlp=(g.n_layers - n_moe) * 3 * g.dim * g.dense_dim,
        keys_values=g.n_layers * 2 * g.dim * g.n_kv_heads * g.head_dim,
        replicated=replicated,
        other=other,
    )


class Weights(FamilySizes, frozen=True):
    """Bytes of a model's weights."""

    @staticmethod
    def from_tensors(tensors: Iterable[tuple[str, int]]) -> Weights:
        """From (key in Transformers' layout, bytes) of every tensor."""
        found: dict[str, int] = dict.fromkeys(Weights.__struct_fields__, 0)
        for key, nbytes in tensors:
            found[_field(key)] += nbytes
        return Weights(**found)

    @staticmethod
    def from_geometry(geometry: Geometry) -> Weights:
        """All of them in bf16. Raises ValueError where a size of the geometry is None."""
        return Weights(*(n * BF16_BYTES for n in structs.astuple(parameters(geometry))))

    def split_by_tensors(self, n_gpus: int, n_kv_heads: int) -> int:
        """Bytes on one of `n_gpus`: GPUs beyond the KV heads hold copies of their projections, and all hold `replicated`."""
        shared = self.routed_experts + self.shared_expert + self.dense_mlp + self.other
        return -(-shared // n_gpus) + -(-self.keys_values // min(n_gpus, n_kv_heads)) + self.replicated

    def split_by_layers(self, n_gpus: int, geometry: Geometry) -> int:
        """Bytes on the fullest of `n_gpus` that share out whole layers: at most one layer more than an even share."""
        if n_gpus == 1:
            return self.total
        n_moe = len(geometry.moe_layers)
        moe = (self.routed_experts + self.shared_expert) // max(1, n_moe)
        dense = self.dense_mlp // max(1, geometry.n_layers - n_moe)
        attention = 2 * geometry.dim * (geometry.n_heads + geometry.n_kv_heads) * geometry.head_dim * BF16_BYTES
        return min(self.total, -(-self.total // n_gpus) + max(moe, dense) + attention)

    def quantized(self, geometry: Geometry, recipe: Recipe) -> Weights:
        """The bytes of these weights, not quantized yet, after `recipe`. Raises ValueError where widths do not suit a scheme."""
        counts = parameters(geometry)
        sizes: dict[str, int] = {}
        for family in FAMILIES:
            quantized, nbytes = _quantized_share(geometry, family, recipe)
            total = getattr(counts, family)
            sizes[family] = nbytes + (getattr(self, family) * (total - quantized) // total if total else 0)
        return structs.replace(self, **sizes)


def _field(key: str) -> str:
    """The field of `FamilySizes` that counts a tensor."""
    family = matrix_family_of(key)
    if family in FAMILIES:
        return family
    if family == "attention" and re.search(r"\.[kv]_proj\.", key):
        return "keys_values"
    if family in ("router", "norms"):
        return "replicated"
    if family == "vision" and re.search(r"norm|class_embedding|positional_embedding", key):
        return "replicated"
    return "other"


def _quantized_share(geometry: Geometry, family: str, recipe: Recipe) -> tuple[int, int]:
    """(parameters of the family that the recipe quantizes, bytes that they become)."""
    width = (geometry.dense_dim if family == "dense_mlp" else geometry.expert_dim) or 0
    parameters = nbytes = 0
    for layer in range(geometry.n_layers):
        if geometry.is_moe(layer) == (family == "dense_mlp"):
            continue
        for expert in range(geometry.n_experts or 0) if family == "routed_experts" else (None,):
            scheme = recipe.scheme(family, layer, geometry.n_layers, expert)
            if scheme is not None:
                parameters += 3 * geometry.dim * width
                nbytes += _mlp_bytes(scheme, geometry.dim, width)
    return parameters, nbytes


@cache
def _mlp_bytes(scheme: Scheme, dim: int, width: int) -> int:
    """Bytes of quantized gate, up and down projections. Raises ValueError where the scheme cannot store these widths."""
    from quant.encoders import encoder_for

    encoder = encoder_for(scheme)
    outputs = [output for n, k in ((width, dim), (width, dim), (dim, width)) for output in encoder.outputs(n, k)]
    return sum(prod(output.shape) * ITEM_SIZES[output.dtype] for output in outputs)


@dataclass(frozen=True)
class KVCache:
    """The KV cache of one GPU. A full layer keeps every token of a sequence, a chunked one at most a chunk of them."""

    token_bytes: int  # of one token in one layer
    full_layers: int
    chunked_layers: int
    chunk_tokens: int
    piece_tokens: int = 0  # behind the chunk, which the runtime keeps as well, once for all sequences

    def nbytes(self, context: int, sequences: int = 1) -> int:
        """For `sequences` of `context` tokens each."""
        tokens = sequences * self.full_layers * _in_blocks(context)
        if self.chunked_layers:
            chunks = sequences * _in_blocks(min(context, self.chunk_tokens))
            tokens += self.chunked_layers * (chunks + _in_blocks(self._piece(context)))
        return self.token_bytes * tokens

    def chunked_share(self, context: int, sequences: int) -> float:
        """Tokens that a chunked layer keeps, as a share of those that a full layer keeps."""
        return (sequences * min(context, self.chunk_tokens) + self._piece(context)) / (sequences * context)

    def _piece(self, context: int) -> int:
        return min(self.piece_tokens, max(0, context - self.chunk_tokens))


def _in_blocks(tokens: int) -> int:
    """Rounded up to whole blocks."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def layer_counts(geometry: Geometry) -> tuple[int, int]:
    """(full, chunked) layers of the model."""
    chunked = sum(geometry.is_chunked(layer) for layer in range(geometry.n_layers))
    return geometry.n_layers - chunked, chunked


def layers_on_fullest_gpu(geometry: Geometry, n_gpus: int, full: int, chunked: int) -> tuple[int, int]:
    """The most of (full, chunked) layers on any of `n_gpus` that hold consecutive layers, at most one beyond an even share."""
    if n_gpus == 1:
        return full, chunked
    layers = min(geometry.n_layers, -(-geometry.n_layers // n_gpus) + 1)
    if not chunked:
        return layers, 0
    interval = geometry.nope_interval or geometry.n_layers + 1
    return min(full, -(-layers // interval)), min(chunked, layers - layers // interval)


def kv_bytes(geometry: Geometry, n_gpus: int = 1, element_bytes: int = BF16_BYTES) -> int:
    """Bytes of a token in a layer on one of `n_gpus`, which share KV heads; more of them than heads hold copies."""
    return 2 * -(-geometry.n_kv_heads // n_gpus) * geometry.head_dim * element_bytes


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
    return (tokens * width + picture) * BF16_BYTES + batch * (g.vocab_size or 0) * _LOGIT_BYTES


def all_experts_bytes(geometry: Geometry) -> int:
    """Activations of one token where every expert runs on every token: input, scaled input, output; gate, up, their product."""
    g = geometry
    return max(1, g.n_experts or 0) * 3 * (g.dim + (g.expert_dim or g.dense_dim or 0)) * BF16_BYTES


def repeated_kv_bytes(geometry: Geometry) -> int:
    """Bytes a token of context that Transformers' attention takes beside the cache, in one layer at a time.

    A piece of a prompt behind others has a mask, and with one, keys and values are repeated for every query head
    (sdpa_attention.py: `repeat_kv` unless `use_gqa_in_sdpa`). Where heads need no repeating, growing the cache copies keys.
    """
    g = geometry
    heads = 2 * g.n_heads if g.n_heads > g.n_kv_heads else g.n_kv_heads
    return heads * g.head_dim * BF16_BYTES
