"""The two formats of output files, as functions from a file's name and tensors to the bytes around the tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llama4_convert.checkpoints.meta_quantized import CODES
from llama4_convert.checkpoints.pth_writer import PthArchive
from llama4_convert.checkpoints.state_dict_pickle import PthTensor
from llama4_convert.checkpoints.tensors import TORCH_NAMES
from llama4_convert.planning.plan import PlannedTensor

# A header that fills whole pages keeps the tensors behind it aligned for direct I/O and for mmap.
_PAGE_BYTES = 4096
_TORCH_NAMES = {**TORCH_NAMES, CODES: "float8_e4m3fn"}


class Safetensors:
    """The envelope of a safetensors file: one header with the dtype, shape and byte range of every tensor."""

    has_checksums = False

    def __init__(self, name: str, tensors: Sequence[PlannedTensor]) -> None:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in tensors:
            end = position + tensor.nbytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
            position = end
        body = json.dumps(entries, separators=(",", ":")).encode()
        body += b" " * (-(8 + len(body)) % _PAGE_BYTES)
        self._header = len(body).to_bytes(8, "little") + body

    def head(self) -> bytes:
        return self._header

    def begin(self) -> bytes:
        return b""

    def finish(self, crc: int) -> bytes:
        return b""

    def tail(self) -> bytes:
        return b""


def pth(name: str, tensors: Sequence[PlannedTensor]) -> PthArchive:
    """The envelope of a `.pth` file, as torch.save writes it."""
    return PthArchive(Path(name).stem, [PthTensor(t.name, _TORCH_NAMES[t.dtype], t.shape) for t in tensors])
