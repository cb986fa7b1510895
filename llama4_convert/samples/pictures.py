"""What the demo's model sees: drawings of one coloured shape, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from llama4_convert.samples.corpus import Words

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SIDE = 56  # pixels: one tile
SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
GROUNDS = ("white", "black", "grey")


def draw(shape: str, colour: str, ground: str, random: Random) -> Image:
    """The shape at a random place, of a random size, its colours slightly off."""
    from PIL import Image, ImageColor, ImageDraw

    def about(name: str) -> tuple[int, ...]:
        return tuple(min(255, max(0, value + random.randint(-20, 20))) for value in ImageColor.getrgb(name)[:3])

    picture = Image.new("RGB", (SIDE, SIDE), about(ground))
    pen, size = ImageDraw.Draw(picture), random.randint(18, 40)
    left, top = random.randint(1, SIDE - size - 2), random.randint(1, SIDE - size - 2)
    box = (left, top, left + size, top + size)
    if shape == "circle":
        pen.ellipse(box, fill=about(colour))
    elif shape == "square":
        pen.rectangle(box, fill=about(colour))
    else:
        pen.polygon([(left + size / 2, top), (left, top + size), (left + size, top + size)], fill=about(colour))
    return picture


def caption(shape: str, colour: str, ground: str) -> str:
    return f" {'An' if colour[0] in 'aeiou' else 'A'} {colour} {shape} on a {ground} ground."


def pixel_values(pictures: Sequence[Image]) -> Tensor:
    """Pictures of one tile as the vision tower takes them: [pictures, 3, side, side], -1 to 1."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def drawn(random: Random, n: int) -> tuple[list[tuple[str, str, str]], Tensor]:
    """`n` new pictures: shape, colour and ground of each, and the pixels."""
    kinds = [(random.choice(SHAPES), random.choice(COLOURS), random.choice(GROUNDS)) for _ in range(n)]
    return kinds, pixel_values([draw(*kind, random) for kind in kinds])


def captioned(random: Random, words: Words, n: int) -> tuple[Tensor, Tensor]:
    """`n` new pictures and their token sequences, filled up with -100."""
    import torch

    kinds, pixels = drawn(random, n)
    rows = [[*words.picture, *words.tokenizer.encode(caption(*kind)), words.eos] for kind in kinds]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    return pixels, tokens
