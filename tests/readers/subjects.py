"""The directories that readers are given, small models in every format, and what the reference makes of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from llama4_convert import convert, load_reference, synth
from llama4_convert.reference.checkpoint import Checkpoint
from llama4_convert.reference.generation import open_processor

TEXT = (
    3
    * """The built-in function open() returns a file object. If the object is not a subclass of it, a TypeError is raised.
The first argument is a string that names the file; the second one describes the way in which it will be used. It is optional.
"""
)
PICTURE_TEXT = "<|image|> of one colour"


def trained(folder: Path, **changes: Any) -> Path:
    """The trained model that `demo` ships, in Meta's layout; with `changes` to its params.json."""
    with resources.as_file(resources.files("llama4_convert.samples") / "demo_model") as shipped:
        copytree(shipped, folder, dirs_exist_ok=True)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | changes))
    return folder


def dense(folder: Path) -> Path:
    """Random numbers in Guard's shape: no experts, no chunks, no NoPE layers."""
    synth(folder, geometry="guard", tiny=True)
    return folder


def made(directory: Path, source: Callable[[Path], Path], **options: Any) -> None:
    convert(source(directory.with_name(f"{directory.name} source")), directory, **options)


# Chunks and the steps of the temperature as published, which some readers take for given.
published = partial(trained, attention_chunk_size=8192, floor_scale=8192.0)
SUBJECTS: dict[str, Callable[[Path], None]] = {
    "bf16": partial(made, source=trained),
    "text-only": partial(made, source=trained, text_only=True),
    "chunks of 8,192": partial(made, source=published, text_only=True),
    "dense": partial(made, source=dense),
    "int4": partial(made, source=trained, recipe="int4"),
    "fp8": partial(made, source=trained, recipe="fp8"),
    "mixed": partial(made, source=trained, recipe="mixed"),
    "nf4": partial(made, source=trained, recipe="nf4"),
}


def prompts(directory: Path) -> dict[str, dict[str, Any]]:
    """name -> the fields of a `Prompt` of scripts/prompts.py: a text longer than a chunk, and with a vision tower a picture."""
    checkpoint = Checkpoint.open(directory)
    process = open_processor(checkpoint, checkpoint.config)
    text = process(TEXT)
    found = {"text": {"text": TEXT, "tokens": text.tokens}}
    if checkpoint.config.vision_config:
        side = checkpoint.config.vision_config.image_size
        image = Image.new("RGB", (side, side), "white")
        ImageDraw.Draw(image).ellipse((side // 4, side // 4, 3 * side // 4, 3 * side // 4), fill="red")
        seen = process(PICTURE_TEXT, [image])
        assert seen.pixel_values is not None
        fields = {"tokens": seen.tokens, "pixel_values": seen.pixel_values.float().numpy(), "image": np.asarray(image)}
        found["picture"] = {"text": PICTURE_TEXT, **fields}
    return found


def store(asked: dict[str, dict[str, Any]], path: Path) -> None:
    """As scripts/prompts.py reads them."""
    stored: dict[str, Any] = {"names": np.array(list(asked))}
    for name, fields in asked.items():
        stored[f"{name}.fields"] = np.array(list(fields))
        stored |= {f"{name}.{field}": np.asarray(value) for field, value in fields.items()}
    np.savez(path, **stored)


def expected(directory: Path, asked: dict[str, dict[str, Any]]) -> dict[str, NDArray[np.float32]]:
    """Logits [tokens, vocabulary] of the reference in float32, of each prompt."""
    model = load_reference(directory, dtype=torch.float32)
    found = {}
    for name, fields in asked.items():
        pixels = fields.get("pixel_values")
        with torch.no_grad():
            tokens = torch.tensor([fields["tokens"]])
            logits = model(tokens, pixel_values=None if pixels is None else torch.tensor(pixels))
        found[name] = logits[0].numpy()
    return found


def kl(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Mean divergence in nats a token; positions of which the reader says nothing are NaN, and left out."""
    said = ~np.isnan(found).all(-1)
    p, q = (log_softmax(logits[said].astype(np.float64)) for logits in (reference, found))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
