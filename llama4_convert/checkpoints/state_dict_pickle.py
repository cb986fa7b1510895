"""The pickle inside a `.pth` file, opcode by opcode: protocol 2, memo included, byte for byte as CPython writes a state dict."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

_UNTYPED = "UntypedStorage"  # of dtypes that have no storage class
# dtype: (class of the storage in the pickle, bytes a number)
STORAGES = {
    "bfloat16": ("BFloat16Storage", 2),
    "float16": ("HalfStorage", 2),
    "float32": ("FloatStorage", 4),
    "float8_e4m3fn": (_UNTYPED, 1),
}
# CPython's pickler closes a SETITEMS every so many pairs.
_BATCH = 1000


@dataclass(frozen=True)
class PthTensor:
    """A contiguous tensor of the state dict; dtype "bfloat16", "float16", "float32" or "float8_e4m3fn". Its data come later."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * STORAGES[self.dtype][1]


@dataclass(frozen=True)
class PthBytes:
    """An `io.BytesIO` of the state dict (Meta's `_extra_state` entries); it lives inside the pickle.

    `torch.load(weights_only=True)` needs `io.BytesIO` and `codecs.encode` (an empty value: `bytes`) as safe globals.
    """

    key: str
    value: bytes


def state_dict_pickle(entries: Sequence[PthTensor | PthBytes]) -> bytes:
    """`data.pkl`: an OrderedDict of the entries; the n-th tensor is the whole of storage n."""
    p = _Pickle()
    p.constant("ccollections\nOrderedDict\n")
    p.empty_call()
    storage = 0
    for first in range(0, len(entries), _BATCH):
        batch = entries[first : first + _BATCH]
        p.out += b"(" if len(batch) > 1 else b""
        for entry in batch:
            p.text(entry.key)
            if isinstance(entry, PthBytes):
                p.bytes_io(entry.value)
            else:
                p.tensor(entry, storage)
                storage += 1
        p.out += b"u" if len(batch) > 1 else b"s"
    return bytes(p.out + b".")


class _Pickle:
    """Opcodes of pickle protocol 2, each composite followed by its memo slot as CPython's pickler leaves it."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.slots = 0
        self.constants: dict[str, int] = {}

    def memoize(self) -> None:
        self.out += struct.pack("<cB", b"q", self.slots) if self.slots < 256 else struct.pack("<cI", b"r", self.slots)
        self.slots += 1

    def fetch(self, value: str) -> bool:
        """Put a constant on the stack again; False if it has not been written yet."""
        slot = self.constants.get(value)
        if slot is not None:
            self.out += struct.pack("<cB", b"h", slot) if slot < 256 else struct.pack("<cI", b"j", slot)
        return slot is not None

    def constant(self, value: str) -> None:
        """A global ("cmodule\\nname\\n") or a string that is one object throughout: written once, then fetched."""
        if self.fetch(value):
            return
        self.constants[value] = self.slots
        if value.endswith("\n"):
            self.out += value.encode()
            self.memoize()
        else:
            self.text(value)

    def empty_call(self) -> None:
        """Call what is on the stack with no arguments."""
        self.out += b")R"
        self.memoize()

    def text(self, value: str) -> None:
        data = value.encode()
        self.out += struct.pack("<cI", b"X", len(data)) + data
        self.memoize()

    def integer(self, value: int) -> None:
        if value < 1 << 8:
            self.out += struct.pack("<cB", b"K", value)
        elif value < 1 << 16:
            self.out += struct.pack("<cH", b"M", value)
        elif value < 1 << 31:
            self.out += struct.pack("<ci", b"J", value)
        else:
            length = value.bit_length() // 8 + 1
            self.out += struct.pack("<cB", b"\x8a", length) + value.to_bytes(length, "little")

    def integers(self, values: Sequence[int]) -> None:
        """A tuple of integers; up to three have an opcode of their own, and the empty tuple is never memoized."""
        self.out += b"(" if len(values) > 3 else b""
        for value in values:
            self.integer(value)
        self.out += (b")", b"\x85", b"\x86", b"\x87")[len(values)] if len(values) <= 3 else b"t"
        if values:
            self.memoize()

    def tensor(self, tensor: PthTensor, storage: int) -> None:
        """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks)`; v3 adds the dtype."""
        strides = [1] * len(tensor.shape)
        for axis in range(len(strides) - 1, 0, -1):
            strides[axis - 1] = strides[axis] * max(tensor.shape[axis], 1)
        kind, is_untyped = STORAGES[tensor.dtype][0], STORAGES[tensor.dtype][0] == _UNTYPED
        self.constant(f"ctorch._utils\n_rebuild_tensor_{'v3' if is_untyped else 'v2'}\n")
        self.out += b"(("
        self.constant("storage")
        self.constant(f"ctorch{'.storage' if is_untyped else ''}\n{kind}\n")
        self.text(str(storage))
        self.constant("cpu")
        self.integer(tensor.nbytes if is_untyped else tensor.numel)
        self.out += b"t"
        self.memoize()
        self.out += b"Q"
        self.integer(0)
        self.integers(tensor.shape)
        self.integers(strides)
        self.out += b"\x89"
        self.constant("ccollections\nOrderedDict\n")
        self.empty_call()
        if is_untyped:
            self.constant(f"ctorch\n{tensor.dtype}\n")
        self.out += b"t"
        self.memoize()
        self.out += b"R"
        self.memoize()

    def bytes_io(self, value: bytes) -> None:
        """`BytesIO()`, then its state: content, position 0, no attributes. Protocol 2 spells bytes as latin-1 text."""
        self.constant("c_io\nBytesIO\n")
        self.out += b")\x81"
        self.memoize()
        if value:
            self.constant("c_codecs\nencode\n")
            self.text(value.decode("latin-1"))
            self.constant("latin1")
            self.out += b"\x86"
            self.memoize()
            self.out += b"R"
            self.memoize()
        elif not self.fetch("b''"):  # empty bytes are one object throughout
            self.constant("c__builtin__\nbytes\n")
            self.constants["b''"] = self.slots
            self.empty_call()
        self.out += b"K\x00N\x87"
        self.memoize()
        self.out += b"b"
