"""`generate`: complete a prompt with the reference model, from a checkpoint in either layout."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from llama4.config import Llama4Config
from llama4.geometry import InvalidModel
from llama4_convert.checkpoints.manifest import make_again
from llama4_convert.errors import BadInput, UsageError, one_line
from llama4_convert.reference.checkpoint import Checkpoint, model_of
from llama4_convert.reference.tokenization import TextTokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

    from llama4.chat import Llama4Processor

_KEPT_WEIGHTS_BYTES = 8 << 30
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # others have decoders that start programs
_MAX_PIXELS = 1 << 25  # of a picture before it is made smaller: 128 MiB with transparency; the model sees 1.8 million


class Generation(Struct, frozen=True, kw_only=True):
    """What a model wrote."""

    path: str
    """DIR"""
    prompt_tokens: list[int]
    """ids"""
    tokens: list[int]
    """ids that were written"""
    text: str
    """the same as text"""
    stop_reason: Literal["stop_token", "max_new_tokens"]
    """why it ended"""


def generate(
    path: str | os.PathLike[str],
    prompt: str,
    *,
    image: str | os.PathLike[str] | None = None,
    chat: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Generation:
    """What the model at `path` makes of `prompt`; `say` takes the text as it comes, `warn` what a user should know of the files.

    The prompt is completed as it stands, behind `<|begin_of_text|>`; with `chat` it is a user's message and the assistant's
    answer is written. `image` is a file that goes where the prompt says `<|image|>`, or before it. Temperature 0 is greedy.
    `dtype` is what the model computes in (None: the checkpoint's). Raises UsageError, BadInput or EnvironmentFailed.
    """
    import torch

    from llama4.generate import NotANumber
    from llama4.generate import generate as steps

    checkpoint = Checkpoint.open(path)
    for note in checkpoint.notes:
        warn(note)
    processor = open_processor(checkpoint, checkpoint.config)
    images = [open_image(Path(image))] if image is not None else []
    try:
        if chat:
            content = [*({"type": "image", "image": picture} for picture in images), prompt]
            inputs = processor.chat([{"role": "user", "content": content}])
        else:
            inputs = processor(prompt, images)
    except ValueError as error:
        raise UsageError(f"the prompt does not fit {path}: {error}") from error

    tokenizer = processor.tokenizer
    assert isinstance(tokenizer, TextTokenizer)
    stream, ids = tokenizer.stream(), []
    try:
        model = model_of(
            checkpoint, dtype=None if dtype is None else getattr(torch, dtype), keep_bytes=_KEPT_WEIGHTS_BYTES
        )
        with torch.inference_mode():
            for step in steps(
                model,
                torch.tensor([inputs.tokens]),
                inputs.pixel_values,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                stop=checkpoint.stop_ids,
                seed=seed,
            ):
                ids.append(int(step))
                say(stream.push(ids[-1]) if ids[-1] not in checkpoint.stop_ids else "")
    except (InvalidModel, NotANumber) as error:
        raise BadInput(f"{path}: {error}: {make_again(Path(path))}") from error
    except (ValueError, IndexError) as error:  # numbers out of range; a tokenizer with more tokens than the model
        raise UsageError(f"{path}: {error}") from error
    say(stream.finish())
    stopped = bool(ids) and ids[-1] in checkpoint.stop_ids
    return Generation(
        path=str(path),
        prompt_tokens=inputs.tokens,
        tokens=ids,
        text=tokenizer.decode(ids[:-1] if stopped else ids),
        stop_reason="stop_token" if stopped else "max_new_tokens",
    )


def open_processor(checkpoint: Checkpoint, config: Llama4Config) -> Llama4Processor:
    """The processor of a checkpoint: its own tokenizer, and the tiles of `config`. Raises BadInput or EnvironmentFailed."""
    from llama4.chat import Llama4Processor
    from llama4.image import Llama4ImageProcessor

    tokenizer = TextTokenizer.open(checkpoint.path)
    vision = config.vision_config
    try:
        if vision is None:
            return Llama4Processor(tokenizer, None)
        return Llama4Processor(
            tokenizer,
            Llama4ImageProcessor(vision.image_size),
            patch_size=vision.patch_size,
            pixel_shuffle_ratio=vision.pixel_shuffle_ratio,
        )
    except ValueError as error:
        raise BadInput(f"{checkpoint.path}: {error}") from error


def open_image(path: Path) -> Image:
    """A picture file, decoded and turned as its EXIF says, as Transformers' `load_image` does. Raises BadInput.

    The mode stays: what becomes of transparency is the image processor's matter.
    """
    from PIL import Image, ImageOps

    if not path.is_file():
        raise BadInput(f"{path} is no regular file: give a picture")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_PICTURE_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"{image.width:,} x {image.height:,} pixels are more than {_MAX_PIXELS:,}")
            return ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise of every kind
        raise BadInput(f"{path} is no image that can be read: {one_line(error, 120)}") from error
