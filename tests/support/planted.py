"""Faults as converters make them, planted in the tensors of a Transformers directory, each with its kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Damage = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fault:
    """`change` damages the tensors of these keys; each is then wrong in the way `kind`."""

    kind: str
    name: str
    keys: tuple[str, ...]
    change: Callable[[Tensors, tuple[str, ...]], None]


# -------------------- one tensor


def flip_bit(bit: int) -> Damage:
    def flipped(tensor: Tensor) -> Tensor:
        width = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
        bits = tensor.clone().contiguous().view(width)
        at = bits.numel() * 5 // 7
        top = bit == 8 * tensor.dtype.itemsize - 1
        bits.view(-1)[at] ^= torch.iinfo(width).min if top else 1 << bit
        return bits.view(tensor.dtype)

    return flipped


def parts(n: int, dim: int, order: Sequence[int | None]) -> Damage:
    """n ranks' parts in this order; None for zeros."""

    def arranged(tensor: Tensor) -> Tensor:
        blocks = tensor.chunk(n, dim)
        assert len(blocks) == n
        return torch.cat([torch.zeros_like(blocks[0]) if i is None else blocks[i] for i in order], dim)

    return arranged


def halves_exchanged(dim: int) -> Damage:
    return parts(2, dim, [1, 0])


def first_half_repeated(dim: int) -> Damage:
    """As if one rank of two had been read twice."""
    return parts(2, dim, [0, 0])


