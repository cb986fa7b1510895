"""The key-value cache of generation. Chunked layers keep the current chunk only: the next token sees no other."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values a layer, [batch, key-value heads, tokens, head width], rotated and normed as attention uses them."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._length: dict[int, int] = {}

    def length(self, layer: int) -> int:
        """Tokens that the layer has seen: the position of the next."""
        return self._length.get(layer, 0)

    def extend(self, layer: int, k: Tensor, v: Tensor, chunk: int | None) -> tuple[Tensor, Tensor, int]:
        """Append new tokens; returns the keys and values that they may need, and the position of the first of these."""
        length = self.length(layer) + k.shape[2]
        if layer in self._held:
            old_k, old_v = self._held[layer]
            k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        first = length - k.shape[2]
        drop = max(length - length % chunk - first, 0) if chunk else 0
        # A copy where something is dropped: a view would keep the whole alive.
        self._held[layer] = (k[:, :, drop:].clone(), v[:, :, drop:].clone()) if drop else (k, v)
        self._length[layer] = length
        return k, v, first

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self._held.values())
