"""Where the numbers come from: the logical tensors of a Llama 4, their names and shapes, and what reads them.

`weights_meta` and `weights_transformers` bind their layouts by hand, independently of the conversion tables: if a table lies,
these do not lie with it. A binding yields `LogicalTensor`s in model order, the same names from either layout, [out, in] for
projections and an expert at a time, so that two checkpoints can be held against each other in little memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llama4.config import Llama4Config, Llama4TextConfig, Llama4VisionConfig
from llama4.geometry import InvalidModel

Bits = NDArray[np.unsignedinteger[Any]]
Rows = tuple[int, int]


class TensorReader(Protocol):
    """One file or directory of named tensors; implemented by `llama4_convert.checkpoints`."""

    def keys(self) -> Collection[str]: ...

    def dtype(self, key: str) -> str:
        """As safetensors spells it: "BF16"."""
        ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def read(self, key: str, rows: Rows | None = None, columns: Rows | None = None) -> Bits:
        """The raw bits of a tensor, as unsigned integers of its item size.

        `rows` cuts its first dimension as a slice does, `columns` the last one of a tensor that has more.
        """
        ...


@dataclass(frozen=True)
class LogicalTensor:
    """A tensor of the model, wherever its parts lie. `keys` are the layout's, for messages."""

    name: str
    keys: tuple[str, ...]
    dtype: str
    load: Callable[[Rows | None], Bits]
    """The raw bits in the model's shape; `rows` cuts the first dimension."""


class BindingError(InvalidModel):
    """A layout lacks a tensor that the configuration calls for; the message names the keys that were looked for."""


class ShapeError(BindingError):
    """A tensor has not the shape that the configuration calls for; the message names the key."""


class ExpertMatrix(NamedTuple):
    """One of the three matrices of a routed expert."""

    layer: int
    expert: int
    part: str  # "gate", "up" or "down"

    @property
    def experts(self) -> str:
        """What the names of all experts of the layer begin with."""
        return f"layers.{self.layer}.feed_forward.experts"


_EXPERT_MATRIX = re.compile(r"layers\.(\d+)\.feed_forward\.experts\.(\d+)\.(gate|up|down)")


def expert_of(name: str) -> ExpertMatrix | None:
    """The routed expert's matrix that a name stands for; None for any other tensor.

    `name` is logical, or a key of a Transformers directory that has a tensor for each expert.
    """
    found = _EXPERT_MATRIX.search(name)
    return ExpertMatrix(int(found[1]), int(found[2]), found[3]) if found else None


def absent(name: str, error: BindingError) -> LogicalTensor:
    """A tensor that a checkpoint lacks: it has no keys, and to load it raises `error`."""

    def load(rows: Rows | None) -> Bits:
        raise error

    return LogicalTensor(name, (), "", load)


def cut(bits: Bits, rows: Rows | None) -> Bits:
    """Some rows of a matrix; None: all."""
    return bits if rows is None else bits[rows[0] : rows[1]]


def first_key(keys: Collection[str], *candidates: str) -> str:
    """The first of several spellings that is there. Raises BindingError."""
    for key in candidates:
        if key in keys:
            return key
    raise BindingError(f"no tensor {' or '.join(candidates)}")


def parameter_shapes(config: Llama4Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every logical tensor, in model order."""
    shapes = dict(_text_shapes(config.text_config))
    if config.vision_config:
        shapes.update(_vision_shapes(config.vision_config))
        shapes["vision.projection"] = (config.text_config.hidden_size, config.vision_config.vision_output_dim)
    return shapes


def _text_shapes(c: Llama4TextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    yield "tok_embeddings", (c.vocab_size, d)
    for layer in range(c.num_hidden_layers):
        at = f"layers.{layer}."
        yield f"{at}attention_norm", (d,)
        yield f"{at}attention.q", (q, d)
        yield f"{at}attention.k", (kv, d)
        yield f"{at}attention.v", (kv, d)
        yield f"{at}attention.o", (d, q)
        yield f"{at}ffn_norm", (d,)
        if c.is_moe(layer):
            yield f"{at}feed_forward.router", (c.num_local_experts, d)
            for e in range(c.num_local_experts):
                yield from _swiglu_shapes(f"{at}feed_forward.experts.{e}.", d, c.intermediate_size)
            yield from _swiglu_shapes(f"{at}feed_forward.shared.", d, c.intermediate_size)
        else:
            yield from _swiglu_shapes(f"{at}feed_forward.", d, c.intermediate_size_mlp)
    yield "norm", (d,)
    yield "output", (c.vocab_size, d)


def _swiglu_shapes(at: str, d: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{at}gate", (width, d)
    yield f"{at}up", (width, d)
    yield f"{at}down", (d, width)


def _vision_shapes(v: Llama4VisionConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, mlp, out = v.hidden_size, v.intermediate_size, v.vision_output_dim
    yield "vision.class_embedding", (d,)
    yield "vision.position_embedding", (v.patches_a_side**2 + 1, d)
    yield "vision.patch_embedding", (d, 3 * v.patch_size**2)
    for norm in ("ln_pre", "ln_post"):
        yield from _biased(f"vision.{norm}", (d,))
    for layer in range(v.num_hidden_layers):
        at = f"vision.layers.{layer}."
        yield from _biased(f"{at}ln_1", (d,))
        yield from _biased(f"{at}ln_2", (d,))
        for name in ("wq", "wk", "wv", "wo"):
            yield from _biased(f"{at}{name}", (d, d))
        yield from _biased(f"{at}c_fc", (mlp, d))
        yield from _biased(f"{at}c_proj", (d, mlp))
    yield "vision.adapter.c_fc", (out, v.shuffled_size)
    yield "vision.adapter.c_proj", (out, out)


def _biased(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
