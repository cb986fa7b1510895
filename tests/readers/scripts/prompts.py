"""What every script here does: a directory and prompts in, a reader's logits, or why there are none, out.

    python SCRIPT DIRECTORY PROMPTS.npz ANSWERS.npz

It runs in the reader's environment, where nothing of ours is installed but numpy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """A text, or a picture and a text."""

    name: str
    text: str
    tokens: list[int]
    pixel_values: Any = None  # float32 [tiles, 3, H, W], of the same picture
    image: Any = None  # uint8 [H, W, 3]


def answer(open_model: Callable[[Path], Callable[[Prompt], Any]]) -> None:
    """`open_model(directory)` gives a function: a prompt -> logits [tokens, vocabulary], None of one that it cannot take."""
    directory, prompts, answers = map(Path, sys.argv[1:])
    with np.load(prompts) as stored:
        names = [str(name) for name in stored["names"]]
        asked = [
            Prompt(name, **{field: stored[f"{name}.{field}"] for field in stored[f"{name}.fields"]}) for name in names
        ]
    made: dict[str, Any] = {}
    logits_of: Any = None
    for prompt in asked:
        try:
            logits_of = logits_of or open_model(directory)
            logits = logits_of(
                Prompt(prompt.name, str(prompt.text), prompt.tokens.tolist(), prompt.pixel_values, prompt.image)
            )
        except Exception as error:  # whatever a reader raises is what there is to say of it
            made[f"{prompt.name}.error"] = f"{type(error).__name__}: {error}"
        else:
            if logits is not None:
                made[prompt.name] = np.asarray(logits, np.float32)
    np.savez(answers, **made)
