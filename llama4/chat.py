"""From text, dialogs and images to what the model reads: token ids, and the pixels behind some of them.

The ids are those of Meta's `ChatFormat` (llama-models, `llama4/chat_format.py`). A turn of a dialog is

    <|header_start|> role <|header_end|> two line breaks, the content, <|eot|>

and a prompt is `<|begin_of_text|>`, the turns, and the header of the assistant's turn that is to be written. A tool's
output is the turn of a role spelt "ipython" and ends in `<|eom|>`: the exchange goes on. Every piece is encoded on its own,
so that no token reaches across the joint of two pieces.

An image becomes a stretch of `<|patch|>` tokens, one for each row that the vision tower puts out, tile by tile, row by row;
in the decoder these rows take the place of the tokens' embeddings. For a grid of 1 row by 2 columns:

    <|image_start|>  patches  <|tile_x_separator|>  patches  <|tile_y_separator|>  <|image|>  patches  <|image_end|>

The patches behind `<|image|>` are the global tile's. A single tile is its own global tile: no separators, only that part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from llama4.image import ImageTiles, Llama4ImageProcessor

PLACEHOLDER = "<|image|>"

# A tool's output has the header that models before Llama 4 knew for Python's; "ipython" is taken for the role as well.
_HEADER = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython", "ipython": "ipython"}
_END = {"end_of_turn": "<|eot|>", "end_of_message": "<|eom|>"}

_TEXT_TOKENS = ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>")
_IMAGE_TOKENS = (
    *("<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>"),
    *("<|tile_x_separator|>", "<|tile_y_separator|>"),
)


class Tokenizer(Protocol):
    """What is needed of a tokenizer; `llama4_convert.reference.tokenization.TextTokenizer` is one."""

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """The ids of `text` and no others. Whether text that spells a special token becomes it is `allow_special`."""
        ...

    def special(self, name: str) -> int:
        """The id of a special token by its spelling. Raises ValueError if there is none."""
        ...


@dataclass(frozen=True, eq=False)
class Inputs:
    """One prompt. `pixel_values`: float32 [tiles, 3, height, width], the tiles of all images in the order of the text.

    There are as many `<|patch|>` in `tokens` as the vision tower makes rows of all tiles, and in the same order.
    """

    tokens: list[int]
    pixel_values: Tensor | None


class Llama4Processor:
    """Makes a model's inputs. `image_processor` is None for a model without a vision tower.

    `patch_size` (pixels a side) and `pixel_shuffle_ratio` are the vision tower's: a tile of `image_size` pixels a side has
    (image_size / patch_size * pixel_shuffle_ratio)**2 rows. Raises ValueError if that is not made of whole numbers, and if
    the tokenizer lacks a special token that is needed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: Llama4ImageProcessor | None,
        *,
        patch_size: int = 14,
        pixel_shuffle_ratio: float = 0.5,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.patches_per_tile = 0
        if image_processor is not None:
            self.patches_per_tile = _patches_per_tile(image_processor.image_size, patch_size, pixel_shuffle_ratio)
        needed = _TEXT_TOKENS if image_processor is None else (*_TEXT_TOKENS, *_IMAGE_TOKENS)
        self._id = {name: tokenizer.special(name) for name in needed}

    def __call__(self, text: str, images: Sequence[Image.Image] = ()) -> Inputs:
        """`<|begin_of_text|>` and then `text`, where each `<|image|>` stands for the next image.

        Images come before a text that has no `<|image|>`. Any other special token that `text` spells becomes it, so a
        prompt can be written out in full (without its `<|begin_of_text|>`, which would stand twice). Raises ValueError if
        text and images do not match in number, for images where the model has no vision tower, and as the image
        processor does.
        """
        pieces = text.split(PLACEHOLDER)
        if images and len(pieces) == 1:
            pieces = [""] * len(images) + pieces
        if len(pieces) - 1 != len(images):
            raise ValueError(f"the text has {len(pieces) - 1} {PLACEHOLDER} for {len(images)} images")
        prompt = _Prompt(self, allow_special=True)
        for piece, image in zip(pieces, images, strict=False):  # the last piece has no image after it
            prompt.text(piece)
            prompt.image(image)
        prompt.text(pieces[-1])
        return prompt.inputs()

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> Inputs:
        """The prompt of a dialog, by default with the header of the assistant's next turn.

        A message is `{"role": ..., "content": ...}`, the role one of system, user, assistant and tool, the content a string
        or a list of strings, `{"type": "text", "text": string}` and `{"type": "image", "image": PIL image}`. An
        assistant's turn that went on with a tool's output has `"stop_reason": "end_of_message"` besides. Content that
        spells special tokens stays text: nobody can end their turn from inside it. Raises ValueError for anything else.
        """
        prompt = _Prompt(self, allow_special=False)
        for number, message in enumerate(messages):
            try:
                self._turn(prompt, message)
            except ValueError as error:
                raise ValueError(f"message {number}: {error}") from error
        if add_generation_prompt:
            prompt.header("assistant")
        return prompt.inputs()

    def _turn(self, prompt: _Prompt, message: Mapping[str, Any]) -> None:
        if unknown := set(message) - {"role", "content", "stop_reason"}:
            # Passing over tool_calls would leave out what the assistant said.
            raise ValueError(f"unknown keys {', '.join(sorted(map(repr, unknown)))}; write tool calls into the content")
        role, content = message.get("role"), message.get("content")
        if role not in _HEADER:
            raise ValueError(f"unknown role {role!r}; use system, user, assistant or tool")
        if isinstance(content, str):
            content = [content]
        if not isinstance(content, Sequence):
            raise ValueError(f"the content is a string or a list of parts, not {type(content).__name__}")
        reason = message.get("stop_reason")
        if reason is not None and (role != "assistant" or reason not in _END):
            raise ValueError(f"stop_reason {reason!r}; only the assistant has one: end_of_turn or end_of_message")

        prompt.header(_HEADER[role])
        for part in content:
            match part:
                case str(text) | {"type": "text", "text": str(text)}:
                    prompt.text(text)
                case {"type": "image", "image": Image.Image() as image}:
                    prompt.image(image)
                case _:
                    raise ValueError(f"a part is a text or an image as `chat` describes them, not {part!r:.60}")
        default = "end_of_message" if _HEADER[role] == "ipython" else "end_of_turn"
        prompt.special(_END[reason or default])

    def _image_tokens(self, tiles: ImageTiles) -> list[int]:
        patches = [self._id["<|patch|>"]] * self.patches_per_tile
        tokens = [self._id["<|image_start|>"]]
        rows, columns = tiles.grid
        if rows * columns > 1:
            for _ in range(rows):
                for column in range(columns):
                    if column:
                        tokens.append(self._id["<|tile_x_separator|>"])
                    tokens += patches
                tokens.append(self._id["<|tile_y_separator|>"])
        return [*tokens, self._id["<|image|>"], *patches, self._id["<|image_end|>"]]


