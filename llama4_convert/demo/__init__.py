"""`demo`: the whole way on a small random model, with a check at every step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llama4_convert import convert, synth, verify
from llama4_convert.errors import CheckFailed
from llama4_convert.reference import Checkpoint

_PROMPT = "The quick brown fox"


def demo(
    folder: str | os.PathLike[str],
    *,
    say: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Synthesize a tiny Scout in Meta's format under `folder`, convert it, check it. Raises CheckFailed at the first fault."""
    folder = Path(folder)
    meta, output = folder / "meta", folder / "transformers"
    made = synth(meta, geometry="scout", tiny=True, ranks=2)
    say(f"1. synth    {meta}: {made['parameters'] / 1e6:.1f} M random parameters in Meta's format, 2 ranks")
    converted = convert(meta, output, warn=warn, variant="instruct")
    say(f"2. convert  {output}: {len(converted['files'])} files, {converted['status']}")
    verified = verify(output)
    if not verified["ok"]:
        raise CheckFailed(f"{output}: {verified['advice']}")
    say(f"3. verify   every byte of {len(verified['files'])} files matches its SHA-256")
    compared = compare(meta, output)
    say(f"4. compare  {compared} logical tensors are equal bit by bit, each layout bound by hand")
    loaded = _load(output)
    say(f"5. load     {loaded}")
    return {"meta": str(meta), "output": str(output), "tensors_compared": compared, "transformers": loaded}


def compare(meta: Path, output: Path) -> int:
    """Hold every logical tensor of both layouts against each other; returns how many. Raises CheckFailed, naming it."""
    reference, candidate = Checkpoint.open(meta), Checkpoint.open(output)
    compared = 0
    pairs = zip(reference.logical_tensors(), candidate.logical_tensors(reference.config), strict=True)
    for a, b in pairs:
        if not np.array_equal(a.load(None), b.load(None)):
            raise CheckFailed(f"{b.keys[0]} ({b.name}) differs: the conversion is wrong, please report it")
        compared += 1
    return compared


def _load(output: Path) -> str:
    """What Transformers makes of the directory, in words."""
    try:
        import torch
        from transformers import AutoTokenizer, Llama4ForConditionalGeneration
    except ImportError:
        return "skipped: Transformers is not installed (pip install 'llama4-convert[transformers]')"
    loaded: Any = Llama4ForConditionalGeneration.from_pretrained(output, dtype=torch.bfloat16, output_loading_info=True)
    model, info = loaded
    problems = {kind: keys for kind, keys in info.items() if keys and kind.endswith("_keys")}
    if problems:
        raise CheckFailed(f"{output}: Transformers reports {problems}")
    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer(_PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    n = tokens.shape[1] - inputs["input_ids"].shape[1]
    return f"Transformers finds no missing, unexpected or mismatched key, and generates {n} tokens (random weights: no sense)"
