"""bitsandbytes' NF4, quantized on disk, as Transformers loads it: what `save_pretrained` of bitsandbytes 0.50 writes.

A Linear [N out, K in] becomes, in blocks of 64 weights of the flattened [N, K]:

weight                                   U8  [N * K / 2, 1]    two codes to a byte, the first in the high half
weight.absmax                            U8  [N * K / 64]      the codes of the scales; without double quantization the
                                                               scales themselves, F32, and neither of the next two
weight.nested_absmax                     F32 [N * K / 64 / 256]
weight.nested_quant_map                  F32 [256]             what the codes of the scales stand for
weight.quant_map                         F32 [16]              what the codes of the weights stand for
weight.quant_state.bitsandbytes__nf4     U8  [...]             JSON: sizes, types, and the mean of the scales

The names and the JSON are those of QuantState.as_dict(packed=True) of bitsandbytes.functional. The mean's digits vary in
number; we fill up with spaces, which JSON ignores, so that the size of every tensor is known before the first weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.config import Module, patterns
from quant.encoding import Bits, Encoded, Output
from quant.schemes.nf4 import NESTED_BLOCK, NF4, Nf4, dynamic_map

_ABSMAX, _NESTED_ABSMAX = "weight.absmax", "weight.nested_absmax"
_MAP, _NESTED_MAP = "weight.quant_map", "weight.nested_quant_map"
_STATE = "weight.quant_state.bitsandbytes__nf4"
_MAX_OFFSET_DIGITS = 22  # characters of the longest float32: 0.00012345678901234567, 1.2345678901234567e-05

# Linear layers outside the feed-forward blocks. Transformers compares each entry with a module's full name as a prefix and as
# a regular expression, both up to a dot or the end, and as a suffix (should_convert_module); never as a part in the middle.
_ALWAYS_KEPT = ("lm_head", ".*self_attn", ".*router", "vision_model", "multi_modal_projector")


class Nf4Matrix:
    """NF4 in bitsandbytes: an `Encoder` and a `Decoder` of quant.encoding."""

    def __init__(self, block_size: int = 64, double_quant: bool = True) -> None:
        self.scheme = Nf4(block_size, double_quant)

    def outputs(self, n: int, k: int) -> tuple[Output, ...]:
        packed, scales, nested = self.scheme.shapes(n, k)
        state = self._state(n, k, None)
        if not self.scheme.double_quant:
            return (
                Output("weight", "U8", packed),
                Output(_ABSMAX, "F32", scales),
                Output(_MAP, "F32", NF4.shape, NF4.tobytes()),
                Output(_STATE, "U8", (len(state),), state),
            )
        return (
            Output("weight", "U8", packed),
            Output(_ABSMAX, "U8", scales),
            Output(_NESTED_ABSMAX, "F32", nested),
            Output(_NESTED_MAP, "F32", dynamic_map().shape, dynamic_map().tobytes()),
            Output(_MAP, "F32", NF4.shape, NF4.tobytes()),
            Output(_STATE, "U8", (len(state),)),
        )

    def encode(self, bits: Bits, in_out: bool, threads: int) -> Encoded:
        made = self.scheme.quantize(bits, in_out=in_out, threads=threads)
        k, n = bits.shape if in_out else bits.shape[::-1]
        parts: tuple[NDArray[Any], ...] = (made.packed, made.absmax)
        if made.nested_absmax is not None:
            state = np.frombuffer(self._state(n, k, made.offset), np.uint8)
            parts = (*parts, made.nested_absmax, state)
        return Encoded(parts, made.squared_error, made.squared_sum)

    def decode(self, parts: Mapping[str, NDArray[Any]], n: int, k: int, threads: int = 1) -> Bits:
        """bf16 bits [n, k]. Raises ValueError for parts that are missing or do not fit together."""
        absent = sorted({output.suffix for output in self.outputs(n, k)} - parts.keys())
        if absent:
            raise ValueError(f"{', '.join(absent)} missing")
        for output in self.outputs(n, k):
            found = parts[output.suffix].shape
            if output.suffix != _STATE and found != output.shape:
                raise ValueError(f"{output.suffix} is {list(found)}, not {list(output.shape)}")
        if not np.array_equal(parts[_MAP].view(np.float32), NF4):
            raise ValueError(f"{_MAP} holds other values than NF4's, which runtimes do not read")
        result: Bits = self.scheme.dequantize(parts["weight"], self.scales(parts), (n, k), threads=threads)
        return result

    def scales(self, parts: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The scales as they are read, float32 [N * K / block], from the raw bits of the outputs by suffix."""
        if not self.scheme.double_quant:
            return self.scheme.scales(parts[_ABSMAX].view(np.float32))
        offset = float(_read_state(parts[_STATE].tobytes())["nested_offset"])
        nested, values = (parts[name].view(np.float32) for name in (_NESTED_ABSMAX, _NESTED_MAP))
        return self.scheme.scales(parts[_ABSMAX], nested, offset, values)

    def _state(self, n: int, k: int, offset: float | None) -> bytes:
        """The JSON of a matrix [n, k], as json.dumps writes it; with spaces to a length that does not depend on the offset."""
        fields: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.scheme.block_size,
            "dtype": "bfloat16",
            "shape": [n, k],
        }
        if not self.scheme.double_quant:
            return json.dumps(fields).encode()
        fields |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0}
        longest = len(json.dumps(fields)) - 1 + _MAX_OFFSET_DIGITS
        if offset is not None:
            fields["nested_offset"] = offset
        return json.dumps(fields).ljust(longest).encode()


def open_nf4(state: bytes) -> tuple[int, int, Nf4Matrix]:
    """Outputs, inputs and decoder of a matrix from the bytes of its `quant_state`. Raises ValueError for other states.

    Reads the states that bitsandbytes itself writes for bf16 weights, too.
    """
    fields = _read_state(state)
    expected: dict[str, Any] = {"quant_type": "nf4", "dtype": "bfloat16"}
    double = "nested_offset" in fields
    if double:
        expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    for name, value in expected.items():
        if fields.get(name) != value:
            raise ValueError(f"{_STATE}: {name} is {fields.get(name)!r:.40}, not {value!r}")
    if double and not isinstance(fields["nested_offset"], int | float):
        raise ValueError(f"{_STATE}: nested_offset is {fields['nested_offset']!r:.40}, not a number")
    shape = fields.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{_STATE}: shape is {shape!r:.40}, not that of a matrix")
    block = fields.get("blocksize")
    if type(block) is not int:
        raise ValueError(f"{_STATE}: blocksize is {block!r:.40}, not a number")
    return shape[0], shape[1], Nf4Matrix(block, double)


def _read_state(state: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(state)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_STATE} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{_STATE} is no JSON object")
    return fields


def bitsandbytes_config(modules: Sequence[Module]) -> dict[str, Any]:
    """`quantization_config` of config.json. `modules`: all linear layers of feed-forward blocks, quantized or not.

    Layers that are not quantized must be named, or Transformers makes 4-bit layers of them and finds no codes. The
    `quant_state` of a matrix says how it was quantized; the fields of this configuration only shape the empty model.
    """
    kept = [module for module in modules if module.scheme is None]
    schemes = {module.scheme for module in modules if module.scheme is not None}
    named = [pattern.removeprefix("re:").removesuffix("$") for pattern in patterns(kept, modules)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": all(scheme.double_quant for scheme in schemes),
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [*_ALWAYS_KEPT, *named],
    }