class _Prompt:
    """Inputs in the making, beginning with `<|begin_of_text|>`."""

    def __init__(self, processor: Llama4Processor, allow_special: bool) -> None:
        self.processor = processor
        self.allow_special = allow_special
        self.tokens: list[int] = []
        self.tiles: list[Tensor] = []
        self.special("<|begin_of_text|>")

    def special(self, name: str) -> None:
        self.tokens.append(self.processor._id[name])

    def text(self, text: str) -> None:
        self.tokens += self.processor.tokenizer.encode(text, allow_special=self.allow_special)

    def header(self, role: str) -> None:
        self.special("<|header_start|>")
        self.text(role)
        self.special("<|header_end|>")
        self.text("\n\n")

    def image(self, image: Image.Image) -> None:
        if self.processor.image_processor is None:
            raise ValueError("there is an image, and the model has no vision tower")
        tiles = self.processor.image_processor(image)
        self.tokens += self.processor._image_tokens(tiles)
        self.tiles.append(tiles.pixel_values)

    def inputs(self) -> Inputs:
        return Inputs(self.tokens, torch.cat(self.tiles) if self.tiles else None)


def _patches_per_tile(image_size: int, patch_size: int, pixel_shuffle_ratio: float) -> int:
    """Rows that the vision tower makes of a tile: what pixel shuffle leaves of the patches.

    `ChatFormat` divides the patches by the rounded square of 1 / ratio: the same where that is a whole number, as in every
    published model, and elsewhere a number that its own tower would not deliver.
    """
    if patch_size < 1 or image_size % patch_size:
        raise ValueError(f"image_size ({image_size}) must be a multiple of patch_size ({patch_size})")
    side = image_size // patch_size * pixel_shuffle_ratio
    if not 0 < pixel_shuffle_ratio <= 1 or side % 1:
        raise ValueError(
            f"pixel_shuffle_ratio ({pixel_shuffle_ratio}) does not divide {image_size // patch_size} patches"
        )
    return int(side) ** 2
