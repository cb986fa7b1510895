"""The vision tower: a tile's patches through a transformer, pixel shuffle, and the adapter.

Axes: N tiles, P patches, d width of the tower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llama4.config import Llama4VisionConfig
from llama4.loading import Weights
from llama4.text import Observer, rotate


class Llama4VisionModel:
    """Tiles [N, 3, image_size, image_size] to features [N, tokens a tile, vision_output_dim]."""

    def __init__(self, config: Llama4VisionConfig, weights: Weights, observe: Observer | None = None) -> None:
        self.config, self.weights = config, weights
        self.observe: Observer = observe or (lambda name, tensor: None)
        self.angles = rope_angles_2d(config)

    def __call__(self, pixel_values: Tensor) -> Tensor:
        x = self.embed(pixel_values)
        for index in range(self.config.num_hidden_layers):
            x = self.layer(index, x)
            self.observe(f"vision.layers.{index}", x)
        return self.adapt(x)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches as vectors, the class token *behind* them, positions added: [N, P + 1, d]."""
        w, c = self.weights, self.config
        patches = F.unfold(pixel_values, kernel_size=c.patch_size, stride=c.patch_size).transpose(1, 2)
        x = F.linear(patches, w["vision.patch_embedding"])
        class_token = w["vision.class_embedding"].expand(x.shape[0], 1, -1)
        x = torch.cat([x, class_token], dim=1) + w["vision.position_embedding"]
        x = self._norm("vision.ln_pre", x)
        self.observe("vision.embed", x)
        return x

    def layer(self, index: int, x: Tensor) -> Tensor:
        """One encoder layer, [N, P + 1, d]: every patch sees every other."""
        at = f"vision.layers.{index}."
        x = x + self._attention(at, self._norm(f"{at}ln_1", x))
        hidden = F.gelu(self._linear(f"{at}c_fc", self._norm(f"{at}ln_2", x)))
        return x + self._linear(f"{at}c_proj", hidden)

    def adapt(self, x: Tensor) -> Tensor:
        """Encoder output [N, P + 1, d] to features: the class token goes, neighbours join, two layers follow."""
        x = self._norm("vision.ln_post", x)[:, :-1]
        x = pixel_shuffle(x, self.config.pixel_shuffle_ratio)
        for name in ("vision.adapter.c_fc", "vision.adapter.c_proj"):
            x = F.gelu(F.linear(x, self.weights[name]))
        self.observe("vision.adapter", x)
        return x

    def _attention(self, at: str, x: Tensor) -> Tensor:
        q, k, v = (self._linear(at + name, x).view(*x.shape[:2], self.config.num_attention_heads, -1) for name in WQKV)
        angles = self.angles.to(x.device)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, angles), rotate(k, angles), v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self._linear(f"{at}wo", out.transpose(1, 2).flatten(2))

    def _linear(self, at: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{at}.weight"], self.weights[f"{at}.bias"])

    def _norm(self, at: str, x: Tensor) -> Tensor:
        w = self.weights
        return F.layer_norm(x, x.shape[-1:], w[f"{at}.weight"], w[f"{at}.bias"], self.config.norm_eps)


WQKV = ("wq", "wk", "wv")


def rope_angles_2d(config: Llama4VisionConfig) -> Tensor:
    """The angle of each rotated pair at each patch, and none at the class token: fp32 [P + 1, h / 2].

    Half of the pairs turn with the column, half with the row, both counted from 1 (`VisionEncoder` in Meta's encoder.py).
    """
    side, half = config.patches_a_side, config.hidden_size // config.num_attention_heads // 2
    frequencies = 1.0 / (config.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half))
    position = torch.arange(1, side + 1, dtype=torch.float32)
    columns, rows = position.repeat(side), position.repeat_interleave(side)
    angles = torch.cat([torch.outer(columns, frequencies), torch.outer(rows, frequencies)], dim=1)
    return F.pad(angles, (0, 0, 0, 1))


def pixel_shuffle(x: Tensor, ratio: float) -> Tensor:
    """[N, P, d] to [N, P * ratio^2, d / ratio^2]: squares of neighbouring patches join, their channels side by side.

    In a square the order is row by row (`pixel_shuffle_op` in Meta's embedding.py).
    """
    side = round(x.shape[1] ** 0.5)
    # Meta folds columns, then rows, by views alone, which also holds where 1 / ratio is no whole number.
    narrow, channels = int(side * ratio), int(x.shape[2] / ratio)
    x = x.reshape(-1, side, narrow, channels).transpose(1, 2)
    x = x.reshape(-1, narrow, int(side * ratio), int(x.shape[-1] / ratio)).transpose(1, 2)
    return x.flatten(1, 2)
