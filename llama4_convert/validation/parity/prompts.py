"""What a model is tried on: random tokens, texts, token ids and images, as one padded batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4.config import Llama4Config
from llama4.config_differences import Difference
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import parse_json, read_at_most
from llama4_convert.reference.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from llama4.chat import Llama4Processor

_MAX_FILE_BYTES = 64 << 20
_TOKENS_BESIDE_TILE = 8  # on either side of a random tile
_TOKENS_SHOWN = 8  # of two lists of tokens, from where they differ


@dataclass(frozen=True)
class Prompt:
    """Token ids and the tiles that their `<|patch|>` stand for."""

    tokens: list[int]
    pixel_values: Tensor | None = None  # [tiles, 3, H, W]


@dataclass(frozen=True)
class Batch:
    """Prompts side by side, padded on the right, where causal attention lets padding change nothing."""

    tokens: Tensor  # [batch, tokens]
    is_real: Tensor  # [batch, tokens], False on padding
    targets: Tensor  # [batch, tokens], the token that follows; -1 if none does, or one that nobody predicts (<|patch|>)
    pixel_values: Tensor | None  # [tiles, 3, H, W]
    prompts: Sequence[Prompt]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return self.tokens.shape[1]

    @property
    def tiles(self) -> int:
        return 0 if self.pixel_values is None else len(self.pixel_values)

    @staticmethod
    def padded(prompts: Sequence[Prompt], config: Llama4Config) -> Batch:
        import torch

        length = max(len(prompt.tokens) for prompt in prompts)
        tokens = torch.zeros(len(prompts), length, dtype=torch.long)
        is_real = torch.zeros(len(prompts), length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt.tokens)] = torch.tensor(prompt.tokens)
            is_real[row, : len(prompt.tokens)] = True
        follows = torch.zeros_like(is_real)
        follows[:, :-1] = is_real[:, 1:]
        targets = torch.where(follows, tokens.roll(-1, 1), -1)
        targets[targets == config.image_token_index] = -1
        tiles = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
        return Batch(tokens, is_real, targets, torch.cat(tiles) if tiles else None, prompts)


@dataclass(frozen=True)
class PromptOptions:
    """What a user wants models to be tried on. With no file and no image: random tokens."""

    tokens: int  # random ones, where there is nothing else
    prompts: str | os.PathLike[str] | None = None  # a file of texts
    token_ids: str | os.PathLike[str] | None = None  # a file of ids
    images: Sequence[str | os.PathLike[str]] = ()
    seed: int = 0  # of random tokens

    def check(self) -> None:
        """Raises UsageError."""
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise UsageError("the seed must fit into 64 bits")
        if self.tokens < 1:
            raise UsageError("--tokens must be at least 1")


def make_batch(
    options: PromptOptions, original: Checkpoint, candidate: Checkpoint, config: Llama4Config
) -> tuple[Batch, list[Difference]]:
    """The prompts as the original's tokenizer writes them, and a difference if the candidate's makes other tokens of them.

    Raises UsageError, BadInput or EnvironmentFailed.
    """
    made: list[Prompt] = []
    differences: list[Difference] = []
    if options.prompts is not None or options.images:
        try:
            made += _encoded(options, original, config)
            theirs = _encoded(options, candidate, config)
        except ValueError as error:
            raise UsageError(f"the prompts do not fit {original.path}: {error}") from error
        for ours, other in zip(made, theirs, strict=True):
            if ours.tokens != other.tokens:
                at = next(i for i, (a, b) in enumerate(zip_longest(ours.tokens, other.tokens)) if a != b)
                shown = slice(at, at + _TOKENS_SHOWN)
                differences.append(Difference("tokenizer.json", ours.tokens[shown], other.tokens[shown]))
                break
    if options.token_ids is not None:
        made += prompts_of_ids(Path(options.token_ids))
    if not made:
        made = random_prompts(config, options.tokens, options.seed)
    check_prompts(made, config)
    return Batch.padded(made, config), differences


def _encoded(options: PromptOptions, checkpoint: Checkpoint, config: Llama4Config) -> list[Prompt]:
    """Texts and images as a checkpoint's own tokenizer writes them."""
    from llama4_convert.reference.generation import open_image, open_processor

    processor = open_processor(checkpoint, config)
    texts = prompts_of_file(Path(options.prompts), processor) if options.prompts is not None else []
    seen = [processor("<|image|>", [open_image(Path(image))]) for image in options.images]
    return [*texts, *(Prompt(inputs.tokens, inputs.pixel_values) for inputs in seen)]


