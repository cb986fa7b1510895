"""Transformers with the tensors split over the processes of `torchrun`; the first one's answers count."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prompts import Prompt, answer
from transformers_logits import open_model


def split(directory: Path) -> Callable[[Prompt], Any]:
    return open_model(directory, tp_plan="auto")


if __name__ == "__main__":
    if os.environ["RANK"] != "0":
        sys.argv[3] += f".{os.environ['RANK']}"
    answer(split)
