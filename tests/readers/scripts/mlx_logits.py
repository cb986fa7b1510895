"""mlx-lm on the CPU; weights are widened to float32, since it has no CPU kernels for bf16 experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import load_model
from prompts import Prompt, answer

mx.set_default_device(mx.cpu)


def open_model(directory: Path) -> Callable[[Prompt], Any]:
    model, _ = load_model(directory)
    model.update(tree_map(lambda weight: weight.astype(mx.float32), model.parameters()))

    def logits_of(prompt: Prompt) -> Any:
        if prompt.image is not None:
            return None  # it reads texts only
        return np.array(model(mx.array([prompt.tokens]))[0].astype(mx.float32))

    return logits_of


if __name__ == "__main__":
    answer(open_model)