def random_prompts(config: Llama4Config, n_tokens: int, seed: int = 0) -> list[Prompt]:
    """`n_tokens` random tokens; for a model that sees, also a tile of noise between a few more.

    Never `<|patch|>` outside a tile: it stands for pixels that there are none of.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    patch = config.image_token_index
    vocabulary = config.text_config.vocab_size

    def drawn(n: int) -> list[int]:
        ids = torch.randint(0, vocabulary - (patch is not None), (n,), generator=generator)
        return [i + (patch is not None and i >= patch) for i in ids.tolist()]

    prompts = [Prompt(drawn(n_tokens))]
    vision = config.vision_config
    if vision and patch is not None and patch < vocabulary:
        tile = torch.rand((1, 3, vision.image_size, vision.image_size), generator=generator) * 2 - 1
        patches = [patch] * vision.tokens_a_tile
        prompts.append(Prompt([*drawn(_TOKENS_BESIDE_TILE), *patches, *drawn(_TOKENS_BESIDE_TILE)], tile))
    return prompts


def prompts_of_file(path: Path, processor: Llama4Processor) -> list[Prompt]:
    """One prompt a line of text. Raises UsageError or BadInput."""
    lines = [line for line in _read(path).splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"{path} holds no prompt: write one a line")
    return [Prompt(processor(line).tokens) for line in lines]


def prompts_of_ids(path: Path) -> list[Prompt]:
    """Token ids: a JSON list of lists, or one prompt a line with ids between blanks or commas. Raises UsageError, BadInput."""
    text = _read(path)
    try:
        rows: Any = parse_json(text)
        if type(rows) is int:
            rows = [rows]
        if isinstance(rows, list) and rows and all(type(i) is int for i in rows):
            rows = [rows]
    except (ValueError, RecursionError):
        rows = [_ids(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{path} holds no token ids: write a JSON list of lists, or one prompt a line")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or not row or not all(type(i) is int for i in row):
            raise BadInput(f"{path}: prompt {number} is no list of token ids")
    return [Prompt(row) for row in rows]


def _ids(path: Path, number: int, line: str) -> list[int]:
    try:
        return [int(i) for i in line.replace(",", " ").split()]
    except ValueError:
        raise BadInput(f"{path}: line {number} is no list of token ids: {line[:40]!r}") from None


def _read(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"{path} is no regular file: give a file of prompts")
    data = read_at_most(path, _MAX_FILE_BYTES)
    if data is None:
        raise UsageError(f"{path} has more than {_MAX_FILE_BYTES >> 20} MiB: that is no list of prompts")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def check_prompts(prompts: Sequence[Prompt], config: Llama4Config) -> None:
    """Raises BadInput for a token outside the vocabulary, UsageError where tiles and `<|patch|>` do not match.

    Without any tile a `<|patch|>` is a token as any other.
    """
    vision = config.vision_config
    patch = config.image_token_index
    patches = 0 if patch is None else sum(prompt.tokens.count(patch) for prompt in prompts)
    tiles = sum(len(p.pixel_values) for p in prompts if p.pixel_values is not None)
    if vision and tiles and patches != tiles * vision.tokens_a_tile:
        raise UsageError(
            f"the prompts have {patches} <|patch|> tokens, and their pictures make {tiles * vision.tokens_a_tile}"
        )
    for number, prompt in enumerate(prompts, 1):
        for token in prompt.tokens:
            if not 0 <= token < config.text_config.vocab_size:
                raise BadInput(
                    f"prompt {number} has token {token}, and the vocabulary ends at {config.text_config.vocab_size - 1}"
                )
