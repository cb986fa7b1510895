"""The feed-forward blocks: SwiGLU, and the mixture of experts that routes each token to its top k."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llama4.loading import Weights

PROJECTIONS = ("gate", "up", "down")


def swiglu(x: Tensor, weights: Weights, at: str) -> Tensor:
    """silu(x gate) * (x up), projected down. [..., D] to [..., D]; `at` is the prefix of the three names."""
    hidden = F.silu(F.linear(x, weights[f"{at}gate"])) * F.linear(x, weights[f"{at}up"])
    return F.linear(hidden, weights[f"{at}down"])


def mixture(x: Tensor, weights: Weights, at: str, top_k: int, afterwards: Iterable[str] = ()) -> tuple[Tensor, Tensor]:
    """The shared expert on every token, plus each token's `top_k` routed experts. [N, D] to [N, D], and the router's scores.

    Llama 4 scales an expert's *input* by the sigmoid of its score, not its output, and sigmoids are not normalized. An expert
    is asked for only if a token goes to it, and computes only the tokens that do. Scores are [N, experts], before the sigmoid.
    `afterwards` names the weights that the caller will ask for next: they are read while the experts compute.
    """
    scores = F.linear(x, weights[f"{at}router"])
    top, chosen = scores.topk(top_k, dim=-1)  # [N, top_k]
    gates = top.sigmoid()
    experts = sorted(set(chosen.flatten().tolist()))
    blocks = [f"{at}shared.", *(f"{at}experts.{expert}." for expert in experts)]
    weights.expect([*(block + name for block in blocks for name in PROJECTIONS), *afterwards])
    out = swiglu(x, weights, f"{at}shared.")
    for expert in experts:
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        routed = swiglu(x[token] * gates[token, slot, None], weights, f"{at}experts.{expert}.")
        out = torch.index_add(out, 0, token, routed)
    return out, scores
