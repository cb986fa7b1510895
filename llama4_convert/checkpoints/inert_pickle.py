"""A pickle interpreter that executes nothing.

`torch.save` describes a state dict with a pickle. Python's own unpickler would import and call whatever that pickle names,
so it is never used here. This interpreter walks the opcodes (`pickletools.genops` only decodes them) and builds plain
values. The names on the list below stand for inert records; any other name ends the reading with an error that quotes it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class RefusedPickle(ValueError):
    """The pickle is malformed, or names something that a state dict has no use for."""


@dataclass(frozen=True)
class Storage:
    """A storage record of the archive: `data/<key>`, `numel` elements of `dtype`."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TensorView:
    """A tensor as a view of a storage; `offset` and `stride` count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Opaque:
    """An object whose content is of no interest (`io.BytesIO`), but whose presence is legitimate."""

    kind: str


@dataclass(frozen=True)
class _Name:
    """A global that the pickle named. Being named is all that ever happens to it."""

    module: str
    name: str


# safetensors' names for torch's storage types.
STORAGE_DTYPES = {
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
TORCH_DTYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
}

# Scout's pickle has some 50,000; an adapter with factors for each expert's matrices some 600,000.
_MAX_OPCODES = 1_500_000
_MAX_KEY = 1 << 31  # of an inner mapping: larger numbers can be chosen so that all of them collide

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("BINSTRING", "SHORT_BINSTRING", "STRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}


def read_state_dict(data: bytes) -> dict[str, Any]:
    """The state dict that `data` describes: name -> `TensorView`, `Opaque` or a plain value. Raises RefusedPickle."""
    try:
        result = _interpret(data)
    except RefusedPickle:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        # genops and the stack raise these on truncated or ill-formed opcodes
        raise RefusedPickle(f"malformed pickle: {error}") from error
    if not isinstance(result, dict) or not all(isinstance(key, str) for key in result):
        raise RefusedPickle("the pickle holds no state dict (a mapping from names to tensors)")
    return result


def _interpret(data: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    for number, (opcode, arg, position) in enumerate(pickletools.genops(data)):
        op = opcode.name
        if number >= _MAX_OPCODES:
            raise RefusedPickle(f"more than {_MAX_OPCODES:,} opcodes, more than any state dict needs")
        if op in _LITERALS:
            stack.append(arg)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op == "MARK":
            marks.append(len(stack))
        elif op in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[arg] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[arg])
        elif op == "TUPLE":
            stack.append(tuple(since_mark()))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(op[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif op == "LIST":
            stack.append(since_mark())
        elif op == "APPEND":
            item = stack.pop()
            _a(list, stack[-1]).append(item)
        elif op == "APPENDS":
            items = since_mark()
            _a(list, stack[-1]).extend(items)
        elif op == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set(_a(dict, stack[-1]), key, value)
        elif op == "SETITEMS":
            items = since_mark()
            for key, value in zip(items[::2], items[1::2], strict=True):
                _set(_a(dict, stack[-1]), key, value)
        elif op == "GLOBAL":
            module, _, name = _a(str, arg).partition(" ")
            stack.append(_named(module, name))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_named(module, name))
        elif op in ("REDUCE", "NEWOBJ"):
            args, called = stack.pop(), stack.pop()
            stack.append(_construct(called, _a(tuple, args)))
        elif op == "BUILD":
            # Instance state: OrderedDict's `_metadata`, BytesIO's buffer. Nothing here has a use for it.
            stack.pop()
            _a((dict, Opaque), stack[-1])
        elif op == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif op == "STOP":
            return stack.pop()
        elif op not in ("PROTO", "FRAME"):
            raise RefusedPickle(f"opcode {op} at byte {position} has no place in a state dict")
    raise RefusedPickle("malformed pickle: it does not end")


# No value is ever formatted or hashed before its type is known: memo references can nest to exponential size.
def _a(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise RefusedPickle(f"malformed pickle: a {type(value).__name__} where it needs something else")
    return value


def _set(target: dict[Any, Any], key: Any, value: Any) -> None:
    if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < _MAX_KEY):
        raise RefusedPickle("malformed pickle: a mapping key that is neither text nor a number")
    if key in target:
        raise RefusedPickle(f"the pickle names {key!r:.80} twice")
    target[key] = value


_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_TENSOR_V3 = ("torch._utils", "_rebuild_tensor_v3")
_PARAMETER = ("torch._utils", "_rebuild_parameter")
_ORDERED = ("collections", "OrderedDict")
_ENCODE = ("_codecs", "encode")
_NO_BYTES = (("__builtin__", "bytes"), ("builtins", "bytes"))
_BYTES_IO = (("io", "BytesIO"), ("_io", "BytesIO"))
_ALLOWED = {_TENSOR, _TENSOR_V3, _PARAMETER, _ORDERED, _ENCODE, *_NO_BYTES, *_BYTES_IO}
_ALLOWED |= {("torch", name) for name in STORAGE_DTYPES} | {("torch", name) for name in TORCH_DTYPES}
_ALLOWED |= {("torch.storage", "UntypedStorage")}


def _named(module: Any, name: Any) -> _Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise RefusedPickle("malformed pickle: a global that is not named by text")
    if (module, name) not in _ALLOWED:
        raise RefusedPickle(
            f"it names {module:.100}.{name:.100}, which a state dict has no use for; nothing was executed"
        )
    return _Name(module, name)


def _construct(called: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(called, _Name):
        raise RefusedPickle("malformed pickle: it calls something that is not a name")
    target = (called.module, called.name)
    if target == _TENSOR:
        storage, offset, shape, stride, *_ = args
        return _view(storage, storage.dtype, offset, shape, stride)
    if target == _TENSOR_V3:
        storage, offset, shape, stride, _grad, _hooks, dtype, *_ = args
        if not isinstance(dtype, _Name) or dtype.name not in TORCH_DTYPES:
            raise RefusedPickle("a tensor of a type that no checkpoint has")
        return _view(storage, TORCH_DTYPES[dtype.name], offset, shape, stride)
    if target == _PARAMETER:
        return _a(TensorView, args[0])
    if target == _ORDERED:
        if args and args != ((),) and args != ([],):
            raise RefusedPickle("an OrderedDict with constructor arguments, which torch.save never writes")
        return {}
    if target == _ENCODE:  # how protocol 2 spells bytes; nothing here has a use for them, and copies could add up
        text, encoding = args
        if encoding != "latin1":
            raise RefusedPickle("bytes in an encoding that torch.save never uses")
        _a(str, text)
        return Opaque("bytes")
    if target in _NO_BYTES:  # how protocol 2 spells none: the buffer of an `_extra_state` without content
        if args:
            raise RefusedPickle("bytes made of something, which torch.save never writes")
        return Opaque("bytes")
    if target in _BYTES_IO:
        return Opaque("io.BytesIO")
    raise RefusedPickle(f"it calls {called.module}.{called.name}")


def _storage(persistent_id: Any) -> Storage:
    kind, named, key, _location, numel = _a(tuple, persistent_id)
    if kind != "storage" or not isinstance(named, _Name) or named.name not in STORAGE_DTYPES:
        raise RefusedPickle("a persistent id that is no storage")
    return Storage(_a(str, key), STORAGE_DTYPES[named.name], _natural(numel))


def _view(storage: Any, dtype: str, offset: Any, shape: Any, stride: Any) -> TensorView:
    shape, stride = _a(tuple, shape), _a(tuple, stride)
    if len(shape) != len(stride) or len(shape) > 8:
        raise RefusedPickle("a tensor whose shape and strides do not fit together")
    sizes, steps = tuple(_natural(n) for n in shape), tuple(_natural(n) for n in stride)
    return TensorView(_a(Storage, storage), dtype, _natural(offset), sizes, steps)


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise RefusedPickle("a shape, stride or offset that is no natural number")
    return value
