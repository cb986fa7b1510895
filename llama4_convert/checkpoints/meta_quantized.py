"""Meta's quantized originals: experts as codes, and the scales of each rank in a file beside it, shown as tensors in bf16.

A tensor of codes is listed as one in bf16, whose record is a `DequantizedView`: bytes that are computed, codes times scales, when
a range of them is read. So each rank is dequantized by itself before ranks are joined, a few rows at a time, and the plan sees
nothing but tensors in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.checkpoints.tensors import Record, StoredTensor, contiguous
from llama4_convert.errors import BadInput
from quant.encoding import Bits
from quant.formats.meta import FORMATS, MetaFormat, scale_key

CODES = "F8_E4M3"  # what both kinds of codes are called in a rank file
_BF16_BYTES = 2  # of a number


@dataclass(frozen=True)
class DequantizedView(Record):
    """A view of codes and scales as `size` bf16 bytes, computed when read. Name, offset and CRC are those of the codes."""

    format: MetaFormat
    codes: StoredTensor
    scales: StoredTensor  # [experts, ...]
    scales_file: Path
    scales_archive: int  # the number of `scales_file` among the checkpoint's files of tensors
    key: str  # the key of the scales
    k: int  # inputs of an expert on this rank
    n: int  # outputs of an expert on this rank

    @property
    def kind(self) -> str:
        return self.format.kind

    @property
    def experts(self) -> int:
        return self.scales.shape[0]

    def scales_of(self, expert: int) -> NDArray[np.float32]:
        """The scales of one expert, [n] or [groups, n]. Raises BadInput if one is not finite."""
        shape = self.format.scales_shape(self.k, self.n)
        count = int(np.prod(shape))
        offset = self.scales.record.offset + (self.scales.offset + expert * count) * self.scales.itemsize
        found = np.fromfile(self.scales_file, "<f4", count, offset=offset)
        if found.size != count:
            raise BadInput(f"{self.scales_file.name} ends in the middle of {self.key}: it changed or is truncated")
        if bad := count - int(np.isfinite(found).sum()):
            raise BadInput(
                f"{self.scales_file.name}: {self.key} has {bad} scale(s) of expert {expert} that are NaN or infinite:"
                " fetch it again"
            )
        return found.reshape(shape)

    def codes_until(self, position: int) -> int:
        """How many bytes of the codes, in whole rows, the first `position` bytes of the numbers are made of."""
        inputs = -(-position // (_BF16_BYTES * self.n))
        return -(-inputs // self.format.inputs_a_row) * self.n

    def codes_for(self, start: int, stop: int) -> tuple[int, int]:
        """The range of bytes of the codes, in whole rows, that bytes `start` to `stop` of the numbers are made of."""
        row = start // (_BF16_BYTES * self.n) // self.format.inputs_a_row
        return row * self.n, self.codes_until(stop)


def stored_codes(tensor: StoredTensor) -> StoredTensor:
    """The tensor as it lies in the file: the codes, where `tensor` is a view of codes and scales."""
    return tensor.record.codes if isinstance(tensor.record, DequantizedView) else tensor


@dataclass
class Dequantizer:
    """Computes numbers from codes; keeps the scales of the expert that it dequantized last, for each file."""

    _scales: dict[Path, tuple[str, int, NDArray[np.float32]]] = field(default_factory=dict)

    def numbers(self, record: DequantizedView, start: int, codes: NDArray[np.uint8]) -> Bits:
        """bf16 bits [rows * inputs_a_row, n] of whole rows of codes; `start` is the first code's byte in the record."""
        step, n = record.format.inputs_a_row, record.n
        rows, row, end = codes.reshape(-1, n), start // n, (start + codes.size) // n
        result = np.empty((len(rows) * step, n), np.uint16)
        height, first = record.k // step, row  # of an expert's codes
        while row < end:
            expert, within = divmod(row, height)
            stop = min(end, (expert + 1) * height)
            part = slice(row - first, stop - first)
            made = result[part.start * step : part.stop * step]
            record.format.decode(rows[part], self._scales_of(record, expert), within * step, made)
            row = stop
        return result

    def _scales_of(self, record: DequantizedView, expert: int) -> NDArray[np.float32]:
        key, number, scales = self._scales.get(record.scales_file, ("", -1, None))
        if scales is None or (key, number) != (record.key, expert):
            scales = record.scales_of(expert)
            self._scales[record.scales_file] = record.key, expert, scales
        return scales