def half_rotation(head_dim: int) -> Damage:
    """What converters of earlier Llamas do to q and k."""

    def permuted(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    return permuted


def interleaved_pairs(head_dim: int) -> Damage:
    def permuted(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    return permuted


def heads(n: int, order: Callable[[list[int]], Sequence[int]], dim: int = 0) -> Damage:
    return lambda tensor: parts(n, dim, order(list(range(n))))(tensor)


def exchanged(i: int, j: int) -> Callable[[list[int]], list[int]]:
    def order(n: list[int]) -> list[int]:
        n[i], n[j] = n[j], n[i]
        return n

    return order


def transposed(tensor: Tensor) -> Tensor:
    """Under the same shape."""
    return tensor.transpose(-1, -2).reshape(tensor.shape)


def transposed_back(tensor: Tensor) -> Tensor:
    return tensor.reshape(*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]).transpose(-1, -2)


def turned(tensor: Tensor) -> Tensor:
    """Shape and numbers."""
    return tensor.transpose(-1, -2)


def columns_as_rows(n: int) -> Damage:
    """n ranks' columns joined on the axis of the rows, seen in the right shape."""
    return lambda tensor: torch.cat(tensor.chunk(n, -1), -2).reshape(tensor.shape)


def rows_as_columns(n: int) -> Damage:
    return lambda tensor: torch.cat(tensor.chunk(n, -2), -1).reshape(tensor.shape)


def inputs_before_experts(tensor: Tensor) -> Tensor:
    """[experts * in, out] taken for [in, experts, out]."""
    experts, inputs, outputs = tensor.shape
    return tensor.reshape(inputs, experts, outputs).transpose(0, 1)


def adapter_merged(tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    down, up = (torch.randn(n, 4, generator=generator) for n in tensor.shape)
    return tensor + tensor.float().std() * 0.1 * down @ up.T


def put(value: float, *index: Any) -> Damage:
    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return changed


def through(dtype: torch.dtype) -> Damage:
    return lambda tensor: tensor.to(dtype).to(tensor.dtype)


def bytes_swapped(tensor: Tensor) -> Tensor:
    raw = tensor.contiguous().view(torch.uint8).reshape(*tensor.shape, tensor.dtype.itemsize)
    return raw.flip(-1).contiguous().reshape(*tensor.shape[:-1], -1).view(tensor.dtype)


def read_as_float16(tensor: Tensor) -> Tensor:
    assert tensor.dtype == torch.bfloat16
    return tensor.view(torch.float16).to(torch.bfloat16)


def noise(size: float) -> Damage:
    def noisy(tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return tensor + size * tensor.float().std() * torch.randn(tensor.shape, generator=generator)

    return noisy


def random_again(tensor: Tensor) -> Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(6)) * 0.02


def by_rows(tensor: Tensor) -> Tensor:
    return tensor * torch.linspace(0.5, 2, tensor.shape[0])[:, None]


def by_columns(tensor: Tensor) -> Tensor:
    return tensor * torch.linspace(0.5, 2, tensor.shape[1])[None]


def by_both(tensor: Tensor) -> Tensor:
    """Each row has the factor that the column of its number should have."""
    factors = torch.rand(max(tensor.shape), generator=torch.Generator().manual_seed(7)) + 0.5
    return tensor * factors[: tensor.shape[0], None] / factors[None, : tensor.shape[1]]


def by_groups(size: int) -> Damage:
    def scaled(tensor: Tensor) -> Tensor:
        factors = torch.rand(tensor.shape[0], tensor.shape[1] // size, generator=torch.Generator().manual_seed(8)) + 0.5
        return tensor * factors.repeat_interleave(size, 1)

    return scaled


def flat_roll(n: int) -> Damage:
    return lambda tensor: tensor.reshape(-1).roll(n).reshape(tensor.shape)


def first_lost(tensor: Tensor) -> Tensor:
    """The first 7 numbers are lost, and what follows has moved up; at the end stand others."""
    flat = tensor.reshape(-1)
    return torch.cat([flat[7:], flat[:7].flip(0) * 3]).reshape(tensor.shape)


def lost_in_the_middle(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    at = len(flat) // 3
    return torch.cat([flat[:at], flat[at + 5 :], flat[:5] * 3]).reshape(tensor.shape)


# -------------------- fused gate and up


def fused_interleaved(tensor: Tensor) -> Tensor:
    gate, up = tensor.chunk(2, -1)
    return torch.stack([gate, up], -1).reshape(tensor.shape)


def fused_taken_apart(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[..., ::2], tensor[..., 1::2]], -1)


def fused_by_rank(n: int) -> Damage:
    def joined(tensor: Tensor) -> Tensor:
        gate, up = (part.chunk(n, -1) for part in tensor.chunk(2, -1))
        return torch.cat([piece for pair in zip(gate, up, strict=True) for piece in pair], -1)

    return joined


# -------------------- several tensors


def exchange(tensors: Tensors, keys: tuple[str, ...]) -> None:
    a, b = keys
    tensors[a], tensors[b] = tensors[b], tensors[a]


def interleave_pair(tensors: Tensors, keys: tuple[str, ...]) -> None:
    gate, up = (tensors[key] for key in keys)
    both = torch.stack([gate, up], 1).reshape(-1, gate.shape[1])
    tensors[keys[0]], tensors[keys[1]] = both.chunk(2)


def pair_by_rank(n: int) -> Callable[[Tensors, tuple[str, ...]], None]:
    def join(tensors: Tensors, keys: tuple[str, ...]) -> None:
        gate, up = (tensors[key].chunk(n) for key in keys)
        both = torch.cat([piece for pair in zip(gate, up, strict=True) for piece in pair])
        tensors[keys[0]], tensors[keys[1]] = both.chunk(2)

    return join


def qkv_by_rank(n: int) -> Callable[[Tensors, tuple[str, ...]], None]:
    def join(tensors: Tensors, keys: tuple[str, ...]) -> None:
        sizes = [len(tensors[key]) for key in keys]
        ranks = zip(*(tensors[key].chunk(n) for key in keys), strict=True)
        fused = torch.cat([piece for rank in ranks for piece in rank])
        tensors.update(zip(keys, fused.split(sizes), strict=True))

    return join


def of_next_layer(tensors: Tensors, keys: tuple[str, ...]) -> None:
    head, layer, tail = split_layer(keys[0])
    others = sorted(
        (int(split_layer(key)[1]) for key in tensors if split_layer(key)[::2] == (head, tail) and key != keys[0]),
        key=lambda other: (other <= layer, other),
    )
    tensors[keys[0]] = tensors[f"{head}layers.{others[0]}.{tail}"].clone()


def split_layer(key: str) -> tuple[str, int, str]:
    head, found, rest = key.partition("layers.")
    number, _, tail = rest.partition(".")
    return (head, int(number), tail) if found else (key, -1, "")


# -------------------- the catalogue


@dataclass(frozen=True)
class Shapes:
    """What the catalogue has to know of a geometry."""

    text: str  # the prefix of the text model's keys
    q_heads: int
    kv_heads: int
    head_dim: int
    vision_heads: int = 0
    vision_head_dim: int = 0


def one(kind: str, name: str, module: str, damage: Damage) -> tuple[str, str, tuple[str, ...], Any]:
    def change(tensors: Tensors, keys: tuple[str, ...]) -> None:
        before = tensors[keys[0]]
        after = damage(before).to(before.dtype)
        assert after.shape != before.shape or not torch.equal(after, before), (name, keys)
        tensors[keys[0]] = after

    return kind, name, (module,), change


Q, K, V, O = (f"self_attn.{x}_proj.weight" for x in "qkvo")  # noqa: E741
NORM, NORM_2 = "input_layernorm.weight", "post_attention_layernorm.weight"
FUSED, DOWN = "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"
ROUTER = "feed_forward.router.weight"
SHARED = [f"feed_forward.shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")]
DENSE = [f"feed_forward.{x}_proj.weight" for x in ("gate", "up", "down")]
EMBED, HEAD = "EMBED", "HEAD"
WQ, WK, WV, WO = (f"VISION.self_attn.{x}_proj.weight" for x in "qkvo")
FC1, FC2 = "VISION.mlp.fc1.weight", "VISION.mlp.fc2.weight"


def of_attention(s: Shapes) -> Iterator[tuple[str, str, tuple[str, ...], Any]]:
    d = s.head_dim
    yield one("transposed", "q transposed", Q, transposed)
    yield one("transposed", "k transposed under its shape", K, transposed)
    yield one("transposed", "k seen transposed", K, transposed_back)
    yield one("transposed", "v turned, shape and all", V, turned)
    yield one("rope_permuted", "q for half-rotation", Q, half_rotation(d))
    yield one("rope_permuted", "k for half-rotation", K, half_rotation(d))
    yield one("rope_permuted", "q the other way", Q, interleaved_pairs(d))
    yield one("rope_permuted", "k the other way", K, interleaved_pairs(d))
    yield one(
        "rope_permuted", "q in one head", Q, lambda t: torch.cat([t[:d], half_rotation(d)(t[d : 2 * d]), t[2 * d :]])
    )
    yield one("heads_reordered", "q heads exchanged", Q, heads(s.q_heads, exchanged(0, 1)))
    yield one("heads_reordered", "o heads exchanged", O, heads(s.q_heads, exchanged(1, 2), 1))
    yield one("heads_reordered", "q heads rolled", Q, heads(s.q_heads, lambda n: [*n[1:], n[0]]))
    yield one("ranks_reordered", "q halves exchanged", Q, halves_exchanged(0))
    yield one("ranks_reordered", "o halves exchanged", O, halves_exchanged(1))
    yield one("rank_repeated", "q half repeated", Q, first_half_repeated(0))
    yield one("rank_repeated", "o half repeated", O, first_half_repeated(1))
    yield one("rank_missing", "v half zero", V, parts(2, 0, [0, None]))
    yield one("rank_missing", "o half zero", O, parts(2, 1, [None, 1]))
    yield one("rank_missing", "q without its second half", Q, lambda t: t.chunk(2)[0])
    yield one("rank_missing", "o without its first half", O, lambda t: t.chunk(2, 1)[1])
    yield one("rank_repeated", "k twice", K, lambda t: torch.cat([t, t]))
    yield one("wrong_axis", "o joined on the rows", O, columns_as_rows(2))
    yield one("wrong_axis", "q joined on the columns", Q, rows_as_columns(2))
    yield one("wrong_axis", "q joined on the columns, shape and all", Q, lambda t: torch.cat(t.chunk(2), 1))
    yield one("wrong_axis", "o joined on the rows, shape and all", O, lambda t: torch.cat(t.chunk(2, 1)))
    yield one("flipped_bit", "q mantissa", Q, flip_bit(0))
    yield one("flipped_bit", "v exponent", V, flip_bit(13))
    yield one("flipped_bit", "o sign", O, flip_bit(15))
    yield one("zeros", "v zeros", V, torch.zeros_like)
    yield one("zeros", "k one row", K, put(0, 1))
    yield one("zeros", "o one column", O, put(0, slice(None), 3))
    yield one("constant", "k ones", K, torch.ones_like)
    yield one("nonfinite", "q a row of NaN", Q, put(math.nan, 0))
    yield one("nonfinite", "v one infinity", V, put(math.inf, 2, 3))
    yield one("overwritten", "q, one number", Q, put(77.0, 3, 4))
    yield one("unrelated", "o, two rows", O, lambda t: torch.cat([t[:4], random_again(t[4:6]), t[6:]]))
    yield one("scaled", "q by the root of its heads", Q, lambda t: t * d**-0.5)
    yield one("scaled", "k by 1.1", K, lambda t: t * 1.1)
    yield one("scaled", "one head doubled", Q, lambda t: torch.cat([t[:d] * 2, t[d:]]))
    yield one("negated", "v", V, lambda t: -t)
    yield one("negated", "k its lower half", K, lambda t: torch.cat([t[: len(t) // 2], -t[len(t) // 2 :]]))
    yield one("scale", "q rows", Q, by_rows)
    yield one("scale", "o columns", O, by_columns)
    yield one("scale_axis", "v on the wrong axis", V, by_both)
    yield one("rounded", "q through float8", Q, through(torch.float8_e4m3fn))
    yield one("rounded", "k through float8 e5m2", K, through(torch.float8_e5m2))
    yield one("byte_swapped", "v", V, bytes_swapped)
    yield one("reinterpreted", "o as float16", O, read_as_float16)
    yield one("noise", "q", Q, noise(0.01))
    yield one("low_rank", "k with an adapter", K, adapter_merged)
    yield one("permuted", "o turned about", O, lambda t: t.rot90())
    yield one(
        "rounded",
        "q to 15 values a row",
        Q,
        lambda t: (t.float() / (s := t.float().abs().amax(1, True) / 7)).round() * s,
    )
    yield one("unrelated", "v", V, random_again)
    yield one("rows_permuted", "q two rows", Q, lambda t: t[[2, 1, 0, *range(3, len(t))]])
    yield one("columns_permuted", "k two columns", K, lambda t: t[:, [0, 5, 2, 3, 4, 1, *range(6, t.shape[1])]])
    yield one("rows_permuted", "k upside down", K, lambda t: t.flip(0))
    yield one("shifted", "q by a row", Q, lambda t: t.roll(1, 0))
    yield one("shifted", "k by a column", K, lambda t: t.roll(1, 1))
    yield one("shifted", "v by an element", V, flat_roll(1))
    yield one("shifted", "o its beginning lost", O, first_lost)
    yield one("shifted", "q from the middle on", Q, lost_in_the_middle)
    yield one("truncated", "v a row less", V, lambda t: t[:-1])
    yield one("padded", "v padded", V, lambda t: torch.cat([t, torch.zeros_like(t[:8])]))
    yield one("clipped", "q", Q, lambda t: t.clamp(-0.1, 0.1))
    yield "other_tensor", "k and v exchanged", (K, V), exchange
    yield "other_tensor", "q of another layer", (Q,), of_next_layer
    yield "qkv_interleaved", "q, k and v cut from two ranks' blocks", (Q, K, V), qkv_by_rank(2)


def of_norms(s: Shapes) -> Iterator[tuple[str, str, tuple[str, ...], Any]]:
    yield one("flipped_bit", "norm", NORM, flip_bit(7))
    yield one("constant", "norm of ones", NORM, torch.ones_like)
    yield one("zeros", "norm of zeros", NORM_2, torch.zeros_like)
    yield one("offset", "norm minus one", NORM, lambda t: t - 1)
    yield one("offset", "norm plus one", NORM_2, lambda t: t + 1)
    yield one("scaled", "norm doubled", NORM, lambda t: t * 2)
    yield one("negated", "norm", NORM_2, lambda t: -t)
    yield one("ranks_reordered", "norm halves", NORM, halves_exchanged(0))
    yield one("rank_repeated", "norm half repeated", NORM_2, first_half_repeated(0))
    yield one("truncated", "norm truncated", NORM, lambda t: t[:-3])
    yield one("nonfinite", "norm", NORM_2, put(math.nan, 3))
    yield (*one("other_tensor", "norm of another layer", NORM, lambda t: t)[:3], of_next_layer)
    yield "other_tensor", "the norms exchanged", (NORM, NORM_2), exchange


def of_experts(s: Shapes) -> Iterator[tuple[str, str, tuple[str, ...], Any]]:
    yield one("gate_up_swapped", "fused halves exchanged", FUSED, halves_exchanged(2))
    yield one("gate_up_interleaved", "fused interleaved", FUSED, fused_interleaved)
    yield one("gate_up_interleaved", "fused taken apart", FUSED, fused_taken_apart)
    yield one("gate_up_interleaved", "fused joined by rank", FUSED, fused_by_rank(2))
    yield one("ranks_reordered", "fused, its ranks in another order", FUSED, parts(4, 2, [3, 1, 2, 0]))
    yield one("rank_repeated", "fused, a rank twice", FUSED, parts(4, 2, [0, 1, 1, 3]))
    yield one("wrong_axis", "fused, joined on the inputs", FUSED, lambda t: torch.cat(t.chunk(2, 2), 1))
    yield one(
        "wrong_axis", "fused, ranks joined on the experts", FUSED, lambda t: torch.cat(t.chunk(2, 2)).reshape(t.shape)
    )
    yield one(
        "wrong_axis", "fused, ranks joined on the experts, shape and all", FUSED, lambda t: torch.cat(t.chunk(2, 2))
    )
    yield one("wrong_axis", "fused, experts and inputs exchanged", FUSED, inputs_before_experts)
    yield one("wrong_axis", "down, experts and inputs exchanged", DOWN, inputs_before_experts)
    yield one("transposed", "fused under its shape", FUSED, transposed)
    yield one("transposed", "fused turned, shape and all", FUSED, turned)
    yield one("transposed", "down under its shape", DOWN, transposed)
    yield one("transposed", "down seen transposed", DOWN, transposed_back)
    yield one("transposed", "down turned, shape and all", DOWN, turned)
    yield one("experts_reordered", "fused experts exchanged", FUSED, lambda t: t[[1, 0, *range(2, len(t))]])
    yield one("experts_reordered", "down experts reversed", DOWN, lambda t: t.roll(1, 0))
    yield one("experts_reordered", "router", ROUTER, lambda t: t[[1, 0, *range(2, len(t))]])
    yield one("rank_repeated", "down", DOWN, first_half_repeated(1))
    yield one("rank_missing", "down", DOWN, parts(2, 1, [0, None]))
    yield one("rank_missing", "down a rank short", DOWN, lambda t: t.chunk(2, 1)[0])
    yield one("ranks_reordered", "down", DOWN, halves_exchanged(1))
    yield one("wrong_axis", "down joined on the other axis", DOWN, columns_as_rows(2))
    yield one("wrong_axis", "down joined on the other axis", DOWN, rows_as_columns(2))
    yield one("zeros", "one expert", DOWN, put(0, 1))
    yield one("zeros", "one expert of both", FUSED, put(0, 2))
    yield one("nonfinite", "one expert's row", DOWN, put(math.nan, 0, 2))
    yield one("flipped_bit", "fused", FUSED, flip_bit(6))
    yield one("flipped_bit", "router", ROUTER, flip_bit(14))
    yield one("scaled", "down", DOWN, lambda t: t * 0.25)
    yield one("scaled", "router", ROUTER, lambda t: t * 3)
    yield one("negated", "router", ROUTER, lambda t: -t)
    yield one("rounded", "fused through float8", FUSED, through(torch.float8_e4m3fn))
    yield one("transposed", "router under its shape", ROUTER, transposed)
    yield "gate_up_swapped", "shared", (SHARED[0], SHARED[1]), exchange
    yield "gate_up_interleaved", "shared", (SHARED[0], SHARED[1]), interleave_pair
    yield "gate_up_interleaved", "shared by rank", (SHARED[0], SHARED[1]), pair_by_rank(2)
    yield one("rank_repeated", "shared down", SHARED[2], first_half_repeated(1))
    yield one("ranks_reordered", "shared gate", SHARED[0], halves_exchanged(0))
    yield one("rank_missing", "shared up", SHARED[1], parts(2, 0, [None, 1]))
    yield one("transposed", "shared down", SHARED[2], transposed)
    yield one("wrong_axis", "shared down", SHARED[2], columns_as_rows(2))
    yield (*one("other_tensor", "another layer's shared down", SHARED[2], lambda t: t)[:3], of_next_layer)
    yield (*one("other_tensor", "another layer's experts", DOWN, lambda t: t)[:3], of_next_layer)


def of_dense(s: Shapes) -> Iterator[tuple[str, str, tuple[str, ...], Any]]:
    yield "gate_up_swapped", "dense", (DENSE[0], DENSE[1]), exchange
    yield "gate_up_interleaved", "dense", (DENSE[0], DENSE[1]), interleave_pair
    yield "gate_up_interleaved", "dense by rank", (DENSE[0], DENSE[1]), pair_by_rank(2)
    yield one("rank_repeated", "dense gate", DENSE[0], first_half_repeated(0))
    yield one("rank_missing", "dense down", DENSE[2], parts(2, 1, [0, None]))
    yield one("wrong_axis", "dense down", DENSE[2], columns_as_rows(2))
    yield one("transposed", "dense down", DENSE[2], transposed)
    yield one("transposed", "dense up turned", DENSE[1], turned)
    yield one("flipped_bit", "dense up", DENSE[1], flip_bit(3))
    yield one("scale_axis", "dense gate", DENSE[0], by_both)
    yield one("shifted", "dense down", DENSE[2], lost_in_the_middle)


def of_vocabulary(s: Shapes) -> Iterator[tuple[str, str, tuple[str, ...], Any]]:
    yield "other_tensor", "embedding and head exchanged", (EMBED, HEAD), exchange
    for name, key in (("embedding", EMBED), ("head", HEAD)):
        yield one("transposed", name, key, transposed)
        yield one("rank_repeated", name, key, first_half_repeated(0))
        yield one("ranks_reordered", name, key, parts(4, 0, [3, 1, 2, 0]))
        yield one("rank_missing", name, key, parts(4, 0, [0, None, 2, 3]))
        yield one("rank_missing", f"{name}, too short", key, lambda t: t[: len(t) // 2])
        yield one("flipped_bit", name, key, flip_bit(9))
        yield one("zeros", f"{name}, the last rows", key, lambda t: torch.cat([t[:-40], torch.zeros_like(t[:40])]))
        yield one("shifted", name, key, lambda t: t.roll(1, 0))
        yield one("scaled", name, key, lambda t: t * 12)
        yield one("rows_permuted", f"{name}, two tokens", key, lambda t: t[[0, 9, *range(2, 9), 1, *range(10, len(t))]])
        yield one("truncated", name, key, lambda t: t[:-8])
        yield one("padded", name, key, lambda t: torch.cat([t, torch.zeros_like(t[:56])]))
        yield one("zeros", f"{name}, all", key, torch.zeros_like)
        yield one("unrelated", name, key, random_again)
        yield one("columns_permuted", f"{name}, reversed", key, lambda t: t.flip(1))


def of_vision(s: Shapes) -> Iterator[tuple[str, str, tuple[str, ...], Any]]:
    d = s.vision_head_dim
    yield one("rope_permuted", "vision q", WQ, half_rotation(d))
    yield one("rope_permuted", "vision q bias", WQ.replace("weight", "bias"), half_rotation(d))
    yield one("rope_permuted", "vision k", WK, interleaved_pairs(d))
    yield one("rope_permuted", "vision k bias", WK.replace("weight", "bias"), interleaved_pairs(d))
    yield one("transposed", "vision v", WV, transposed)
    yield one("transposed", "vision o", WO, transposed)
    yield one("ranks_reordered", "vision fc1", FC1, halves_exchanged(0))
    yield one("rank_repeated", "vision fc2", FC2, first_half_repeated(1))
    yield one("wrong_axis", "vision fc2", FC2, columns_as_rows(2))
    yield one("zeros", "vision q bias", WQ.replace("weight", "bias"), torch.zeros_like)
    yield one("rank_repeated", "vision fc1 bias", FC1.replace("weight", "bias"), first_half_repeated(0))
    yield (
        *one("other_tensor", "vision o bias of another layer", WO.replace("weight", "bias"), lambda t: t)[:3],
        of_next_layer,
    )
    yield "other_tensor", "vision k and v", (WK, WV), exchange
    yield (
        "other_tensor",
        "vision norm and its bias",
        ("vision_model.layernorm_pre.weight", "vision_model.layernorm_pre.bias"),
        exchange,
    )
    yield one("scaled", "vision layernorm", "vision_model.layernorm_post.weight", lambda t: t * 2)
    yield one("nonfinite", "class embedding", "vision_model.class_embedding", put(math.nan, 5))
    yield one("columns_permuted", "patch embedding, colours last", "vision_model.patch_embedding.linear.weight",
              lambda t: t.reshape(len(t), 3, -1).transpose(1, 2).reshape(t.shape))  # fmt: skip
    yield one("transposed", "projector", "multi_modal_projector.linear_1.weight", transposed)
    yield one("shifted", "position embedding", "vision_model.positional_embedding_vlm", lambda t: t.roll(1, 0))


CATALOGUE = (of_attention, of_norms, of_experts, of_dense, of_vocabulary, of_vision)


def batches(tensors: Tensors, shapes: Shapes) -> list[list[Fault]]:
    """Every fault of the catalogue that these tensors can have, in as few groups as leave no tensor with two of them."""
    entries = [entry for family in CATALOGUE for entry in family(shapes)]
    groups: list[list[Fault]] = [[]]
    for kind, name, modules, change in entries:
        places = list(_places(tensors, shapes, modules))
        if not places or not _possible(tensors, places[0], change):
            continue
        for group in groups:
            taken = {key for fault in group for key in fault.keys}
            free = [keys for keys in places if not taken & set(keys)]
            if free:
                group.append(Fault(kind, name, free[len(group) % len(free)], change))
                break
        else:
            groups.append([Fault(kind, name, places[0], change)])
    return groups


def _places(tensors: Tensors, shapes: Shapes, modules: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The keys of these modules in each layer that has them."""
    if modules[0] in (EMBED, HEAD):
        prefix = shapes.text
        names = {EMBED: f"{prefix}model.embed_tokens.weight", HEAD: f"{prefix}lm_head.weight"}
        yield tuple(names[module] for module in modules)
        return
    layers = sorted({split_layer(key)[1] for key in tensors} - {-1})
    for layer in layers:
        stems = {True: f"vision_model.model.layers.{layer}.", False: f"{shapes.text}model.layers.{layer}."}
        keys = tuple(stems[module.startswith("VISION.")] + module.removeprefix("VISION.") for module in modules)
        if set(keys) <= tensors.keys():
            yield keys
    if set(modules) <= tensors.keys():
        yield modules


def _possible(tensors: Tensors, keys: tuple[str, ...], change: Any) -> bool:
    try:
        change(dict(tensors), keys)
    except (AssertionError, RuntimeError, IndexError):
        return False
    return True


def plant(tensors: Tensors, faults: Sequence[Fault]) -> Tensors:
    """A damaged copy."""
    result = dict(tensors)
    for fault in faults:
        damaged = dict(tensors)
        fault.change(damaged, fault.keys)
        result.update({key: damaged[key].contiguous() for key in fault.keys})
    return result
