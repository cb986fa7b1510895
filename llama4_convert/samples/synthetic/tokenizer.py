"""A random tokenizer.model that is valid all the same."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from itertools import pairwise
from random import Random


def tokenizer_model(base_tokens: int, seed: int) -> bytes:
    """A `tokenizer.model` in tiktoken's format. Random, but valid.

    The 256 bytes come first, then words of lower-case letters, some after a space. Byte pair encoding with the earlier
    tokens splits each in exactly two, so that readers which rebuild the list of merges find one merge a token.
    """
    ranks = {bytes([value]): value for value in range(256)}
    letters = [bytes([value]) for value in b"abcdefghijklmnopqrstuvwxyz"]
    starts, ends = [b" ", *letters], list(letters)
    random = Random(f"tokenizer {seed}")
    while len(ranks) < base_tokens:
        token = random.choice(starts) + random.choice(ends)
        if token not in ranks and len(encode(ranks, token)) == 2:
            ranks[token] = len(ranks)
            starts.append(token)
            if not token.startswith(b" "):
                ends.append(token)
    return ranked(ranks)


def ranked(tokens: Iterable[bytes]) -> bytes:
    """tiktoken's format of tokens in the order of their ranks: a line a token, base64, a space, the rank."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def encode(ranks: dict[bytes, int], text: bytes) -> list[bytes]:
    """Byte pair encoding: join the neighbours of the lowest rank until none are left to join."""
    parts = [bytes([value]) for value in text]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not found:
            return parts
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
