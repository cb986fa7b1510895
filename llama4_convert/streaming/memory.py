"""How much memory a run takes: its buffers, and what a recipe or an adapter needs beside them."""

from __future__ import annotations

import mmap

from llama4_convert.checkpoints.meta_quantized import DequantizedView
from llama4_convert.planning.plan import Plan

BUFFERS = 3  # one is filled while the others are hashed and written
GATHER_AHEAD_BYTES = (
    96 << 20
)  # the largest matrix that is gathered while another is encoded: Scout's experts have 80 MiB
_LEAST_BUFFER_BYTES, _MAX_BUFFER_BYTES = 64 << 10, 16 << 20
# Own memory of a run beside its buffers: numpy, the plan of a 48-layer model, scratch.
_BASE_BYTES = 64 << 20
_COMPILER_BYTES = 96 << 20  # numba, and what it compiles
_PRODUCT_BYTES = 256 << 20  # torch, which multiplies an adapter's factors
_LEAST_TOKENIZER_BYTES, _TOKENIZER_FACTOR = (
    80 << 20,
    10,
)  # of converting a tokenizer.model: at least, and times its bytes


def buffer_bytes(max_memory: int) -> int:
    """The size of each of a run's `BUFFERS`, which keeps it within `max_memory` bytes: whole pages, up to 16 MiB."""
    size = min(_MAX_BUFFER_BYTES, max(_LEAST_BUFFER_BYTES, max_memory // 16))
    return size - size % mmap.PAGESIZE


def peak_memory(max_memory: int, tokenizer_bytes: int, plan: Plan) -> int:
    """Bytes of own memory above an idle interpreter that a run takes, as measured (docs/benchmarks.md).

    The buffers and what a recipe needs, or the conversion of a tokenizer.model of `tokenizer_bytes` (0: none), which ends
    before they are filled: 113 MiB for Llama 4's 3.6 MB.
    """
    run = BUFFERS * buffer_bytes(max_memory) + _BASE_BYTES
    matrices, tensors = plan.matrices, plan.tensors
    experts = [t.numel // t.scales.experts for t in tensors if t.scales]
    if matrices or experts or any(isinstance(p.source.record, DequantizedView) for t in tensors for p in t.pieces):
        run += _COMPILER_BYTES
    if experts:  # one in bf16 and in codes, and the scales of a rank
        run += 3 * max(experts) + max(f.size for f in plan.files if f.made_with)
    if matrices:
        # Gathered, and encoded to half its bytes at most, or as many where it only becomes linear; the next one gathered.
        run += max(
            m.gathered.nbytes * (4 if m.scheme is None else 3) // 2
            + (m.gathered.nbytes if m.gathered.nbytes <= GATHER_AHEAD_BYTES else 0)
            for m in matrices
        )
    if plan.changed:
        run += _PRODUCT_BYTES + plan.change_bytes
    return max(run, _LEAST_TOKENIZER_BYTES + _TOKENIZER_FACTOR * tokenizer_bytes)
