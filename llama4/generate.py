"""Generation: one pass over the prompt, then a token at a time through the KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from llama4.cache import KVCache


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
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 0:
        raise ValueError("temperature and max_new_tokens must not be negative, and top_p must be in (0, 1]")
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
    """A token a row: [batch, vocabulary] to [batch]."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True)
    p[p.cumsum(-1) - p > top_p] = 0  # what lies before a token already makes top_p
    drawn = p.multinomial(1, generator=generator)  # which normalizes
    return order.gather(-1, drawn)[:, 0]
