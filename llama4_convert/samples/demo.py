"""`demo`: the whole way on a small Llama 4 that was really trained and ships with us, with a check at every step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from llama4_convert.conversion.convert import convert
from llama4_convert.errors import CheckFailed, from_os_error
from llama4_convert.inspection.verify import verify
from llama4_convert.reference.generation import generate
from llama4_convert.reports.validation import validate_verdict
from llama4_convert.validation.results import Validation

if TYPE_CHECKING:
    from PIL.Image import Image

# What the model, trained on Python's documentation (`train_demo.py`), has something to say about.
PROMPT = "If the object is"
_NEW_TOKENS = 24
_FILES = ("params.json", "tokenizer.model", "consolidated.00.pth", "consolidated.01.pth", "README.md")


class Demonstration(Struct, frozen=True, kw_only=True):
    """What the demo made and found."""

    meta: str
    """where the model is, in Meta's layout"""
    output: str
    """where it is converted"""
    validate: dict[str, Validation]
    """results of `validate`: by the reference model, in Transformers if that is installed, and of the int4 model"""
    texts: dict[str, str]
    """what each model wrote"""
    caption: str
    """what it wrote of the picture"""


def demo(
    folder: str | os.PathLike[str],
    *,
    say: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Demonstration:
    """Copy the small model to `folder`, convert it, check and use the result. Raises CheckFailed at the first fault."""
    folder = Path(folder)
    meta, output = folder / "meta", folder / "transformers"
    size = _copy_model(meta)
    say(
        f"1. model     {meta}: a small Llama 4, trained on Python's documentation; Meta's format, 2 ranks, {size / 1e6:.1f} MB"
    )
    converted = convert(meta, output, warn=warn)
    say(f"2. convert   {output}: {len(converted.files)} files, {converted.status}, variant {converted.variant}")
    verified = verify(output)
    if not verified.ok:
        raise CheckFailed(f"{output}: {verified.advice}")
    say(f"3. verify    every byte of {len(verified.files)} files matches its SHA-256")

    checks = {"llama4": _validate(meta, output, "llama4")}
    ours = checks["llama4"]
    say(
        f"4. validate  every field of config.json is right; {ours.tensors_compared} tensors are equal bit by bit;"
        f" KL {_nats(ours.kl_mean)}"
    )
    has_transformers = _has_transformers()
    if has_transformers:
        checks["transformers"] = _validate(meta, output, "transformers")
        say(f"             the same in Transformers: KL {_nats(checks['transformers'].kl_mean)}")

    texts = {
        "meta": generate(meta, PROMPT, max_new_tokens=_NEW_TOKENS, dtype="float32").text,
        "transformers layout": generate(output, PROMPT, max_new_tokens=_NEW_TOKENS, dtype="float32").text,
    }
    if has_transformers:
        texts["Transformers"] = _complete_in_transformers(output)
    if len(set(texts.values())) > 1:
        raise CheckFailed(f"{output}: the same prompt is completed in different ways: {texts}")
    where = "both layouts and Transformers agree" if has_transformers else "both layouts agree"
    say(f"5. generate  {where}: {_one_line(PROMPT + texts['meta'])} ...")
    picture = folder / "picture.png"
    _red_circle().save(picture)
    captions = {str(path): _caption(path, picture) for path in (meta, output)}
    if len(set(captions.values())) > 1:
        raise CheckFailed(f"{output}: the same picture is described in different ways: {captions}")
    caption = captions[str(output)]
    say(f"             and of {picture}: {caption}")
    small = folder / "int4"
    quantized = convert(output, small, recipe="int4").quantization
    assert quantized
    checks["int4"] = _validate(meta, small, "llama4")
    say(
        f"6. quantize  {small}: feed-forward weights in {quantized.bits_per_quantized_weight:.2f} bits, relative squared error"
        f" {quantized.relative_mse:.4f}; KL {_nats(checks['int4'].kl_mean)}, top-1"
        f" {checks['int4'].top1_agreement:.1%}"
    )
    if not has_transformers:
        say("             (Transformers is not installed: pip install 'llama4-convert[transformers]')")
    return Demonstration(meta=str(meta), output=str(output), validate=checks, texts=texts, caption=caption)


def _copy_model(meta: Path) -> int:
    """The shipped checkpoint under `meta`; returns its bytes."""
    size = 0
    try:
        meta.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            with resources.as_file(resources.files("llama4_convert.samples") / "demo_model" / name) as file:
                shutil.copyfile(file, meta / name)
            size += (meta / name).stat().st_size
    except OSError as error:
        raise from_os_error(error, f"writing {meta}") from error
    return size


def _validate(meta: Path, output: Path, runner: str) -> Validation:
    from llama4_convert.validation.validate import validate

    result = validate(output, reference=meta, runner=runner)
    if not result.passed:
        raise CheckFailed(f"{output} is not what {meta} is: {validate_verdict(result)}")
    return result


def _has_transformers() -> bool:
    from importlib.util import find_spec

    return find_spec("transformers") is not None


def _complete_in_transformers(output: Path) -> str:
    import torch
    from transformers import AutoTokenizer

    from llama4_convert.validation.parity.transformers_runner import load_transformers, quiet

    with quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = load_transformers(output, torch.float32).generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
    text: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def _red_circle(size: int = 56) -> Image:
    """A picture of the kind that the model was trained on, as large as one tile."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(picture).ellipse((size // 4, size // 4, 3 * size // 4, 3 * size // 4), fill="red")
    return picture


def _caption(path: Path, picture: Path) -> str:
    return generate(path, "<|image|>", image=picture, max_new_tokens=16, dtype="float32").text.strip()


def _nats(kl: float | None) -> str:
    """What is only rounding differs from machine to machine, and from one number of threads to another."""
    if kl is None:
        return "not a number"
    return "below 1e-9 nats a token" if kl < 1e-9 else f"{kl:.1g} nats a token"


def _one_line(text: str) -> str:
    return " ".join(text.split())
