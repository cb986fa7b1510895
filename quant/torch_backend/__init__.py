"""The schemes in plain torch, for a GPU: the same bytes that quant/kernels make on the CPU with numba's loops.

`on_device` turns a scheme into one that quantizes on a device. What is computed and why stands in quant/schemes, how in
quant/kernels; here are the same operations in the same order, each on a whole block of weights [groups, group, outputs].

What makes the bytes equal on every device:

- Only operations whose result IEEE 754 or integers fix: +, -, *, / of float32, comparisons, maxima, bits. PyTorch runs each
  as a kernel of its own, so that no product and sum become a fused multiply-add (addcmul, addcdiv and lerp may, and are not
  used; add itself is a + 1 * b, the same fused or not). No matrix products, so no TF32. Subnormals are kept, unless
  torch.set_flush_denormal says otherwise.
- Division is by tensors that lie on the device: by a Python number or a tensor of the CPU, CUDA multiplies with the inverse.
- Where the order of a sum matters it is a loop over the inputs, as in the kernels (`in_order`). torch.sum adds in an order
  of its own, as scatter_add does, and so they add only what is exact in any order (<q,q>, integers below 2**24, and FP8's
  int64), and torch.sum the float64 totals of the errors.
- Rounding to bf16 is done on the bits: conversion instructions of some CPUs lose subnormals. Widening is exact everywhere.

The errors' totals agree to 1e-12: their float64 sums have another order. NF4's scales, one in 64 weights or fewer, come
back to the host, and quant/kernels/nf4.py quantizes them again.

Weights go to the device a block at a time, and results come back so: besides the matrix and its result some
200 MB on a CPU, and 0.6 to 0.8 GiB of a GPU's memory for an expert of Scout.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from quant.schemes.fp8 import Fp8
from quant.schemes.int4 import Int4
from quant.schemes.nf4 import Nf4
from quant.torch_backend.fp8 import TorchFp8
from quant.torch_backend.int4 import TorchInt4
from quant.torch_backend.nf4 import TorchNf4

CPU = "torch-cpu"  # this backend without a GPU: to test it

_S = TypeVar("_S", Int4, Fp8, Nf4)


def on_device(scheme: _S, name: str) -> _S:
    """The scheme, quantizing on "cuda", "cuda:1", ... or "torch-cpu". Raises ValueError if torch has no such device.

    `threads` and `pool` of its `quantize` concern the host's part alone: on the CPU torch has its own threads.
    """
    device = _device(name)
    if isinstance(scheme, Int4):
        return TorchInt4(scheme.group_size, scheme.method, device)
    if isinstance(scheme, Fp8):
        return TorchFp8(scheme.granularity, scheme.method, device)
    return TorchNf4(scheme.block_size, scheme.double_quant, device)


def _device(name: str) -> torch.device:
    if name == CPU:
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type != "cuda":
        raise ValueError(f"device {name!r}: take cuda, cuda:1 and so on, or cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        found = f"has {count} CUDA device{'s' * (count > 1)}" if count else "finds no CUDA device"
        raise ValueError(f"device {name!r}: torch {torch.__version__} {found} here; take cpu")
    return device
