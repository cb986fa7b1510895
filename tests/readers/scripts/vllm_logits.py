"""vLLM's own server code in this process, on its CPU build: log-probabilities of prompts, over the whole vocabulary."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import numpy as np
from PIL import Image
from prompts import Prompt, answer
from vllm import LLM, SamplingParams


def open_model(directory: Path) -> Callable[[Prompt], Any]:
    body = json.loads((directory / "config.json").read_text())
    vocabulary = body.get("text_config", body)["vocab_size"]
    model = LLM(
        str(directory),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=1,
        max_logprobs=vocabulary,
        limit_mm_per_prompt={"image": 1},
    )
    asked = SamplingParams(max_tokens=1, prompt_logprobs=vocabulary, detokenize=False)

    def logits_of(prompt: Prompt) -> Any:
        inputs: dict[str, Any] = {"prompt_token_ids": prompt.tokens}
        if prompt.image is not None:
            inputs = {"prompt": prompt.text, "multi_modal_data": {"image": Image.fromarray(prompt.image)}}
        [result] = model.generate([inputs], asked, use_tqdm=False)
        if list(result.prompt_token_ids) != prompt.tokens:
            raise ValueError(f"its tokens are {result.prompt_token_ids[:8]} ..., not {prompt.tokens[:8]} ...")
        # It says nothing of what follows the last token, and of the first there is no prediction.
        made = np.full((len(prompt.tokens), vocabulary), np.nan, np.float32)
        for position, row in enumerate(result.prompt_logprobs[1:]):
            for token, entry in row.items():
                made[position, token] = entry.logprob
        return made

    return logits_of


if __name__ == "__main__":
    answer(open_model)
