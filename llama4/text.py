"""The text model: embeddings, decoder layers with iRoPE, final norm.

iRoPE: most layers rotate queries and keys by position and attend inside chunks of fixed length; every n-th layer (NoPE) does
neither and sees everything, which is what carries to contexts longer than any trained on.
Axes: B batch, T tokens, D hidden, H heads, K key-value heads, h head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llama4.cache import KVCache
from llama4.config import Llama4TextConfig
from llama4.loading import Weights

Observer = Callable[[str, Tensor], None]

MAX_ATTENTION_TOKENS = 4096  # of whole prompts that attention works on at a time


class Llama4TextModel:
    """A text model over `weights`, of which it asks for one tensor at a time.

    `observe(name, tensor)` is shown what norms, attention, feed-forward blocks and routers make: "layers.3.attention" ...
    """

    def __init__(self, config: Llama4TextConfig, weights: Weights, observe: Observer | None = None) -> None:
        self.config, self.weights = config, weights
        self.observe: Observer = observe or (lambda name, tensor: None)
        self.frequencies = rope_frequencies(config)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] to [B, T, D]."""
        return self.weights.rows("tok_embeddings", tokens.flatten()).view(*tokens.shape, -1)

    def __call__(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Embeddings [B, T, D] through every layer and the final norm. With a cache, x goes on where it ends."""
        for index in range(self.config.num_hidden_layers):
            x = self.layer(index, x, cache)
        return self.final_norm(x)

    def layer(self, index: int, x: Tensor, cache: KVCache | None = None, chosen: Tensor | None = None) -> Tensor:
        """One decoder layer, [B, T, D] to [B, T, D]. `chosen`: see `feed_forward`."""
        at = f"layers.{index}."
        self.weights.expect(self._needed(index))
        x = x + self._seen(f"{at}attention", self.attention(index, self.norm(f"{at}attention_norm", x), cache))
        normed = self.norm(f"{at}ffn_norm", x)
        return x + self._seen(f"{at}feed_forward", self.feed_forward(index, normed, chosen))

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm("norm", x)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm, in fp32 until the weight is applied."""
        return self._seen(name, _scaled_to_rms_1(x, self.config.rms_norm_eps) * self.weights[name])

    def attention(self, index: int, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Self-attention of layer `index` on normed [B, T, D]."""
        at = f"layers.{index}.attention."
        q, k, v, o = (self.weights[at + name] for name in "qkvo")
        # Prompts without a cache go through a few at a time: their queries and keys are the largest that a layer makes.
        parts = torch.split(x, max(1, MAX_ATTENTION_TOKENS // x.shape[1])) if cache is None and x.shape[1] else (x,)
        made = [
            F.linear(self.attend(index, F.linear(part, q), F.linear(part, k), F.linear(part, v), cache), o)
            for part in parts
        ]
        return made[0] if len(made) == 1 else torch.cat(made)

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None) -> Tensor:
        """What layer `index` makes of its projections [B, T, H * h] and [B, T, K * h], before the output projection."""
        c = self.config
        start = cache.length(index) if cache else 0
        positions = torch.arange(start, start + q.shape[1], device=q.device)
        q, k, v = (t.view(*t.shape[:2], -1, c.head_dim) for t in (q, k, v))  # [B, T, H or K, h]
        if c.no_rope_layers[index]:
            turn = torch.outer(positions.float(), self.frequencies.to(q.device))
            q, k = rotate(q, turn), rotate(k, turn)
            if c.use_qk_norm:
                q, k = _scaled_to_rms_1(q, c.rms_norm_eps), _scaled_to_rms_1(k, c.rms_norm_eps)
        elif c.attn_temperature_tuning:
            # Sharper attention at far positions (arXiv:2501.19399), in steps of floor_scale tokens; 1 before the first.
            steps = torch.floor((positions + 1) / c.floor_scale)
            scale = torch.log(steps + 1) * c.attn_scale + 1
            q = (q * scale[:, None, None]).type_as(q)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H or K, T, h]
        chunk = c.chunk_size(index)
        first = start
        if cache:
            k, v, first = cache.extend(index, k, v, chunk)
        return attend(q, k, v, start, first, chunk).transpose(1, 2).flatten(2)

    def feed_forward(self, index: int, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """The dense or mixture-of-experts block of layer `index` on normed [B, T, D].

        `chosen` [B * T, top_k] names the experts that tokens go to whatever their scores say; a row of -1 leaves it to them.
        """
        c, at = self.config, f"layers.{index}.feed_forward."
        following = self._needed(index + 1)
        if not c.is_moe(index):
            self.weights.expect([*(at + name for name in PROJECTIONS), *following])
            return swiglu(x, self.weights, at)
        out, scores = mixture(x.flatten(0, 1), self.weights, at, c.num_experts_per_tok, following, chosen)
        self.observe(f"{at}router", scores)
        return out.view(x.shape)

    def _needed(self, index: int) -> list[str]:
        """What layer `index` reads whatever its input is, in order: no routed experts."""
        if index == self.config.num_hidden_layers:
            return ["norm"]
        names = ["attention_norm", "attention.q", "attention.k", "attention.v", "attention.o", "ffn_norm"]
        if self.config.is_moe(index):
            names += ["feed_forward.router", *(f"feed_forward.shared.{name}" for name in PROJECTIONS)]
        else:
            names += [f"feed_forward.{name}" for name in PROJECTIONS]
        return [f"layers.{index}.{name}" for name in names]

    def _seen(self, name: str, tensor: Tensor) -> Tensor:
        self.observe(name, tensor)
        return tensor


def _scaled_to_rms_1(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).type_as(x)


def rope_frequencies(config: Llama4TextConfig) -> Tensor:
    """Radians a token of each rotated pair, fp32 [h / 2]; scaled as Llama 3 does if the configuration says so.

    Pairs that turn slower than once in the original context are slowed down by `factor`; fast ones stay; those between are
    blended (`apply_scaling` in Meta's model.py).
    """
    h = config.head_dim
    # Written as Meta writes it: the last bit of a frequency is half a radian at 10 M tokens.
    frequencies = 1.0 / (config.rope_theta ** (torch.arange(0, h, 2, dtype=torch.float32) / h))
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = frequencies * scaling.original_context / (2 * math.pi)  # in the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    if span > 0:
        kept = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    else:
        kept = (turns > scaling.high_freq_factor).float()
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Each pair of neighbours (x0, x1) of [B, T, heads, h] turned by the angles [T, h / 2], in fp32."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    turned = pairs * torch.polar(torch.ones_like(turn), turn)[:, None]
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, start: int, first: int, chunk: int | None) -> Tensor:
    """Causal attention of queries at positions from `start` [B, H, T, h] on keys and values from `first` [B, K, S, h].

    With `chunk`, positions attend only inside [n * chunk, (n + 1) * chunk). Each chunk is a call of its own, so that no mask of
    T x T is ever made and time stays linear in T.
    """
    stop = start + q.shape[2]
    cuts = [start, *range((start // chunk + 1) * chunk, stop, chunk), stop] if chunk else [start, stop]
    parts = []
    for a, b in pairwise(cuts):
        begin = max(first, a - a % chunk) if chunk else first
        seen = slice(begin - first, b - first)
        parts.append(_causal(q[:, :, a - start : b - start], k[:, :, seen], v[:, :, seen]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last query sees every key, the one before it all but one ...; heads of q share those of k in groups."""
    n_q, n_k = q.shape[2], k.shape[2]
    mask = None
    if 1 < n_q < n_k:
        mask = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=n_q == n_k, enable_gqa=True)


PROJECTIONS = ("gate", "up", "down")

# Numbers between the projections that are in memory at a time: 2,048 tokens of Maverick's dense layers.
MAX_HIDDEN_NUMBERS = 1 << 25


def swiglu(x: Tensor, weights: Weights, at: str) -> Tensor:
    """silu(x gate) * (x up), projected down. [..., D] to [..., D]; `at` is the prefix of the three names."""
    gate, up, down = (weights[at + name] for name in PROJECTIONS)

    def block(rows: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)

    if x.numel() // x.shape[-1] * gate.shape[0] <= MAX_HIDDEN_NUMBERS:
        return block(x)
    return torch.cat(
        [block(rows) for rows in torch.split(x.flatten(0, -2), max(1, MAX_HIDDEN_NUMBERS // gate.shape[0]))]
    ).view(x.shape)


def choose(scores: Tensor, top_k: int) -> Tensor:
    """The experts of each token, [N, top_k], the likeliest first; `scores` [N, experts]."""
    return scores.topk(top_k, dim=-1).indices


def mixture(
    x: Tensor,
    weights: Weights,
    at: str,
    top_k: int,
    afterwards: Iterable[str] = (),
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The shared expert on every token, plus each token's `top_k` routed experts. [N, D] to [N, D], and the router's scores.

    Llama 4 scales an expert's *input* by the sigmoid of its score, not its output, and sigmoids are not normalized. An expert
    is asked for only if a token goes to it, and computes only the tokens that do. Scores are [N, experts], before the sigmoid.
    `afterwards` names the weights that the caller will ask for next: they are read while the experts compute. `chosen` [N,
    top_k] takes the place of the scores' choice, but for rows of -1.
    """
    scores = F.linear(x, weights[f"{at}router"])
    own = choose(scores, top_k)
    chosen = own if chosen is None else torch.where(chosen < 0, own, chosen)
    gates = scores.gather(-1, chosen).sigmoid()  # [N, top_k]
    experts = sorted(set(chosen.flatten().tolist()))
    blocks = [f"{at}shared.", *(f"{at}experts.{expert}." for expert in experts)]
    weights.expect([*(block + name for block in blocks for name in PROJECTIONS), *afterwards])
    out = swiglu(x, weights, f"{at}shared.")
    for expert in experts:
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        routed = swiglu(x[token] * gates[token, slot, None], weights, f"{at}experts.{expert}.")
        out.index_add_(0, token, routed)
    return out, scores
