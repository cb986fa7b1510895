"""Chooses what fills the bytes of each output tensor: a gather, a cast, an adapter's changes, or experts as FP8 codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from llama4_convert.checkpoints.numbers import NonFinite, cast, count_nonfinite
from llama4_convert.errors import BadInput
from llama4_convert.planning.changes import ChangeApplier
from llama4_convert.planning.plan import ExpertScales, PlannedTensor, RecordKey
from llama4_convert.streaming.gather import Fill, Gather
from llama4_convert.streaming.source import SCRATCH_BYTES, Source
from quant.formats.meta import quantize_fp8
from quant.schemes import NotFinite


@dataclass
class Findings:
    """What is found out about the numbers while files are written."""

    overflows: Counter[str] = field(default_factory=Counter)  # finite numbers that a cast made infinite, by tensor
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # by module: sums of squares, error and weight
    nonfinite: dict[str, NonFinite] = field(default_factory=dict)  # by tensor, where there are any
    scales: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # by key, for the file that is written next

    def count(self, name: str, found: NonFinite) -> None:
        """Add to the NaN and infinities of the tensor `name`."""
        if any(found):
            before = self.nonfinite.get(name, NonFinite())
            self.nonfinite[name] = NonFinite(before.nan + found.nan, before.inf + found.inf)


class Fillers:
    """Makes the function that fills byte ranges of a tensor, in order, for the tensors of a file."""

    def __init__(self, source: Source, streamed: Collection[RecordKey], findings: Findings) -> None:
        """`streamed`: the records whose CRC is checked as they are read."""
        self.source, self.streamed, self.findings = source, streamed, findings
        self._applier = ChangeApplier()

    def filler_for(self, tensor: PlannedTensor) -> Fill:
        if not tensor.pieces:  # scales, which were made with the codes of the file before
            return _filler_from_bytes(self.findings.scales.pop(tensor.name).reshape(-1).view(np.uint8).data)
        if tensor.scales:
            numbers = self.filler_for(replace(tensor, dtype="BF16", scales=None))
            return _ExpertCodes(tensor, tensor.scales, numbers, self.findings)
        gather = Gather(tensor, self.source, self.streamed)
        if tensor.changes or tensor.dtype != tensor.source_dtype:
            return _Cast(tensor, gather, self.findings, self._applier)
        return gather


def _filler_from_bytes(data: memoryview) -> Fill:
    def fill(start: int, into: memoryview) -> None:
        into[:] = data[start : start + len(into)]

    return fill


class _Cast:
    """Gathers numbers in the source's dtype, applies an adapter's changes, and casts to the tensor's dtype."""

    def __init__(self, tensor: PlannedTensor, gather: Gather, findings: Findings, applier: ChangeApplier) -> None:
        self.tensor, self.gather, self.findings, self.applier = tensor, gather, findings, applier
        self.ratio = tensor.nbytes // tensor.numel, gather.item

    def __call__(self, start: int, into: memoryview) -> None:
        target_item, source_item = self.ratio
        for i in range(0, len(into), SCRATCH_BYTES):
            part = into[i : i + SCRATCH_BYTES]
            raw = bytearray(len(part) // target_item * source_item)
            first = (start + i) // target_item
            self.gather(first * source_item, memoryview(raw))
            part[:], lost = self._cast(first, raw)
            if lost:
                self.findings.overflows[self.tensor.name] += lost

    def _cast(self, first: int, raw: bytearray) -> tuple[bytes | bytearray, int]:
        tensor = self.tensor
        bits = np.frombuffer(raw, f"u{self.gather.item}")
        changed = self.applier.changed(tensor.changes, first, bits, tensor.source_dtype)
        if changed is not None:
            return cast(changed.data.cast("B"), "F32", tensor.dtype)
        if tensor.dtype == tensor.source_dtype:
            return raw, 0
        return cast(bytes(raw), tensor.source_dtype, tensor.dtype)


class _ExpertCodes:
    """A rank's experts as FP8 codes [E * K, N] in Meta's layout: each expert is gathered in bf16 and quantized whole.

    After the last expert `findings` has the scales, for the file that is written next, and the error.
    """

    def __init__(self, tensor: PlannedTensor, scales: ExpertScales, numbers: Fill, findings: Findings) -> None:
        self.tensor, self.scales, self.numbers, self.findings = tensor, scales, numbers, findings
        self.n = tensor.shape[-1]
        self.size = tensor.numel // scales.experts  # bytes of an expert's codes, one a code
        self._codes = memoryview(b"")
        self._scales = np.empty((scales.experts, self.n), np.float32)
        self._error = self._power = 0.0

    def __call__(self, start: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            expert, within = divmod(start + done, self.size)
            if not within:
                self._codes = self._quantized(expert)
            n = min(len(into) - done, self.size - within)
            into[done : done + n] = self._codes[within : within + n]
            done += n

    def _quantized(self, expert: int) -> memoryview:
        gathered = bytearray(2 * self.size)
        self.numbers(expert * len(gathered), memoryview(gathered))
        try:
            made = quantize_fp8(np.frombuffer(gathered, np.uint16).reshape(-1, self.n))
        except NotFinite as error:
            raise BadInput(
                f"{self.tensor.name}: expert {expert} has {count_nonfinite(gathered, 'BF16')} numbers, which fp8 cannot hold:"
                " leave --recipe out"
            ) from error
        self._scales[expert] = made.scales
        self._error += made.squared_error
        self._power += made.squared_sum
        if expert == self.scales.experts - 1:
            self.findings.scales[self.scales.key] = self._scales
            self.findings.errors[self.scales.label] = self._error, self._power
        return made.codes.reshape(-1).data
