"""int4 on a device; quant/kernels/int4.py explains the steps."""

from __future__ import annotations

import math
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant.schemes import NotFinite, int4
from quant.schemes.arrays import results, source_of
from quant.schemes.int4 import CODES_PER_WORD, Int4
from quant.torch_backend.arithmetic import (
    INFINITY,
    SIGN,
    floats,
    in_order,
    inverse_of,
    number,
    scale_bits,
    to_bf16,
    total_of,
)
from quant.torch_backend.blocks import Buffers, areas_of_groups, download, not_finite, uploaded

_ROUND = 1.5 * 2**23  # adding it rounds to an integer, ties to even, in the lowest bits
_ROUND_BITS = 0x4B400000
_LOWEST, _HIGHEST = -8, 7
_HALF_RANGE = 7.5
_LARGEST_SCALE = 0x7DFF
_TO_8_BITS = 0x8000, -0x10000  # of significance: what to add to a float32's bits, and which of them to keep then
_TO_16_BITS = 0x80, -0x100


@dataclass(frozen=True)
class TorchInt4(Int4):
    """int4 on a device."""

    device: torch.device = field(default=torch.device("cpu"))

    def quantize(
        self,
        bits: NDArray[np.uint16],
        *,
        in_out: bool,
        threads: int = 1,
        pool: Executor | None = None,
        out: tuple[NDArray[np.int32], NDArray[np.uint16]] | None = None,
    ) -> int4.Quantized:
        """Same arguments, bytes and errors as `Int4.quantize`."""
        source_of(bits, in_out)  # raises for what is no matrix of bf16
        inputs, outputs = bits.shape if in_out else bits.shape[::-1]
        packed, scale = results(out, *zip(self.shapes(outputs, inputs), int4.DTYPES, strict=True))
        clips, steps = (
            torch.from_numpy(table[self.method].copy()).to(self.device).unbind()
            for table in (int4.PROPOSALS, int4.STEPS)
        )
        buffers = Buffers(3, self.device)
        errors, powers, bad = [], [], 0
        for area in areas_of_groups(outputs, inputs, self.group_size, self.device):
            tile = uploaded(bits, in_out, area, self.device).view(-1, self.group_size, area.n1 - area.n0)
            block = _Block(tile, self.method == "signed", *buffers.like(tile))
            bad += block.bad
            if bad:
                continue
            block.quantize(clips, steps)
            rows = slice(area.n0, area.n1)
            download(block.words.flatten(0, 1), packed[rows, area.k0 // CODES_PER_WORD : area.k1 // CODES_PER_WORD])
            group = slice(area.k0 // self.group_size, area.k1 // self.group_size)
            download(block.bits.to(torch.int16), scale[rows, group].view(np.int16))
            errors.append(total_of(block.error, block.unfactor))
            powers.append(total_of(block.power, block.unfactor))
        if bad:
            raise NotFinite(bad, bits.size)
        return int4.Quantized(packed, scale, math.fsum(errors), math.fsum(powers))


class _Block:
    """Some groups of some outputs: weights [groups, group, outputs], all else [groups, outputs]; see quant/kernels/int4.py."""

    def __init__(self, tile: Tensor, signed: bool, y: Tensor, q: Tensor, terms: Tensor) -> None:
        """`y`, `q` and `terms`: buffers."""
        self.signed, self.y, self.q, self.terms = signed, y, q, terms
        negative = (tile ^ SIGN).amax(1).clamp_(min=0)
        positive = tile.amax(1).clamp_(min=0)
        largest = torch.maximum(negative, positive)
        self.bad = not_finite(tile) if bool((largest >= INFINITY).any()) else 0
        mirrored = (positive > negative) & signed
        exponent = ((largest.to(torch.int32) >> 7) - 127).clamp_(-126, 126)
        factor = ((127 - exponent) << 23).view(torch.float32)
        self.unfactor = ((127 + exponent) << 23).view(torch.float32)
        self.factor = torch.where(mirrored, -factor, factor)
        self.low, self.high = mirrored.float() + _LOWEST, mirrored.float() + _HIGHEST
        self.base = torch.div(number(_HALF_RANGE, tile.device), floats(largest) * factor)
        self.plain_bits = self.bits = scale_bits(largest, _HALF_RANGE)
        self.plain = self.scale = floats(self.plain_bits) * factor
        y.copy_(tile.view(torch.bfloat16))
        y *= self.factor[:, None]

    def quantize(self, clips: tuple[Tensor, ...], steps: tuple[Tensor, ...]) -> None:
        """No clips: the plain scheme."""
        if not clips:
            self.words, self.error, self.power = _codes(self.y, self.scale, _TO_8_BITS, self.q, self.terms)
            return
        plain_error = self._search(clips, steps)
        self.words, self.error, self.power = _codes(self.y, self.scale, _TO_16_BITS, self.q, self.terms)
        self._fall_back(self.error > plain_error)
        self.bits = torch.where(self.factor < 0, self.bits | 0x8000, self.bits)

    def _search(self, clips: tuple[Tensor, ...], steps: tuple[Tensor, ...]) -> Tensor:
        """Sets the scale of the best clip; the error of the plain one."""
        self.best, self.ratio = torch.zeros_like(self.base), torch.zeros_like(self.base)
        self.clip = torch.ones_like(self.base)
        _quotient(self.y, inverse_of(self.plain), _TO_16_BITS, self.q)
        self._round(self.low[:, None], self.high[:, None])
        if not self.signed:
            self._keep_better(self.clip)
        torch.mul(self.q, self.plain[:, None], out=self.terms)
        torch.sub(self.y, self.terms, out=self.terms)
        self.terms *= self.terms
        plain_error = in_order(self.terms)
        for clip in clips:
            self._propose(clip)
        for step in steps:
            centre = self.clip
            self._propose(centre - step)
            self._propose(centre + step)
        bits = to_bf16(self.ratio.abs() * self.unfactor).clamp_(1, _LARGEST_SCALE)
        self.bits = torch.where(self.ratio == 0, self.plain_bits, bits)  # 0: a group of zeros
        self.scale = floats(self.bits) * self.factor.abs()
        flipped = self.ratio < 0
        self.factor = torch.where(flipped, -self.factor, self.factor)
        self.y *= 1 - 2 * flipped[:, None].float()
        return plain_error

    def _propose(self, clip: Tensor) -> None:
        torch.mul(self.y, torch.div(self.base, clip)[:, None], out=self.q)
        self._round(_LOWEST, _HIGHEST)
        self._keep_better(clip)

    def _round(self, low: Tensor | float, high: Tensor | float) -> None:
        self.q += _ROUND
        self.q -= _ROUND
        torch.clamp(self.q, low, high, out=self.q)  # type: ignore[arg-type]  # both are numbers, or both tensors

    def _keep_better(self, clip: Tensor) -> None:
        torch.mul(self.y, self.q, out=self.terms)
        xq = in_order(self.terms)
        torch.mul(self.q, self.q, out=self.terms)
        ratio = torch.div(xq, self.terms.sum(1))  # integers
        score = ratio * xq
        better = score > self.best
        self.best = torch.where(better, score, self.best)
        self.ratio = torch.where(better, ratio, self.ratio)
        self.clip = torch.where(better, clip, self.clip)

    def _fall_back(self, worse: Tensor) -> None:
        """The plain scale again where the searched one, once rounded to bf16, turned out worse: seldom."""
        at = torch.nonzero(worse, as_tuple=True)
        if not len(at[0]):
            return
        g, n = at
        y = (self.y[g, :, n] * self.factor[at].sign()[:, None]).T[None].contiguous()
        self.factor[at] = self.factor[at].abs()
        self.bits[at] = self.plain_bits[at].clamp(max=_LARGEST_SCALE)
        scale = floats(self.bits[at]) * self.factor[at]
        words, error, power = _codes(y, scale[None], _TO_16_BITS, torch.empty_like(y), torch.empty_like(y))
        self.words[g, :, n] = words[0].T
        self.error[at], self.power[at] = error[0], power[0]


def _quotient(y: Tensor, inverse: Tensor, significance: tuple[int, int], out: Tensor) -> None:
    half, keep = significance
    torch.mul(y, inverse[:, None], out=out)
    bits = out.view(torch.int32)
    bits += half
    bits &= keep


def _codes(
    y: Tensor, scale: Tensor, significance: tuple[int, int], q: Tensor, terms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Words of codes, squared errors and powers of y / scale; `q` and `terms` are buffers."""
    _quotient(y, inverse_of(scale), significance, q)
    q += _ROUND
    codes = q.view(torch.int32)
    codes.clamp_(_ROUND_BITS + _LOWEST, _ROUND_BITS + _HIGHEST)
    torch.sub(q, _ROUND, out=terms)
    terms *= scale[:, None]
    torch.sub(y, terms, out=terms)
    terms *= terms
    error = in_order(terms)
    torch.mul(y, y, out=terms)
    power = in_order(terms)
    codes -= _ROUND_BITS + _LOWEST
    nibbles = codes.view(len(codes), -1, CODES_PER_WORD, codes.shape[2]).unbind(2)
    words = nibbles[0].clone()
    for place, nibble in enumerate(nibbles[1:], 1):
        words |= nibble << 4 * place
    return words, error, power
