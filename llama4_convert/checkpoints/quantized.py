"""A quantized Transformers directory, read as the numbers that a runtime computes with: matrices are dequantized when read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama4.weights import Bits, ShapeError
from llama4_convert.checkpoints.readers import DirectoryReader
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.errors import BadInput

if TYPE_CHECKING:
    from quant.encoding import Decoder

_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_NF4 = ".weight.quant_state.bitsandbytes__nf4"
_METHODS = ("compressed-tensors", "bitsandbytes")


class DamagedMatrix(BadInput, ShapeError):
    """The parts of a quantized matrix do not fit together; the message names it."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """A linear layer's weight [n, k] in a format of ours; `parts`: suffix -> key."""

    kind: str  # the scheme, as recipes call it
    n: int
    k: int
    decoder: Decoder
    parts: Mapping[str, str]  # the stored tensors that decoding reads
    by_rows: bool  # whether rows of the parts make rows of the matrix
    settings: Mapping[str, int | bool | str]  # which numbers share a scale, in the words of recipes


class QuantizedReader(DirectoryReader):
    """Beside the plain tensors of a directory, `MODULE.weight` of every quantized one, as bf16."""

    def __init__(self, checkpoint: TransformersCheckpoint) -> None:
        """A matrix whose parts do not fit together is `damaged`: to read it raises DamagedMatrix.

        Raises BadInput where `quantization_config` is no object.
        """
        super().__init__(checkpoint)
        config = checkpoint.config["quantization_config"]
        if not isinstance(config, dict):
            raise BadInput(
                f"{checkpoint.path}: config.json: quantization_config is no object: correct it, or remove it if"
                " no tensor is quantized"
            )
        self.quantized: dict[str, QuantizedMatrix] = {}
        self.damaged: dict[str, DamagedMatrix] = {}
        method = config.get("quant_method")
        self.unknown_method = None if method is None or method in _METHODS else str(method)  # Transformers may know it
        for key in checkpoint.tensors if self.unknown_method is None else ():
            for suffix, bind in ((_PACKED, self._int4), (_SCALE, self._fp8), (_NF4, self._nf4)):
                module = key.removesuffix(suffix)
                if module == key or (suffix == _SCALE and module + _PACKED in checkpoint.tensors):
                    continue
                try:
                    self.quantized[f"{module}.weight"] = bind(module)
                except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:
                    self.damaged[f"{module}.weight"] = DamagedMatrix(
                        f"{module}: its quantized parts do not fit together: "
                        f"{f'no tensor {error.args[0]}' if isinstance(error, KeyError) else error}"
                    )
        hidden = {key for matrix in self.quantized.values() for key in matrix.parts.values()}
        hidden |= {
            f"{key.removesuffix('.weight')}{_SHAPE}" for key, matrix in self.quantized.items() if matrix.kind == "int4"
        }
        hidden |= {key for key in checkpoint.tensors if f"{key.partition('.weight')[0]}.weight" in self.damaged}
        shown = (checkpoint.tensors.keys() - hidden) | self.quantized.keys() | self.damaged.keys()
        # Layer 10 behind layer 9.
        ordered = sorted(shown, key=lambda key: [(part.isdigit(), part.zfill(9)) for part in key.split(".")])
        self._keys = dict.fromkeys(ordered).keys()

    def keys(self) -> Collection[str]:
        return self._keys

    def dtype(self, key: str) -> str:
        return "BF16" if key in self.quantized or key in self.damaged else super().dtype(key)

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self.damaged:
            raise self.damaged[key]
        matrix = self.quantized.get(key)
        return (matrix.n, matrix.k) if matrix else super().shape(key)

    def read(self, key: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Bits:
        if key in self.damaged:
            raise self.damaged[key]
        matrix = self.quantized.get(key)
        if matrix is None:
            return super().read(key, rows, columns)
        try:
            bits: Bits = matrix.decoder.decode(
                self.read_parts(key, rows if matrix.by_rows else None), matrix.n, matrix.k
            )
        except ValueError as error:
            raise DamagedMatrix(f"{key}: its quantized parts do not fit together: {error}") from error
        bits = bits if rows is None or matrix.by_rows else bits[rows[0] : rows[1]]
        return bits if columns is None else bits[..., slice(*columns)]

    def read_parts(self, key: str, rows: tuple[int, int] | None = None) -> dict[str, Bits]:
        """The raw bits of what decoding the matrix reads, by suffix."""
        return {
            suffix: super(QuantizedReader, self).read(part, rows) for suffix, part in self.quantized[key].parts.items()
        }

    def _int4(self, module: str) -> QuantizedMatrix:
        from quant.encoders import PackQuantized
        from quant.schemes.int4 import Int4

        n, words = super().shape(module + _PACKED)
        scales = super().shape(module + _SCALE)
        k = words * 8
        scheme = Int4(k // scales[1])
        if scheme.shapes(n, k) != ((n, words), scales):
            raise ValueError(f"{_PACKED[1:]} {[n, words]} and {_SCALE[1:]} {list(scales)}")
        if super().dtype(module + _PACKED) != "I32" or super().dtype(module + _SCALE) not in ("BF16", "F32"):
            raise ValueError("the codes must be I32 and the scales BF16 or F32")
        shape = super().read(module + _SHAPE).tolist()
        if shape != [n, k]:
            raise ValueError(f"{_SHAPE[1:]} says {shape}, and the codes are {[n, k]}")
        parts = {"weight_packed": module + _PACKED, "weight_scale": module + _SCALE}
        return QuantizedMatrix("int4", n, k, PackQuantized(scheme), parts, True, {"group_size": scheme.group_size})

    def _fp8(self, module: str) -> QuantizedMatrix:
        from quant.encoders import FloatQuantized
        from quant.formats.meta import MetaRows
        from quant.schemes.fp8 import Fp8

        parts = {"weight": f"{module}.weight", "weight_scale": module + _SCALE}
        n, k = super().shape(parts["weight"])
        scale = super().shape(parts["weight_scale"])
        dtypes = super().dtype(parts["weight"]), super().dtype(parts["weight_scale"])
        if dtypes == ("F8_E4M3", "F32") and scale == (n, 1):
            return QuantizedMatrix("fp8", n, k, MetaRows(), parts, True, {"granularity": "channel"})
        if dtypes != ("F8_E4M3", "BF16"):
            raise ValueError("the weights must be F8_E4M3 and the scales BF16, or F32 where each output has one")
        for granularity in ("channel", "tensor", "block"):
            scheme = Fp8(granularity)
            if scheme.shapes(n, k)[1] == scale:
                by_rows, settings = granularity == "channel", {"granularity": granularity}
                return QuantizedMatrix("fp8", n, k, FloatQuantized(scheme), parts, by_rows, settings)
        raise ValueError(f"scales of shape {list(scale)} for {[n, k]} weights")

    def _nf4(self, module: str) -> QuantizedMatrix:
        from quant.formats.bitsandbytes import open_nf4

        n, k, decoder = open_nf4(super().read(module + _NF4).tobytes())
        keys = {output.suffix: f"{module}.{output.suffix}" for output in decoder.outputs(n, k)}
        parts = {suffix: key for suffix, key in keys.items() if key in self.checkpoint.tensors}
        settings = {"block_size": decoder.scheme.block_size, "double_quant": decoder.scheme.double_quant}
        return QuantizedMatrix("nf4", n, k, decoder, parts, False, settings)
