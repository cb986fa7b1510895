"""A model as a chain of stages, each run on several states at once, so that every weight is read once.

    vision.embed  vision.layers.0 ...  vision.adapter  vision.projector  embed  layers.0 ...  norm

A *state* is what a stage hands to the next: the tower's activations, the features of all tiles, the residual stream of all
prompts [batch, tokens, hidden]. Our own model runs any stage on any state; of others there is a record of what they made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llama4.config import Llama4Config
from llama4.model import Llama4ForCausalLM, Llama4ForConditionalGeneration
from llama4.text import choose
from llama4.vision import Llama4VisionModel
from llama4_convert.validation.parity.prompts import Batch


class Step(NamedTuple):
    """What a stage made: its state, and of a mixture of experts the router's scores [batch * tokens, experts]."""

    state: Tensor
    scores: Tensor | None = None


def stages(config: Llama4Config, batch: Batch) -> list[str]:
    """The stages that a batch goes through, in order."""
    names = []
    if config.vision_config and batch.pixel_values is not None:
        layers = range(config.vision_config.num_hidden_layers)
        names += ["vision.embed", *(f"vision.layers.{i}" for i in layers), "vision.adapter", "vision.projector"]
    return [*names, "embed", *(f"layers.{i}" for i in range(config.text_config.num_hidden_layers)), "norm"]


def layer_of(stage: str) -> int | None:
    """The layer of the text model that a stage is."""
    return int(stage.removeprefix("layers.")) if stage.startswith("layers.") else None


class Record(Protocol):
    """What a model has made of a batch, kept by stage."""

    def step(self, stage: str) -> Step | None:
        """What the stage made; None if it was not kept."""
        ...


class Live:
    """Our model on a batch."""

    def __init__(self, model: Llama4ForCausalLM, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self._scores: Tensor | None = None
        model.model.observe = self._observe

    def _observe(self, name: str, tensor: Tensor) -> None:
        if name.endswith(".router"):
            self._scores = tensor

    def top_k(self) -> int:
        return self.model.config.text_config.num_experts_per_tok

    def run(self, stage: str, states: Sequence[Tensor | None], chosen: Sequence[Tensor | None] = ()) -> list[Step]:
        """The stage on each of `states`; of a layer, `chosen` names each one's experts [batch * tokens, top_k] or None."""
        layer = layer_of(stage)
        if layer is None:
            return [Step(self._stage(stage, state)) for state in states]
        together = [state for state in states if state is not None]
        forced = _together(chosen, together[0].shape[:2].numel(), self.top_k())
        self._scores = None
        out = self.model.model.layer(layer, torch.cat(together), chosen=forced)
        scores = self._scores.chunk(len(together)) if self._scores is not None else [None] * len(together)
        return [Step(state, score) for state, score in zip(out.chunk(len(together)), scores, strict=True)]

    def _stage(self, stage: str, state: Tensor | None) -> Tensor:
        model = self.model
        if stage == "embed":
            return model.merge(self.batch.tokens, state)
        if stage == "vision.embed":
            return self._vision.embed(self._pixels)
        assert state is not None
        match stage:
            case "norm":
                return model.model.final_norm(state)
            case "vision.adapter":
                return self._vision.adapt(state)
            case "vision.projector":
                assert isinstance(model, Llama4ForConditionalGeneration)
                return model.project(state)
        return self._vision.layer(int(stage.removeprefix("vision.layers.")), state)

    @property
    def _vision(self) -> Llama4VisionModel:
        assert isinstance(self.model, Llama4ForConditionalGeneration)  # wherever there are stages of vision
        return self.model.vision_model

    @property
    def _pixels(self) -> Tensor:
        assert self.batch.pixel_values is not None
        return self.batch.pixel_values.to(self.model.weights["vision.class_embedding"])


def _together(chosen: Sequence[Tensor | None], rows: int, top_k: int) -> Tensor | None:
    if not any(one is not None for one in chosen):
        return None
    own = torch.full((rows, top_k), -1)
    return torch.cat([own if one is None else one for one in chosen])


def experts_of(scores: Tensor, top_k: int) -> Tensor:
    """The experts that each token goes to, [rows, top_k], sorted, so that equal sets are equal rows."""
    return choose(scores, top_k).sort(-1).values
