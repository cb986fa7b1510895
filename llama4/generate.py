"""Generation: one pass over the prompt, then a token at a time through the KV cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from llama4.cache import KVCache


class NotANumber(ValueError):
    """The weights lead to no numbers that a token can be chosen by."""


class CachedModel(Protocol):
    """What `generate` asks of a model."""

    def hidden_states(
        self, tokens: Tensor, pixel_values: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


def generate(
    model: CachedModel,
    tokens: Tensor,
    pixel_values: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Iterable[int] = (),
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, [batch], until each has met one of `stop`, which is yielded too.

    `tokens` [batch, tokens] are prompts of equal length. temperature 0 takes the likeliest token; otherwise logits are divided
    by it and a token is drawn from the smallest set of likeliest ones whose probability exceeds `top_p`. The same seed on the
    same machine draws the same tokens. Raises ValueError for an empty prompt or numbers out of range.
    """
    if not tokens.numel():
        raise ValueError("the prompt is empty: generation needs at least one token")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or max_new_tokens < 0:
        raise ValueError("temperature and max_new_tokens must be finite and not negative, and top_p must be in (0, 1]")
    generator = torch.Generator(tokens.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    stops = torch.tensor(sorted(set(stop)), dtype=torch.long, device=tokens.device)
    cache = KVCache()
    done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    last = tokens
    token: Tensor | None = None
    for _ in range(max_new_tokens):
        # Only the last position's logits: at Scout's width the prompt's would take 0.8 MB a token.
        hidden = model.hidden_states(last, pixel_values if token is None else None, cache)[:, -1]
        drawn = sample(model.logits(hidden), temperature, top_p, generator)
        token = drawn if token is None else torch.where(done, token, drawn)
        yield token
        done |= torch.isin(token, stops)
        if bool(done.all()):
            return
        last = token[:, None]


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """A token a row: [batch, vocabulary] to [batch]. Raises NotANumber."""
    if not bool(logits.isfinite().all()):
        raise NotANumber("the model's logits are NaN or infinite: check the checkpoint (verify, validate)")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    # With the largest at 0 no temperature is too small: what is not the likeliest becomes -inf.
    steps = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)
    p, order = steps.softmax(-1).sort(dim=-1, descending=True)
    p[p.cumsum(-1) - p > top_p] = 0  # what lies before a token already makes top_p
    drawn = p.multinomial(1, generator=generator)  # which normalizes
    return order.gather(-1, drawn)[:, 0]
