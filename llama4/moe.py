"""The feed-forward blocks: SwiGLU, and the mixture of experts that routes each token to its top k."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llama4.loading import Weights

PROJECTIONS = ("gate", "up", "down")

_HIDDEN = (
    1 << 25
)  # numbers between the projections that are in memory at a time: 2,048 tokens of Maverick's dense layers


def swiglu(x: Tensor, weights: Weights, at: str) -> Tensor:
    """silu(x gate) * (x up), projected down. [..., D] to [..., D]; `at` is the prefix of the three names."""
    gate, up, down = (weights[at + name] for name in PROJECTIONS)

    def block(rows: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)

    if x.numel() // x.shape[-1] * gate.shape[0] <= _HIDDEN:
        return block(x)
    return torch.cat([block(rows) for rows in torch.split(x.flatten(0, -2), max(1, _HIDDEN // gate.shape[0]))]).view(
        x.shape
    )


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
