"""NF4 on a device; quant/kernels/nf4.py explains the steps."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from quant.schemes import NotFinite
from quant.schemes.arrays import source_of
from quant.schemes.nf4 import NF4, Nf4
from quant.torch_backend.arithmetic import INFINITY, MAGNITUDE, floats, in_order, inverse_of
from quant.torch_backend.blocks import Buffers, areas_of_groups, download, not_finite, uploaded

_LEAST = 1e-38  # bitsandbytes divides by no less
_MIDPOINTS = (NF4[:-1] + NF4[1:]) / np.float32(2)


@dataclass(frozen=True)
class TorchNf4(Nf4):
    """NF4 on a device: all but the quantization of the scales."""

    device: torch.device = field(default=torch.device("cpu"))

    def _encode(
        self,
        bits: NDArray[np.uint16],
        in_out: bool,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
        sums: NDArray[np.float32],
        threads: int,
        pool: Executor | None,
    ) -> None:
        source_of(bits, in_out)  # raises for what is no matrix of bf16
        block = self.block_size
        if bits.shape[0 if in_out else 1] % block:  # rows of one block each
            bits, in_out = np.ascontiguousarray(bits.T if in_out else bits).reshape(-1, block), False
        inputs, rows = bits.shape if in_out else bits.shape[::-1]
        codes, scales = packed.reshape(rows, inputs // 2), absmax.reshape(rows, inputs // block)
        block_sums = sums.reshape(rows, inputs // block, -1)
        values = torch.from_numpy(NF4.copy()).to(self.device)
        midpoints = torch.from_numpy(_MIDPOINTS).to(self.device)
        buffers = Buffers(3, self.device)
        bad = 0
        for area in areas_of_groups(rows, inputs, block, self.device):
            tile = uploaded(bits, in_out, area, self.device).view(-1, block, area.n1 - area.n0)
            largest = (tile & MAGNITUDE).amax(1)
            if bool((largest >= INFINITY).any()):
                bad += not_finite(tile)
            if bad:
                continue
            scale = floats(largest)
            v, e, terms = buffers.like(tile)
            v.copy_(tile.view(torch.bfloat16))
            v *= inverse_of(scale.clamp(min=_LEAST))[:, None]
            found = torch.bucketize(v, midpoints, out_int32=True)  # how many are less
            torch.index_select(values, 0, found.view(-1), out=terms.view(-1))
            torch.sub(v, terms, out=e)
            made = found.to(torch.uint8).view(len(found), -1, 2, found.shape[2])
            n, g = slice(area.n0, area.n1), slice(area.k0 // block, area.k1 // block)
            download(((made[:, :, 0] << 4) | made[:, :, 1]).flatten(0, 1), codes[n, area.k0 // 2 : area.k1 // 2])
            download(scale, scales[n, g])
            for place, (one, other) in enumerate(((e, e), (e, v), (v, v))):
                torch.mul(one, other, out=terms)
                download(in_order(terms), block_sums[n, g, place])
        if bad:
            raise NotFinite(bad, bits.size)
