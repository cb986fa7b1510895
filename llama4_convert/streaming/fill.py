"""Chooses what fills the bytes of each output tensor: a gather, a cast, an adapter's changes, or an encoder of experts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from llama4_convert.checkpoints.numbers import cast, count_nonfinite
from llama4_convert.planning.changes import ChangeApplier
from llama4_convert.planning.plan import PlannedTensor, RecordKey
from llama4_convert.streaming.expert_codes import ExpertCodes
from llama4_convert.streaming.gather import Fill, Gather
from llama4_convert.streaming.run_result import RunResult
from llama4_convert.streaming.source import SCRATCH, Source


class Fillers:
    """Makes the function that fills byte ranges of a tensor, for the tensors of a file."""

    def __init__(self, source: Source, streamed: Collection[RecordKey], result: RunResult) -> None:
        """`streamed`: the records whose CRC is checked as they are read. `result` collects NaN, overflows and errors."""
        self.source, self.streamed, self.result = source, streamed, result
        self._applier = ChangeApplier()

    def filler_for(self, tensor: PlannedTensor) -> Fill:
        """What makes the bytes of `tensor`. A tensor without pieces is one of scales, which `result` has from the file before."""
        if not tensor.pieces:
            return filler_from_bytes(self.result.scales.pop(tensor.name).reshape(-1).view(np.uint8).data)
        if tensor.scales:
            return ExpertCodes(
                tensor, tensor.scales, self.filler_for(replace(tensor, dtype="BF16", scales=None)), self.result
            )
        gather = Gather(tensor, self.source, self.streamed)
        if tensor.changes or tensor.dtype != tensor.source_dtype:
            return _Cast(tensor, gather, self.result, self._applier)
        return gather

    def counting_filler_for(self, tensor: PlannedTensor) -> Fill:
        """The filler, which also counts NaN and infinities. Buffers end at multiples of the item size, so no number is cut."""
        fill = self.filler_for(tensor)

        def counted(start: int, into: memoryview) -> None:
            fill(start, into)
            self.result.count(tensor.name, count_nonfinite(into, tensor.dtype))

        return counted


def filler_from_bytes(data: bytes | memoryview) -> Fill:
    def fill(start: int, into: memoryview) -> None:
        into[:] = data[start : start + len(into)]

    return fill


class _Cast:
    """Gathers numbers in the source's dtype, applies an adapter's changes, and casts to the tensor's dtype."""

    def __init__(self, tensor: PlannedTensor, gather: Gather, result: RunResult, applier: ChangeApplier) -> None:
        self.tensor, self.gather, self.result, self.applier = tensor, gather, result, applier
        self.ratio = tensor.nbytes // tensor.numel, self.gather.item

    def __call__(self, start: int, into: memoryview) -> None:
        target_item, source_item = self.ratio
        for i in range(0, len(into), SCRATCH):
            part = into[i : i + SCRATCH]
            raw = bytearray(len(part) // target_item * source_item)
            first = (start + i) // target_item
            self.gather(first * source_item, memoryview(raw))
            part[:], lost = self._cast(first, raw)
            if lost:
                self.result.overflows[self.tensor.name] = self.result.overflows.get(self.tensor.name, 0) + lost

    def _cast(self, first: int, raw: bytearray) -> tuple[bytes | bytearray, int]:
        tensor = self.tensor
        bits = np.frombuffer(raw, f"u{self.gather.item}")
        changed = self.applier.changed(tensor.changes, first, bits, tensor.source_dtype)
        if changed is not None:
            return cast(changed.data.cast("B"), "F32", tensor.dtype)
        if tensor.dtype == tensor.source_dtype:
            return raw, 0
        return cast(bytes(raw), tensor.source_dtype, tensor.dtype)
