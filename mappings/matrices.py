"""The matrices that a recipe speaks of, where they come from, and what a linearized directory calls them.

Runtimes read quantized experts one by one, as plain linear layers: `experts.3.gate_proj`. Each is a part of the logical tensor
of all experts (`E D F`), so it is one more placement of it, and the same copies bring it from any layout and rank count.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from mappings import Binding, Box, Placement

_FEED_FORWARD = re.compile(r"((?:.+\.)?model\.layers\.(\d+)\.feed_forward)\.(.+)")
_DENSE = re.compile(r"(gate|up|down)_proj\.weight")
_SHARED = re.compile(r"shared_expert\.(gate|up|down)_proj\.weight")
_FUSED = {"experts.gate_up_proj": ("gate", "up"), "experts.down_proj": ("down",)}


@dataclass(frozen=True)
class Matrix:
    """One linear layer's weight: `n` outputs, `k` inputs."""

    module: str  # "language_model.model.layers.0.feed_forward.experts.3.gate_proj"
    family: str  # as recipes name it
    layer: int
    expert: int | None
    n: int
    k: int
    in_out: bool  # gathered as [k, n], the order in which experts lie; else [n, k]
    target: Placement

    @property
    def shape(self) -> tuple[int, int]:
        """As it is gathered."""
        return (self.k, self.n) if self.in_out else (self.n, self.k)

    @property
    def key(self) -> str:
        return f"{self.module}.weight"


def linearized(binding: Binding, key: str) -> Iterator[Matrix]:
    """The experts of a fused tensor as a linearized directory stores them: each [n, k], under a key of its own."""
    for matrix in matrices(binding, key):
        if matrix.expert is not None:
            yield _as_linear_layer(matrix)


def _as_linear_layer(matrix: Matrix) -> Matrix:
    """The same matrix as [n, k]."""
    n, k = matrix.n, matrix.k
    return replace(matrix, in_out=False, target=replace(matrix.target, strides=(n * k, 1, k)))


def matrices(binding: Binding, key: str, linear: Collection[str] = ()) -> Iterator[Matrix]:
    """The matrices that the Transformers tensor `key` holds; none if no recipe can speak of them.

    Experts are gathered as they lie: [k, n], or [n, k] where the source has them under the keys `linear`.
    """
    for matrix in _matrices(binding, key):
        yield _as_linear_layer(matrix) if matrix.expert is not None and matrix.key in linear else matrix


def _matrices(binding: Binding, key: str) -> Iterator[Matrix]:
    found = _FEED_FORWARD.fullmatch(key)
    if found is None:
        return
    module, layer, rest = found[1], int(found[2]), found[3]
    placements = binding.transformers_placements(key)
    if rest in _FUSED:
        axes = binding.logical_tensor(placements[0].tensor).sizes
        n_experts, k, n = axes.values()
        for expert in range(n_experts):
            for name, placement in zip(_FUSED[rest], placements, strict=True):
                box = Box((expert, 0, 0), (1, k, n))
                target = Placement(placement.tensor, box, 0, (k * n, n, 1))
                yield Matrix(
                    f"{module}.experts.{expert}.{name}_proj", "routed_experts", layer, expert, n, k, True, target
                )
    elif _DENSE.fullmatch(rest) or _SHARED.fullmatch(rest):
        n, k = binding.transformers_shape(key)
        family = "shared_expert" if _SHARED.fullmatch(rest) else "dense_mlp"
        yield Matrix(key.removesuffix(".weight"), family, layer, None, n, k, False, placements[0])
