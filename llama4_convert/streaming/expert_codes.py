"""A rank's experts as FP8 codes in Meta's layout, made expert by expert while they are written.

The scales are made with the codes, and set aside for the file that is written next.
"""

from __future__ import annotations

import numpy as np

from llama4_convert.checkpoints.numbers import count_nonfinite
from llama4_convert.errors import BadInput
from llama4_convert.planning.plan import ExpertScales, PlannedTensor
from llama4_convert.streaming.gather import Fill
from llama4_convert.streaming.run_result import RunResult
from quant.formats.meta import quantize_fp8
from quant.schemes import NotFinite


class ExpertCodes:
    """Fills byte ranges of a tensor of codes [E * K, N], in order; each expert's matrix is gathered and quantized whole."""

    def __init__(self, tensor: PlannedTensor, scales: ExpertScales, gather: Fill, result: RunResult) -> None:
        """`gather` makes the tensor in bf16. After the last expert `result` has the scales and the error."""
        self.tensor, self.scales, self.gather, self.result = tensor, scales, gather, result
        self.n = tensor.shape[-1]
        self.size = tensor.numel // scales.experts  # bytes of an expert's codes, one a code
        self._codes = memoryview(b"")
        self._found = np.empty((scales.experts, self.n), np.float32)
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
        """Raises BadInput for numbers that are not finite."""
        gathered = bytearray(2 * self.size)
        self.gather(expert * len(gathered), memoryview(gathered))
        try:
            made = quantize_fp8(np.frombuffer(gathered, np.uint16).reshape(-1, self.n))
        except NotFinite as error:
            raise BadInput(
                f"{self.tensor.name}: expert {expert} has {count_nonfinite(gathered, 'BF16')} numbers, which fp8 cannot hold:"
                " leave --recipe out"
            ) from error
        self._found[expert] = made.scales
        self._error += made.squared_error
        self._power += made.squared_sum
        if expert == self.scales.experts - 1:
            self.result.scales[self.scales.key] = self._found
            self.result.errors[self.scales.label] = self._error, self._power
        return made.codes.reshape(-1).data
