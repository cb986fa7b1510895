"""Meta's layout bound by hand: which keys hold a logical tensor, and how the parts of the ranks join."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from llama4.config import Llama4Config, Llama4TextConfig
from llama4.geometry import Geometry
from llama4.weights import BindingError, Bits, LogicalTensor, Rows, TensorReader, absent, cut, first_key

_FLAT = ("_eD_F", "_eF_D")  # endings of the keys that stack the experts on one axis
_VISION_LAYER = "vision_embeddings.vision_encoder.transformer.resblocks."


def complete(ranks: Sequence[TensorReader], g: Geometry) -> Geometry:
    """`g` with the sizes that params.json leaves open read off the tensors. Raises BindingError."""
    first, n = ranks[0], len(ranks)
    keys = first.keys()

    def size(dimension: int, *endings: str) -> int:
        """Dimension of the first tensor whose key ends so; 0 if there is none."""
        return next((first.shape(key)[dimension] for key in keys for ending in endings if key.endswith(ending)), 0)

    vocab = size(0, "tok_embeddings.weight") * n
    if not vocab:
        raise BindingError("no tensor tok_embeddings.weight")
    fused = size(0, "feed_forward.mlp.fc1_weight") * n // 2
    return g.completed(
        vocab_size=vocab,
        n_experts=size(1, "feed_forward.router_DE"),
        expert_dim=size(0, "feed_forward.w_in_shared_FD.weight", "feed_forward.shared_expert.w1.weight") * n,
        dense_dim=fused or size(0, "feed_forward.w1.weight") * n,
    )


def logical_tensors(
    ranks: Sequence[TensorReader], config: Llama4Config, lenient: bool = False
) -> Iterator[LogicalTensor]:
    """Every logical tensor of a checkpoint of any number of ranks, in model order.

    Raises BindingError; if `lenient` what is missing is `absent`.
    """
    c, bind = config.text_config, _Binder(ranks, lenient)
    yield bind.joined("tok_embeddings", 0, "tok_embeddings.weight")
    for layer in range(c.num_hidden_layers):
        at = f"layers.{layer}."
        attention, ffn = f"{at}attention.", f"{at}feed_forward."
        yield bind.whole(f"{at}attention_norm", f"{attention}wqkv.layer_norm_weight", f"{at}attention_norm.weight")
        heads = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]
        for i, name in enumerate("qkv"):
            yield bind.block(
                f"{attention}{name}",
                (f"{attention}wqkv.weight", i, [n * c.head_dim for n in heads]),
                f"{attention}w{name}.weight",
            )
        yield bind.joined(f"{attention}o", 1, f"{attention}wo.weight")
        norms = (f"{ffn}norm.weight", f"{ffn}mlp.layer_norm_weight", f"{at}ffn_norm.weight")
        yield bind.whole(f"{at}ffn_norm", *norms)
        if c.is_moe(layer):
            yield from _experts(bind, c, ffn)
            for name, published, module in (
                ("gate", "w_in_shared_FD", "w1"),
                ("up", "w_swiglu_FD", "w3"),
                ("down", "w_out_shared_DF", "w2"),
            ):
                spellings = (f"{ffn}{published}.weight", f"{ffn}shared_expert.{module}.weight")
                yield bind.joined(f"{ffn}shared.{name}", int(name == "down"), *spellings)
        else:
            width = c.intermediate_size_mlp
            for i, (name, module) in enumerate((("gate", "w1"), ("up", "w3"))):
                yield bind.block(f"{ffn}{name}", (f"{ffn}mlp.fc1_weight", i, [width, width]), f"{ffn}{module}.weight")
            yield bind.joined(f"{ffn}down", 1, f"{ffn}mlp.fc2_weight", f"{ffn}w2.weight")
    yield bind.whole("norm", "norm.weight")
    yield bind.joined("output", 0, "output.weight")
    if config.vision_config:
        yield from _vision(bind, config.vision_config.num_hidden_layers)


class _Binder:
    """Makes logical tensors from what the ranks hold; of several spellings it takes the one that is there."""

    def __init__(self, ranks: Sequence[TensorReader], lenient: bool) -> None:
        self.ranks, self.keys, self.lenient = ranks, ranks[0].keys(), lenient

    def tensor(self, name: str, load: Callable[[str, Rows | None], Bits], *spellings: str) -> LogicalTensor:
        """The tensor that one of `spellings` names; `load` takes the one that is there. Raises BindingError unless lenient."""
        try:
            key = first_key(self.keys, *spellings)
        except BindingError as error:
            if not self.lenient:
                raise
            return absent(name, error)
        return LogicalTensor(name, (key,), self.ranks[0].dtype(key), partial(load, key))

    def whole(self, name: str, *spellings: str) -> LogicalTensor:
        """Every rank holds all of it."""
        return self.tensor(name, self.ranks[0].read, *spellings)

    def joined(self, name: str, axis: int, *spellings: str) -> LogicalTensor:
        """The ranks share `axis`."""
        return self.tensor(name, self._read_rows if axis == 0 else self._read_columns, *spellings)

    def block(self, name: str, fused: tuple[str, int, Sequence[int]], plain: str) -> LogicalTensor:
        """Rows of the blocks that every rank stacks on dimension 0; sizes are the full model's. Or a key of its own."""
        key, index, sizes = fused
        if key not in self.keys:
            return self.joined(name, 0, plain)
        local = [size // len(self.ranks) for size in sizes]
        start = sum(local[:index])

        def load(key: str, rows: Rows | None) -> Bits:
            parts = [rank.read(key, (start, start + local[index])) for rank in self.ranks]
            return cut(np.concatenate(parts), rows)

        return self.tensor(name, load, key)

    def _read_columns(self, key: str, rows: Rows | None) -> Bits:
        return np.concatenate([rank.read(key, rows) for rank in self.ranks], axis=-1)

    def _read_rows(self, key: str, rows: Rows | None) -> Bits:
        """Only from the ranks that hold them."""
        height = self.ranks[0].shape(key)[0]
        start, stop = rows or (0, height * len(self.ranks))
        parts = [
            reader.read(key, (max(start - first, 0), stop - first))
            for reader, first in zip(self.ranks, range(0, stop, height), strict=False)
            if first + height > start
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [self.ranks[0].read(key, (0, 0))])


def _experts(bind: _Binder, c: Llama4TextConfig, ffn: str) -> Iterator[LogicalTensor]:
    yield bind.tensor(f"{ffn}router", lambda key, rows: cut(bind.ranks[0].read(key).T, rows), f"{ffn}router_DE")
    d, width = c.hidden_size, c.intermediate_size // len(bind.ranks)

    def expert(height: int, e: int, axis: int, key: str, rows: Rows | None) -> Bits:
        """Expert `e` as [out, in]; it lies as [in, out], in the flattened 2-D key or in the 3-D one."""
        if key.endswith(_FLAT):
            parts = [rank.read(key, (e * height, (e + 1) * height)) for rank in bind.ranks]
        else:
            parts = [rank.read(key, (e, e + 1))[0] for rank in bind.ranks]
        return cut((parts[0] if len(parts) == 1 else np.concatenate(parts, axis)).T, rows)

    for e in range(c.num_local_experts):
        for name, flat, stacked, height, axis in (
            ("gate", "moe_w_in_eD_F", "w1", d, 1),
            ("up", "moe_w_swiglu_eD_F", "w3", d, 1),
            ("down", "moe_w_out_eF_D", "w2", width, 0),
        ):
            spellings = (f"{ffn}experts.{flat}", f"{ffn}experts.{stacked}")
            yield bind.tensor(f"{ffn}experts.{e}.{name}", partial(expert, height, e, axis), *spellings)


def _vision(bind: _Binder, n_layers: int) -> Iterator[LogicalTensor]:
    encoder = "vision_embeddings.vision_encoder."
    yield bind.whole("vision.class_embedding", f"{encoder}class_embedding")
    yield bind.whole("vision.position_embedding", f"{encoder}positional_embedding_vlm")
    yield bind.joined("vision.patch_embedding", 0, f"{encoder}conv1._linear.weight")
    for norm in ("ln_pre", "ln_post"):
        for kind in ("weight", "bias"):
            yield bind.whole(f"vision.{norm}.{kind}", f"{encoder}{norm}.{kind}")
    for layer in range(n_layers):
        meta, at = f"{_VISION_LAYER}{layer}.", f"vision.layers.{layer}."
        for norm in ("ln_1", "ln_2"):
            for kind in ("weight", "bias"):
                yield bind.whole(f"{at}{norm}.{kind}", f"{meta}{norm}.{kind}")
        for name in ("wq", "wk", "wv"):
            for kind in ("weight", "bias"):
                yield bind.joined(f"{at}{name}.{kind}", 0, f"{meta}attn.{name}.{kind}")
        yield bind.joined(f"{at}wo.weight", 1, f"{meta}attn.wo.weight")
        yield bind.whole(f"{at}wo.bias", f"{meta}attn.wo.bias")
        for kind in ("weight", "bias"):
            yield bind.joined(f"{at}c_fc.{kind}", 0, f"{meta}mlp.c_fc.{kind}")
        yield bind.joined(f"{at}c_proj.weight", 1, f"{meta}mlp.c_proj.weight")
        yield bind.whole(f"{at}c_proj.bias", f"{meta}mlp.c_proj.bias")
    yield bind.joined("vision.adapter.c_fc", 0, "vision_embeddings.vision_adapter.mlp.c_fc.weight")
    yield bind.joined("vision.adapter.c_proj", 1, "vision_embeddings.vision_adapter.mlp.c_proj.weight")
    yield bind.joined("vision.projection", 0, "vision_projection.weight")
