"""The streamed bit comparison: every tensor of two checkpoints, each through its own layout's binding.

What differs by a single bit is found with certainty, whatever logits make of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from llama4.config import Llama4Config
from llama4.weights import BindingError, Bits, LogicalTensor, Rows, ShapeError
from llama4.weights_transformers import transformers_key
from llama4_convert.metrics import nmse
from llama4_convert.reference import Checkpoint

# The two vocabulary matrices have 2 GB each in Scout; all others are read whole.
_SLICED = {"tok_embeddings", "output"}
_ROWS = 4096
_FLOATS = {"BF16", "F16", "F32", "F64"}


@dataclass(frozen=True)
class WeightFault:
    """One logical tensor of the candidate that is not the reference's."""

    name: str
    tensor: str  # the Transformers key, fused form
    cause: str
    is_missing: bool = False

    @property
    def layer(self) -> int | None:
        """The layer of the text model, or of the vision tower if the name begins so."""
        found = re.search(r"layers\.(\d+)\.", self.name)
        return int(found[1]) if found else None

    @property
    def module(self) -> str:
        """The name without the layer: "feed_forward.experts.3.gate"."""
        return re.sub(r"layers\.\d+\.", "", self.name)

    def to_json(self) -> dict[str, Any]:
        return {"layer": self.layer, "module": self.module, "tensor": self.tensor, "cause": self.cause}


# No scheme of ours errs so much on any weights that are trained: docs/validate.md. A wrong tensor errs by 1 to 2.
_LARGEST_LOSS = {"int4": 0.2, "fp8": 0.005, "nf4": 0.1}


@dataclass(frozen=True)
class MatrixLoss:
    """What quantizing a matrix cost: squared error of what the runtime computes with over the squared weights."""

    key: str
    kind: str
    relative_mse: float


def compare_weights(
    reference: Checkpoint, candidate: Checkpoint, config: Llama4Config, advance: Callable[[int], None]
) -> Iterator[WeightFault | MatrixLoss]:
    """The faults of `candidate`, in model order, and the loss of every quantized matrix; `config` says what there must be.

    A missing tensor ends the comparison of those behind it. What is quantized cannot be equal: it is a fault only beyond what
    its scheme can lose. `advance` is told the bytes of the reference as they are read.
    """
    has_vision = config.vision_config is not None
    theirs = candidate.logical_tensors(config)
    quantized = candidate.lossy_beside(reference)
    for ours in reference.logical_tensors(config):
        key = transformers_key(ours.name, has_vision)
        try:
            found = next(theirs)
        except BindingError as error:
            yield WeightFault(ours.name, key, str(error), is_missing=True)
            return
        assert found.name == ours.name
        kind = quantized.get(found.keys[0])
        try:
            if kind is None:
                cause = _compare(ours, found, advance)
            else:
                loss = _loss(ours, found, advance)
                yield MatrixLoss(found.keys[0], kind, loss)
                cause = None
                if not loss <= _LARGEST_LOSS[kind]:
                    cause = f"a relative squared error of {loss:.3g}: {kind} makes no more than {_LARGEST_LOSS[kind]:g}"
        except ShapeError as error:
            cause = str(error)
        if cause:
            yield WeightFault(ours.name, key, cause)


def unexpected_tensors(candidate: Checkpoint, config: Llama4Config) -> list[str]:
    """Keys of a Transformers directory that hold no tensor of the model."""
    if candidate.layout != "transformers":
        return []
    used: set[str] = set()
    try:
        for tensor in candidate.logical_tensors(config):
            used.update(tensor.keys)
    except BindingError:
        return []  # what is missing is the news, and it may be there under a name that is off
    return sorted(set(candidate.readers[0].keys()) - used)


def _compare(ours: LogicalTensor, found: LogicalTensor, advance: Callable[[int], None]) -> str | None:
    """What is wrong with `found`, in words. Raises ShapeError."""
    differing, elements, largest = 0, 0, 0.0
    for rows in _blocks(ours.name):
        a = ours.load(rows)
        advance(a.nbytes)
        b = found.load(rows)
        if a.shape != b.shape:
            if rows is not None and a.shape[1:] == b.shape[1:]:
                return f"it has {'fewer' if len(b) < len(a) else 'more'} rows than the reference's"
            return f"its shape is {list(b.shape)}, not {list(a.shape)}"
        if not a.size:
            break
        elements += a.size
        if ours.dtype != found.dtype:
            if not {ours.dtype, found.dtype} <= _FLOATS:
                return f"its dtype is {found.dtype}, not {ours.dtype}"
            a = _cast(a, ours.dtype, found.dtype)
        unequal = a != b
        n = int(np.count_nonzero(unequal))
        if n:
            differing += n
            largest = max(largest, _largest_difference(a[unequal], b[unequal], found.dtype))
    if not differing:
        return None
    return f"{differing:,} of {elements:,} elements differ, by up to {largest:.3g}"


def _loss(ours: LogicalTensor, found: LogicalTensor, advance: Callable[[int], None]) -> float:
    """Relative squared error. Raises ShapeError."""
    from llama4.loading import to_tensor

    a = ours.load(None)
    advance(a.nbytes)
    b = found.load(None)
    if a.shape != b.shape:
        raise ShapeError(f"its shape is {list(b.shape)}, not {list(a.shape)}")
    return nmse(to_tensor(a, ours.dtype).float().numpy(), to_tensor(b, found.dtype).float().numpy())


def _blocks(name: str) -> Iterator[Rows | None]:
    """Row ranges to read one after another, until one is empty; None for all at once."""
    if name not in _SLICED:
        return iter((None,))
    return ((start, start + _ROWS) for start in count(0, _ROWS))


def _cast(bits: Bits, source: str, target: str) -> Bits:
    """As a conversion with `--dtype` rounds."""
    from llama4.loading import DTYPES, to_bits, to_tensor

    return to_bits(to_tensor(bits, source).to(DTYPES[target]))


def _largest_difference(a: Bits, b: Bits, dtype: str) -> float:
    from llama4.loading import to_tensor

    difference = (to_tensor(a, dtype).double() - to_tensor(b, dtype).double()).abs()
    return float(difference.max())
