"""What a diagnosis looks at: a wrong tensor of both sides, read so that it fits into memory and can be compared.

Matrices are read whole, an expert at a time; the two of the vocabulary in slices of rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from math import prod

import numpy as np

from llama4.config import Llama4Config
from llama4.weights import BindingError, Bits, LogicalTensor, TensorReader, parameter_shapes
from llama4_convert.checkpoints.quantized import QuantizedReader
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.validation.diagnosis.sketches import sketch, sketch_of_rows
from llama4_convert.validation.diagnosis.tolerance import EXACT, Array, Floats, Tolerance, as_matrix, floats, some_of
from llama4_convert.validation.diagnosis.wrong_tensor import Axis, Region, WrongTensor

# The two vocabulary matrices have 2 GB each in Scout: they are read in slices of rows, all others whole.
SLICED = {"tok_embeddings", "output"}
SLICE_ROWS = 4096
FLOATS = {"BF16", "F16", "F32", "F64"}
_SAMPLE_COLUMNS = 64  # of a sliced matrix that stand for all


def slices(name: str, height: int) -> Iterator[tuple[int, int] | None]:
    """Row ranges to read one after another, to one behind the last, where nothing should be; None for all at once."""
    if name not in SLICED:
        yield None
    else:
        yield from ((start, start + SLICE_ROWS) for start in range(0, height + 1, SLICE_ROWS))


@dataclass(frozen=True)
class TensorPairs:
    """Two checkpoints' tensors by logical name, `theirs` having at least the names of `ours`, and how they are compared."""

    ours: Mapping[str, LogicalTensor]
    theirs: Mapping[str, LogicalTensor]
    names: Sequence[str]  # those of `ours` that are compared, in model order
    config: Llama4Config  # that `ours` is bound for
    has_vision: bool  # whether names in messages begin as those of a model with a vision tower
    lossy: Mapping[str, str]  # keys of `theirs` that are equal only within what a scheme loses -> the scheme
    limits: Mapping[str, float]  # relative squared error of each scheme
    reader: QuantizedReader | None  # of `theirs`, for its codes and scales
    their_reader: TensorReader  # of the keys of `theirs`
    unexpected: Sequence[str] = ()  # keys that hold no tensor of the model
    # Neither is taken as right: of two dtypes numbers are equal if rounding either gives the other, not only if ours does.
    either_way: bool = False
    # Neither has the true numbers: errors are relative to the smaller ones.
    both_quantized: bool = False
    their_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # where they differ from those of `ours`

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self.config)

    @property
    def vocabulary(self) -> int:
        return self.config.text_config.vocab_size

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor of `ours`."""
        return prod(self.shapes[name]) * ITEM_SIZES[self.ours[name].dtype]

    def numbers(self, name: str) -> int:
        """How many numbers of a tensor are in memory at a time."""
        shapes = self.shapes[name], self.their_shapes.get(name, ())
        return max(prod((min(s[0], 2 * SLICE_ROWS), *s[1:]) if name in SLICED else s) for s in shapes if s)

    def tolerance(self, name: str) -> Tolerance:
        matrix = self.reader.quantized.get(self.theirs[name].keys[0]) if self.reader else None
        return Tolerance(self.limits[matrix.kind] if matrix else 0.0)

    def load(self, name: str, tolerance: Tolerance) -> tuple[Array, Array]:
        """Reference and candidate, comparable: bits of one dtype, or numbers if lossy. Not for sliced tensors."""
        return self.reference(name, tolerance, self.theirs[name].dtype), self.candidate(name, tolerance)

    def reference(self, name: str, tolerance: Tolerance, dtype: str) -> Array:
        ours = self.ours[name]
        bits = np.ascontiguousarray(ours.load(None))
        return floats(bits, ours.dtype) if tolerance.limit else cast(bits, ours.dtype, dtype)

    def candidate(self, name: str, tolerance: Tolerance) -> Array:
        theirs = self.theirs[name]
        bits = np.ascontiguousarray(theirs.load(None))
        return floats(bits, theirs.dtype) if tolerance.limit else bits

    def wrong_tensor(self, name: str) -> WrongTensor:
        """Both sides, read. Raises BindingError."""
        tolerance, dtype = self.tolerance(name), self.theirs[name].dtype
        axis, heads, head_dim = _heads(name, self.config)
        rows = Axis("row", heads if axis == 0 else 0, of_experts=name.endswith(".router"))
        axes = rows, Axis("column", heads if axis == 1 else 0)
        if name in SLICED:
            return self._sliced(name, dtype, axes)
        x, y = self.load(name, tolerance)
        if x.shape == y.shape or x.ndim == y.ndim == 1:
            x, y = as_matrix(x), as_matrix(y)
        return WrongTensor(name, tolerance, dtype, x, y, axes, self._sizes(name, head_dim if axis == 0 else 0, x))

    def _sizes(self, name: str, head_dim: int, x: Array) -> dict[str, int]:
        """Of the axes that `moved_values` names: of the heads on the rows of q and k, and of the vision tower's ends."""
        vision = self.config.vision_config
        if vision and name == "vision.patch_embedding":
            return {"high": vision.patch_size, "wide": vision.patch_size}
        if vision and name == "vision.adapter.c_fc":
            return {"pixels": x.shape[1] // vision.hidden_size}
        return {"head_dim": head_dim, "pairs": 0 if head_dim % 2 else head_dim // 2}

    def _sliced(self, name: str, dtype: str, axes: tuple[Axis, Axis]) -> WrongTensor:
        """Both read once, for some columns of all rows, and where they differ."""
        ours, theirs = self.ours[name], self.theirs[name]
        thin: tuple[list[Array], list[Array]] = ([], [])
        first: tuple[Array, Array] | None = None
        differing: list[Array] = []
        pieces: list[tuple[Array, Array]] = []
        for start in count(0, SLICE_ROWS):
            span = (start, start + SLICE_ROWS)
            x, y = cast(ours.load(span), ours.dtype, dtype), theirs.load(span)
            if y.ndim != 2 or x.shape[1] != y.shape[1]:
                return WrongTensor(name, EXACT, dtype, x, y, axes)
            first = first or (x, y)
            columns = some_of(x.shape[1], _SAMPLE_COLUMNS)
            for part, bits in zip(thin, (x, y), strict=True):
                part.append(bits[:, columns])
            n = min(len(x), len(y))
            rows = np.flatnonzero((x[:n] != y[:n]).any(1))
            if sum(map(len, differing)) < SLICE_ROWS:
                pieces.append((x[rows], y[rows]))
            differing.append(rows + start)
            if max(len(x), len(y)) < SLICE_ROWS:
                break
        assert first is not None
        whole = np.concatenate(thin[0]), np.concatenate(thin[1])
        if whole[0].shape != whole[1].shape:
            return WrongTensor(name, EXACT, dtype, *whole, axes)
        a, b = (np.concatenate(part) for part in zip(*pieces, strict=True))
        inner, shape = Region.between(a, b, dtype), (len(whole[0]), first[0].shape[1])
        region = replace(inner, rows=np.concatenate(differing), shape=shape)
        return WrongTensor(name, EXACT, dtype, *first, axes, thin=whole, sparse=region)

    def sketch(self, tensor: LogicalTensor) -> Floats:
        if tensor.name in SLICED:
            return sketch_of_rows(tensor, (self.vocabulary, self.config.text_config.hidden_size))
        return sketch(as_matrix(tensor.load(None)), tensor.dtype)


def cast(bits: Bits, source: str, target: str) -> Bits:
    """As a conversion with `--dtype` rounds. Raises BindingError for what is no float."""
    if source == target:
        return bits
    from llama4.loading import DTYPES, to_bits, to_tensor

    if target not in DTYPES:
        raise BindingError(f"a tensor of dtype {target}")
    return to_bits(to_tensor(bits, source).to(DTYPES[target]))


def _heads(name: str, config: Llama4Config) -> tuple[int, int, int]:
    """The axis that attention heads share, their number and size; no heads: 0, 0, 0."""
    text, vision = config.text_config, config.vision_config
    if found := re.fullmatch(r"layers\.\d+\.attention\.([qkvo])", name):
        heads = text.num_key_value_heads if found[1] in "kv" else text.num_attention_heads
        return int(found[1] == "o"), heads, text.head_dim
    if vision and (found := re.fullmatch(r"vision\.layers\.\d+\.w(?:([qkv])\.\w+|o\.weight)", name)):
        heads = vision.num_attention_heads
        return int(found[1] is None), heads, vision.hidden_size // heads
    return 0, 0, 0
