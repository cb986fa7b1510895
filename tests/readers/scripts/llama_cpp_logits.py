"""llama.cpp: its converter to GGUF, which lies in the source beside the environment, and the logits of llama-cpp-python."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from prompts import Prompt, answer

[CONVERTER] = Path(sys.prefix, "source").glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")


def open_model(directory: Path) -> Callable[[Prompt], Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        to_gguf(directory, file)
        from llama_cpp import Llama

        model = Llama(str(file), n_ctx=1024, n_batch=1024, logits_all=True, verbose=False)

    def logits_of(prompt: Prompt) -> Any:
        if prompt.image is not None:
            return None  # the vision tower is a file of its own there
        model.reset()
        model.eval(prompt.tokens)
        return np.array(model.scores[: len(prompt.tokens)])

    return logits_of


def to_gguf(directory: Path, file: Path) -> None:
    """By llama.cpp's own script. It knows tokenizers by a digest of their tokens, and a small model's is not among them."""
    sys.path[:0] = [str(CONVERTER.parent), str(CONVERTER.parent / "gguf-py")]
    specification = importlib.util.spec_from_file_location("convert_hf_to_gguf", CONVERTER)
    assert specification is not None
    assert specification.loader is not None
    converter: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(converter)
    base = getattr(converter, "ModelBase", None) or converter.Model
    for kind in [base, *subclasses(base)]:
        if hasattr(kind, "get_vocab_base_pre"):
            kind.get_vocab_base_pre = lambda self, tokenizer: "llama4"
    sys.argv = [str(CONVERTER), str(directory), "--outfile", str(file), "--outtype", "f32"]
    converter.main()


def subclasses(kind: type) -> list[type]:
    return [found for direct in kind.__subclasses__() for found in (direct, *subclasses(direct))]


if __name__ == "__main__":
    answer(open_model)