def with_scales(path: Path, ranks: tuple[PthIndex, ...]) -> tuple[tuple[PthIndex, ...], tuple[PthIndex, ...]]:
    """The rank files with their codes as bf16, and the files of scales: one a rank, or none where nothing is quantized.

    Raises BadInput where scales are missing or do not fit the codes, naming file and key.
    """
    codes = next((key for key, tensor in ranks[0].tensors.items() if tensor.dtype == CODES), None)
    if codes is None:
        return ranks, ()
    found = [format for format in FORMATS if (path / format.scales_file.format(0)).exists()]
    if len(found) != 1:
        names = (" and " if found else " or ").join(format.scales_file.format(0) for format in FORMATS)
        what = f"beside it are {names}: keep the right one" if found else f"there is no {names} beside it: download it"
        raise BadInput(f"{ranks[0].path.name}: {codes} is quantized, and {what}")
    scales = []
    for rank in range(len(ranks)):
        file = path / found[0].scales_file.format(rank)
        if not file.exists():
            raise BadInput(f"{path} lacks {file.name}: download it, the experts of each rank have scales of their own")
        scales.append(PthIndex.read(file))
    shown = []
    for number, (index, scales_index) in enumerate(zip(ranks, scales, strict=True), len(ranks)):
        tensors = {
            key: _dequantized(key, tensor, index, scales_index, number, found[0]) if tensor.dtype == CODES else tensor
            for key, tensor in index.tensors.items()
        }
        shown.append(replace(index, tensors=tensors))
    return tuple(shown), tuple(scales)


def _dequantized(
    key: str, codes: StoredTensor, index: PthIndex, scales: PthIndex, number: int, format: MetaFormat
) -> StoredTensor:
    here, name = f"{index.path.name}: {key}", scale_key(key)
    if name is None:
        raise BadInput(f"{here} is {CODES}, and only routed experts have scales: this is no file of Meta's script")
    where, found = f"{scales.path.name}: {name}", scales.tensors.get(name)
    if found is None:
        raise BadInput(f"{where} is missing, and {key} in {index.path.name} needs it: download both again")
    experts, n = _experts(index, key.partition(".experts.")[0]), codes.shape[-1] if codes.shape else 0
    rows = codes.numel // n if n else 0
    if not (codes.is_whole_record and len(codes.shape) in (2, 3) and rows and experts and rows % experts == 0):
        raise BadInput(f"{here} {list(codes.shape)} is not what Meta's script writes for {experts} experts")
    k = rows // experts * format.inputs_a_row
    try:
        expected = (experts, *format.scales_shape(k, n))
    except ValueError as error:
        raise BadInput(f"{here}: {error}") from error
    if (found.dtype, found.shape, found.strides) != ("F32", expected, contiguous(expected)):
        raise BadInput(
            f"{where} is {found.dtype} {list(found.shape)}, but {key} in {index.path.name} makes it F32 {list(expected)}:"
            " they are of different checkpoints, or damaged: download both again"
        )
    record = DequantizedView(
        name=codes.record.name,
        offset=codes.record.offset,
        size=codes.numel * format.inputs_a_row * _BF16_BYTES,
        crc=codes.record.crc,
        format=format,
        codes=codes,
        scales=found,
        scales_file=scales.path,
        scales_archive=number,
        key=name,
        k=k,
        n=n,
    )
    shape = (*codes.shape[:-2], codes.shape[-2] * format.inputs_a_row, n)
    return StoredTensor("BF16", shape, contiguous(shape), 0, record)


def _experts(index: PthIndex, feed_forward: str) -> int:
    """How many experts a layer has: the router's columns."""
    router = index.tensors.get(f"{feed_forward}.router_DE")
    if router is None or len(router.shape) != 2:
        raise BadInput(f"{index.path.name} has no {feed_forward}.router_DE, which tells the number of experts")
    return router.shape[1]
