"""The whole model: text alone, or text with a vision tower, and the output head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llama4.cache import KVCache
from llama4.config import Llama4Config, check_runnable
from llama4.generate import generate
from llama4.loading import Weights
from llama4.text import Llama4TextModel, Observer
from llama4.vision import Llama4VisionModel

# Rows of the vocabulary that the output head computes at a time: Scout's whole head is 4 GB in fp32.
HEAD_ROWS = 16384


class Llama4ForCausalLM:
    """Token ids to logits. `observe`: see `Llama4TextModel`."""

    def __init__(self, config: Llama4Config, weights: Weights, observe: Observer | None = None) -> None:
        self.config, self.weights = config, weights
        self.model = Llama4TextModel(config.text_config, weights, observe)

    def __call__(self, tokens: Tensor, pixel_values: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Token ids [batch, tokens], and tiles [tiles, 3, H, W] in order, to logits [batch, tokens, vocabulary].

        With a cache the tokens go on where it ends, and it grows by them. Raises ValueError if the tiles and the patch tokens
        do not match, IndexError for a token outside the vocabulary.
        """
        return self.logits(self.hidden_states(tokens, pixel_values, cache))

    def hidden_states(self, tokens: Tensor, pixel_values: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """What the output head sees: [batch, tokens, hidden]."""
        return self.model(self.embed(tokens, pixel_values), cache)

    def embed(self, tokens: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """The first layer's input, [batch, tokens, hidden]."""
        if pixel_values is not None:
            raise ValueError("this model has no vision tower: it takes no images")
        return self.merge(tokens)

    def merge(self, tokens: Tensor, features: Tensor | None = None) -> Tensor:
        """The tokens' embeddings, those of `<|patch|>` replaced by features [tiles * tokens a tile, hidden] if there are any."""
        x = self.model.embed(tokens)
        if features is None:
            return x
        patches = tokens.eq(-1 if self.config.image_token_index is None else self.config.image_token_index)
        if int(patches.sum()) != features.shape[0]:
            raise ValueError(
                f"the tiles make {features.shape[0]} features, and the text has {int(patches.sum())} <|patch|> tokens"
            )
        return x.masked_scatter(patches[..., None], features)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., vocabulary]."""
        return torch.cat([part for _, part in self.logit_slices(hidden)], dim=-1)

    def logit_slices(self, hidden: Tensor, rows: int = HEAD_ROWS) -> Iterator[tuple[int, Tensor]]:
        """The logits `rows` tokens of the vocabulary at a time, each with the id of its first."""
        vocabulary = self.config.text_config.vocab_size
        for start in range(0, vocabulary, rows):
            yield start, F.linear(hidden, self.weights.rows("output", slice(start, min(start + rows, vocabulary))))

    @torch.inference_mode()
    def generate(
        self,
        tokens: Tensor,
        pixel_values: Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Iterable[int] = (),
        seed: int | None = None,
    ) -> Tensor:
        """The prompt [batch, tokens] with what follows it, [batch, tokens + up to max_new_tokens].

        A row that has ended is filled up with the token that ended it. `llama4.generate.generate` yields the same a step at a
        time and says what the arguments mean.
        """
        steps = generate(
            self,
            tokens,
            pixel_values,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=stop,
            seed=seed,
        )
        return torch.cat([tokens, *(step[:, None] for step in steps)], dim=1)


class Llama4ForConditionalGeneration(Llama4ForCausalLM):
    """With a vision tower: the features of tiles take the places of the `<|patch|>` tokens, in order."""

    def __init__(self, config: Llama4Config, weights: Weights, observe: Observer | None = None) -> None:
        super().__init__(config, weights, observe)
        if config.vision_config is None:
            raise ValueError("the configuration has no vision_config: use Llama4ForCausalLM")
        self.vision_model = Llama4VisionModel(config.vision_config, weights, observe)

    def embed(self, tokens: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        return self.merge(tokens, None if pixel_values is None else self.image_features(pixel_values))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Tiles [tiles, 3, H, W] to rows of the text's embeddings, [tiles * tokens a tile, hidden]."""
        dtype = self.weights["vision.class_embedding"].dtype
        return self.project(self.vision_model(pixel_values.to(dtype)))

    def project(self, features: Tensor) -> Tensor:
        """The vision tower's features [tiles, tokens a tile, vision_output_dim] in the text's width, as rows."""
        return F.linear(features.flatten(0, 1), self.weights["vision.projection"])


def build(config: Llama4Config, weights: Weights, observe: Observer | None = None) -> Llama4ForCausalLM:
    """The class that the configuration calls for. Raises ConfigError for one that contradicts itself."""
    check_runnable(config)
    kind = Llama4ForCausalLM if config.vision_config is None else Llama4ForConditionalGeneration
    return kind(config, weights, observe)
