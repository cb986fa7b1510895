"""Matrices that a recipe encodes: gathered whole, encoded, and held until each of their parts is written."""

from __future__ import annotations

import os
from concurrent.futures import Executor, wait
from functools import partial
from itertools import pairwise

import numpy as np

from llama4_convert.checkpoints.numbers import count_nonfinite, make_finite
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.errors import BadInput
from llama4_convert.planning.plan import EncodedMatrix, EncodedPart, PlannedFile, PlannedTensor
from llama4_convert.progress import Progress
from llama4_convert.streaming.fill import Fillers
from llama4_convert.streaming.memory import GATHER_AHEAD_BYTES
from quant.encoding import Encoded
from quant.schemes import NotFinite

_GATHER_BYTES = 16 << 20  # gathered between two reports of progress


class MatrixEncoder:
    """Gathers matrices whole, encodes them, and holds their parts until each is written.

    While one matrix is encoded the next one is gathered, on another thread: encoding waits for no disk. Only where no other
    tensor lies between the two: all reading stays in the order of the plan, and nothing else reads meanwhile.
    """

    def __init__(
        self, file: PlannedFile, fillers: Fillers, thread: Executor, progress: Progress, allow_nonfinite: bool
    ) -> None:
        """`thread` gathers ahead. `allow_nonfinite`: NaN and infinities are quantized, as 0 and the largest magnitude."""
        self.fillers, self.findings, self.thread = fillers, fillers.findings, thread
        self.progress, self.allow_nonfinite = progress, allow_nonfinite
        self.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._following = _following(file)
        self._parts: dict[str, list[memoryview | None]] = {}
        self._ahead: bytearray | None = None  # the following matrix, gathered
        self._spare = bytearray()  # reused: matrices of a layer have one size

    def take(self, part: EncodedPart) -> bytes | memoryview:
        """The bytes of one part, once. Raises BadInput for a matrix with numbers that are not finite."""
        if part.constant is not None:
            return part.constant
        module = part.matrix.matrix.module
        if module not in self._parts:
            self._parts[module] = self._encode(part.matrix)
        parts = self._parts[module]
        taken, parts[part.index] = parts[part.index], None
        if not any(p is not None for p in parts):
            del self._parts[module]
        assert taken is not None
        return taken

    def _encode(self, planned: EncodedMatrix) -> list[memoryview | None]:
        gathered, self._ahead = self._ahead or self._gather(planned.gathered), None
        following = self._following.get(planned.gathered.name)
        ahead = self.thread.submit(self._gather, following) if following else None
        try:
            encoded = self._encoded(planned, gathered)
        finally:
            if ahead:
                wait([ahead])
        self._spare = gathered
        self._ahead = ahead.result() if ahead else None
        if planned.is_quantized:
            self.findings.errors[planned.matrix.module] = encoded.squared_error, encoded.squared_sum
        return [np.ascontiguousarray(p).data.cast("B") for p in encoded.parts]

    def _encoded(self, planned: EncodedMatrix, gathered: bytearray) -> Encoded:
        tensor, matrix = planned.gathered, planned.matrix
        bits = np.frombuffer(gathered, f"u{ITEM_SIZES[tensor.dtype]}").reshape(tensor.shape)
        kind = planned.scheme.kind if planned.scheme else None
        encode = partial(planned.encoder.encode, bits, matrix.in_out, self.threads)
        if not planned.is_quantized:
            # Int4 codes are stored as F8_E4M3, two a byte: a byte that is NaN as FP8 is two finite codes.
            if kind != "int4":
                self.findings.count(tensor.name, count_nonfinite(gathered, tensor.dtype))
            return encode()
        try:
            return encode()
        except NotFinite as error:
            if not self.allow_nonfinite:
                found = count_nonfinite(gathered, tensor.dtype)
                raise BadInput(
                    f"{tensor.name} has {found} of {tensor.numel:,} numbers, which {kind} cannot hold:"
                    " leave it out of the recipe, or take them as 0 and the largest magnitude with --allow-nonfinite --overwrite"
                ) from error
            self.findings.count(tensor.name, make_finite(gathered, tensor.dtype))
            return encode()

    def _gather(self, tensor: PlannedTensor) -> bytearray:
        into, self._spare = self._spare, bytearray()
        if len(into) != tensor.nbytes:
            into = bytearray()  # frees the old buffer before a new one is made
            into = bytearray(tensor.nbytes)
        fill = self.fillers.filler_for(tensor)
        for start in range(0, tensor.nbytes, _GATHER_BYTES):
            n = min(_GATHER_BYTES, tensor.nbytes - start)
            fill(start, memoryview(into)[start : start + n])
            self.progress(n)
        return into


def _following(file: PlannedFile) -> dict[str, PlannedTensor]:
    """A gathered matrix, by name -> the one that is gathered right after it, where neither exceeds `GATHER_AHEAD_BYTES`."""
    matrices = {tensor.part.matrix.gathered.name for tensor in file.tensors if tensor.part}
    return {
        one.name: other
        for one, other in pairwise(file.gathered())
        if {one.name, other.name} <= matrices and max(one.nbytes, other.nbytes) <= GATHER_AHEAD_BYTES
    }
