"""FP8 on a device; quant/kernels/fp8.py explains the steps."""

from __future__ import annotations

import math
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant.kernels import fp8_search
from quant.schemes import NotFinite, fp8
from quant.schemes.arrays import results, source_of
from quant.schemes.fp8 import Fp8
from quant.torch_backend.arithmetic import INFINITY, MAGNITUDE, floats, in_order, inverse_of, scale_bits, total_of
from quant.torch_backend.blocks import BLOCK_WEIGHTS, Area, Buffers, areas, download, not_finite, uploaded

_E4M3 = 448.0
_E4M3_BITS = 0x43E00000
_TO_ROUNDER = (23 - 3) << 23  # see `rounder` in quant/kernels/e4m3.py
_LEAST_ROUNDER = 0x46800000
_OFFSET = 0x468
_TINY, _GROW = 2.0**-60, 2.0**64  # see _set_scale in quant/kernels/fp8.py
_COUNTED_WEIGHTS = 1 << 20  # weights whose powers are in memory at a time, as int64


@dataclass(frozen=True)
class TorchFp8(Fp8):
    """FP8 on a device."""

    device: torch.device = field(default=torch.device("cpu"))

    def quantize(
        self,
        bits: NDArray[np.uint16],
        *,
        in_out: bool,
        threads: int = 1,
        pool: Executor | None = None,
        out: tuple[NDArray[np.uint8], NDArray[np.uint16]] | None = None,
    ) -> fp8.Quantized:
        """Same arguments, bytes and errors as `Fp8.quantize`."""
        source_of(bits, in_out)  # raises for what is no matrix of bf16
        inputs, outputs = bits.shape if in_out else bits.shape[::-1]
        codes, scale = results(out, *zip(self.shapes(outputs, inputs), fp8.DTYPES, strict=True))
        width = max(BLOCK_WEIGHTS[self.device.type] // max(inputs, 1) // fp8.BLOCK, 1) * fp8.BLOCK
        blocks = list(areas(outputs, inputs, width, max(inputs, 1)))
        given = None
        if self.granularity == "tensor":
            given = self._scale_of_all(bits, in_out, blocks)
            scale[:] = int(given)
        buffers, search = Buffers(3, self.device), self.method == "search"
        errors, powers, bad = [], [], 0
        for area in blocks:
            tile = _padded(uploaded(bits, in_out, area, self.device))
            tile = tile.view(-1, fp8.BLOCK, tile.shape[1])
            n, real = slice(area.n0, area.n1), area.n1 - area.n0  # outputs: some are padding
            if given is None:
                largest = self._largest(tile)
                if bool((largest >= INFINITY).any()):
                    bad += not_finite(tile)
                if bad:
                    continue
                bits_of_scale = scale_bits(largest, _E4M3)
                if search:
                    bits_of_scale = self._searched(tile, bits_of_scale, inputs)
                step = 1 if self.granularity == "channel" else fp8.BLOCK
                rows = slice(area.n0 // step, -(-area.n1 // step))
                download(bits_of_scale[:, 0, :real:step].to(torch.int16), scale[rows].view(np.int16))
            else:
                bits_of_scale = given.view(1, 1, 1)
            made, error, power = _codes(tile, floats(bits_of_scale), search, *buffers.like(tile))
            download(made.flatten(0, 1)[:inputs, :real], codes[n])
            errors.append(error)
            powers.append(power)
        if bad:
            raise NotFinite(bad, bits.size)
        return fp8.Quantized(codes, scale, math.fsum(errors), math.fsum(powers))

    def _scale_of_all(self, bits: NDArray[np.uint16], in_out: bool, blocks: list[Area]) -> Tensor:
        """The bits of the scale of the whole matrix. Raises NotFinite."""
        largest = torch.zeros((), dtype=torch.int16, device=self.device)
        bad = 0
        for area in blocks:
            tile = uploaded(bits, in_out, area, self.device)
            tile_largest = (tile & MAGNITUDE).amax()
            if int(tile_largest) >= INFINITY:
                bad += not_finite(tile)
            largest = torch.maximum(largest, tile_largest)
        if bad:
            raise NotFinite(bad, bits.size)
        plain = scale_bits(largest, _E4M3)
        if self.method == "plain":
            return plain
        powers = torch.zeros(128, 1, dtype=torch.int64, device=self.device)
        for area in blocks:
            powers += _powers(uploaded(bits, in_out, area, self.device), plain).sum(1, keepdim=True)
        return _best_scale(powers, plain.view(1), bits.size)[0]

    def _searched(self, tile: Tensor, plain: Tensor, inputs: int) -> Tensor:
        """The bits of the scales that are searched for, from plain's and in their shape."""
        if self.granularity == "channel":
            powers = _powers(tile.flatten(0, 1), plain[0, 0])
            return _best_scale(powers, plain[0, 0], inputs).view(plain.shape)
        block_scales = plain[:, 0, :: fp8.BLOCK]
        blocks = tile.view(len(tile), fp8.BLOCK, -1, fp8.BLOCK).permute(1, 3, 0, 2).reshape(fp8.BLOCK**2, -1)
        best = _best_scale(_powers(blocks, block_scales.flatten()), block_scales.flatten(), fp8.BLOCK**2)
        return best.view(len(tile), 1, -1).repeat_interleave(fp8.BLOCK, 2)

    def _largest(self, tile: Tensor) -> Tensor:
        """The largest magnitudes by channel [1, 1, outputs] or by block [chunks, 1, outputs]."""
        found = (tile & MAGNITUDE).amax(1, keepdim=True)
        if self.granularity == "channel":
            return found.amax(0, keepdim=True)
        by_block = found.view(len(tile), 1, -1, fp8.BLOCK).amax(3)
        return by_block.repeat_interleave(fp8.BLOCK, 2)


def _padded(tile: Tensor) -> Tensor:
    """With zeros to whole blocks."""
    rows, columns = (-(-size // fp8.BLOCK) * fp8.BLOCK for size in tile.shape)
    if tile.shape == (rows, columns):
        return tile
    padded = tile.new_zeros(rows, columns)
    padded[: tile.shape[0], : tile.shape[1]] = tile
    return padded


def _powers(weights: Tensor, plain: Tensor) -> Tensor:
    """Sums by mantissas, int64 [128, groups], of weights [count, groups]; `plain`: bits of a scale for each group or for all."""
    powers = torch.zeros(128, weights.shape[1], dtype=torch.int64, device=weights.device)
    least = (plain >> 7) + fp8_search.LOWEST
    rows = max(_COUNTED_WEIGHTS // max(weights.shape[1], 1), 1)
    for first in range(0, len(weights), rows):
        part = weights[first : first + rows]
        exponent = ((part & MAGNITUDE) >> 7).to(torch.int64) - least
        shift = exponent.clamp(0, fp8_search.HIGHEST - fp8_search.LOWEST) * 2
        power = torch.where(exponent >= 0, torch.ones_like(shift) << shift, 0)
        powers.scatter_add_(0, (part & 0x7F).to(torch.int64), power)
    return powers


def _best_scale(powers: Tensor, plain: Tensor, count: int) -> Tensor:
    """See _best_scale in quant/kernels/fp8_search.py; `plain` and the result [groups]."""
    table = torch.from_numpy(fp8_search.ERRORS.copy()).to(powers.device)
    errors = torch.zeros(len(plain), 128, dtype=torch.float64, device=powers.device)
    for weight_powers, scale_errors in zip(powers.double(), table, strict=True):
        errors += weight_powers[:, None] * scale_errors
    step = torch.arange(128, dtype=plain.dtype, device=plain.device)
    errors = errors.gather(1, (plain[:, None] + step).to(torch.int64) & 0x7F)
    least = errors.amin(1, keepdim=True)
    steps = torch.where(errors == least, step, 128).amin(1)  # the first of equal ones, which argmin does not promise
    gains = errors[:, 0] - least[:, 0] > count * fp8_search.SMALL_ERROR
    searched = (plain >= fp8_search.SMALLEST_SEARCHED) & (plain <= fp8_search.LARGEST_SEARCHED)
    return torch.where(gains & searched, plain + steps, plain)


def _codes(
    tile: Tensor, scale: Tensor, search: bool, q: Tensor, total: Tensor, rounder: Tensor
) -> tuple[Tensor, float, float]:
    """Codes and the sums of squared errors and weights; `q`, `total` and `rounder` are buffers."""
    factor = torch.where(scale < _TINY, _GROW, torch.ones_like(scale))
    q.copy_(tile.view(torch.bfloat16))
    q *= factor
    q *= inverse_of(scale * factor)
    total_bits, rounder_bits = total.view(torch.int32), rounder.view(torch.int32)

    if search:
        total.copy_(q)
    else:
        torch.add(q.view(torch.int32), 0x8000, out=total_bits)
        total_bits &= -0x10000  # the quotient in bf16
    signs = (total < 0).to(torch.uint8) << 7  # none on zeros
    total_bits &= 0x7FFFFFFF
    total_bits.clamp_(max=_E4M3_BITS)
    torch.bitwise_and(total_bits, 0x7F800000, out=rounder_bits)
    rounder_bits += _TO_ROUNDER
    rounder_bits.clamp_(min=_LEAST_ROUNDER)
    total += rounder
    codes = rounder_bits >> 20
    codes += total_bits
    codes -= rounder_bits
    codes -= _OFFSET

    total -= rounder
    q.abs_()
    torch.sub(q, total, out=total)
    total *= total
    q *= q
    unit = scale[:, 0].expand(len(tile), -1)
    return codes.to(torch.uint8) | signs, total_of(in_order(total), unit), total_of(in_order(q), unit)
