"""A matrix in blocks: weights to the device, results back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant.torch_backend.arithmetic import INFINITY, MAGNITUDE

# Weights of a block: on a CPU what its caches hold, on a GPU enough that computing takes longer than starting a kernel.
BLOCK_WEIGHTS = {"cpu": 1 << 19, "cuda": 1 << 26}
MAX_BLOCK_OUTPUTS = {"cpu": 1 << 10, "cuda": 1 << 13}


class Area(NamedTuple):
    """Outputs n0 .. n1 and inputs k0 .. k1."""

    n0: int
    n1: int
    k0: int
    k1: int


def areas(outputs: int, inputs: int, width: int, depth: int) -> Iterator[Area]:
    """A matrix in blocks of at most `width` outputs and `depth` inputs."""
    for n in range(0, outputs, width):
        for k in range(0, inputs, depth):
            yield Area(n, min(n + width, outputs), k, min(k + depth, inputs))


def areas_of_groups(outputs: int, inputs: int, group: int, device: torch.device) -> Iterator[Area]:
    """A matrix in blocks of whole groups of inputs, each of which can be quantized alone."""
    width = max(min(outputs, MAX_BLOCK_OUTPUTS[device.type]), 1)
    return areas(outputs, inputs, width, group * max(BLOCK_WEIGHTS[device.type] // (width * group), 1))


def uploaded(bits: NDArray[np.uint16], in_out: bool, area: Area, device: torch.device) -> Tensor:
    """int16 [inputs, outputs] on the device, contiguous."""
    n, k = slice(area.n0, area.n1), slice(area.k0, area.k1)
    part = np.array(bits[k, n] if in_out else bits[n, k], order="C")  # a copy, as torch warns of what is read-only
    there = torch.from_numpy(part.view(np.int16)).to(device)
    return there if in_out else there.T.contiguous()


def download(made: Tensor, to: NDArray[np.generic]) -> None:
    """[columns, rows] into an array of [rows, columns]."""
    torch.from_numpy(to).copy_(made.T.contiguous())


def not_finite(tile: Tensor) -> int:
    """How many bf16 bits are NaN or infinite."""
    return int(((tile & MAGNITUDE) >= INFINITY).sum())


class Buffers:
    """float32 tensors as large as a block, kept from block to block: to allocate them costs more than to compute in them."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.device = device
        self._flat = [torch.empty(0, device=device)] * count

    def like(self, tile: Tensor) -> list[Tensor]:
        size = tile.numel()
        if len(self._flat[0]) < size:
            self._flat = [torch.empty(size, dtype=torch.float32, device=self.device) for _ in self._flat]
        return [buffer[:size].view(tile.shape) for buffer in self._flat]
