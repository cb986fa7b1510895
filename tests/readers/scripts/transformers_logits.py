"""Transformers, of any release that knows Llama 4: the model, and the tokens that its tokenizer and processor make."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from prompts import Prompt, answer

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def open_model(directory: Path, **options: Any) -> Callable[[Prompt], Any]:
    config = json.loads((directory / "config.json").read_text())
    whole, quantized = "text_config" in config, config.get("quantization_config", {})
    # Beside bitsandbytes' modules, which compute in bf16, some releases leave others in bf16, whatever was asked for.
    dtype = torch.bfloat16 if quantized.get("quant_method") == "bitsandbytes" else torch.float32
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    transformers.logging.add_handler(handler)
    kind = transformers.Llama4ForConditionalGeneration if whole else transformers.Llama4ForCausalLM
    options["dtype" if RELEASE >= (4, 56) else "torch_dtype"] = dtype
    model, info = kind.from_pretrained(directory, output_loading_info=True, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # Some releases report weights that they decompress later; where one is really missing the logits tell.
        if info[problem] and not quantized:
            raise ValueError(f"{problem}: {sorted(map(str, info[problem]))[:2]}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    processor = transformers.AutoProcessor.from_pretrained(directory) if whole else None
    if wrong := [text for text in said if "regex" in text]:
        raise ValueError(wrong[0])

    def logits_of(prompt: Prompt) -> Any:
        tokens = torch.tensor([prompt.tokens])
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if prompt.pixel_values is None:
            found = tokenizer(prompt.text).input_ids
        else:
            assert processor is not None
            found = processor(text=prompt.text, images=[Image.fromarray(prompt.image)]).input_ids[0]
            inputs["pixel_values"] = torch.tensor(prompt.pixel_values, dtype=dtype)
        if list(found) != prompt.tokens:
            raise ValueError(f"its tokens are {list(found)[:8]} ..., not {prompt.tokens[:8]} ...")
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits[0].float().numpy()

    return logits_of


if __name__ == "__main__":
    answer(open_model)
