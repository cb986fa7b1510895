"""Transformers' layout bound by hand, experts fused or linearized: the same logical tensors as `weights_meta`, in its order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from llama4.config import Llama4Config
from llama4.weights import (
    BindingError,
    Bits,
    LogicalTensor,
    Rows,
    ShapeError,
    TensorReader,
    absent,
    cut,
    expert_of,
    parameter_shapes,
)

_TEXT_PREFIX = "language_model."  # where there is a vision tower

# Endings and stems of logical names, and what Transformers calls them.
_TEXT_NAMES = {
    "tok_embeddings": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "output": "lm_head.weight",
    "attention_norm": "input_layernorm.weight",
    "attention.q": "self_attn.q_proj.weight",
    "attention.k": "self_attn.k_proj.weight",
    "attention.v": "self_attn.v_proj.weight",
    "attention.o": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "feed_forward.router": "feed_forward.router.weight",
    "feed_forward.gate": "feed_forward.gate_proj.weight",
    "feed_forward.up": "feed_forward.up_proj.weight",
    "feed_forward.down": "feed_forward.down_proj.weight",
    "feed_forward.shared.gate": "feed_forward.shared_expert.gate_proj.weight",
    "feed_forward.shared.up": "feed_forward.shared_expert.up_proj.weight",
    "feed_forward.shared.down": "feed_forward.shared_expert.down_proj.weight",
}
_VISION_NAMES = {
    "class_embedding": "vision_model.class_embedding",
    "position_embedding": "vision_model.positional_embedding_vlm",
    "patch_embedding": "vision_model.patch_embedding.linear.weight",
    "ln_pre": "vision_model.layernorm_pre",
    "ln_post": "vision_model.layernorm_post",
    "adapter.c_fc": "vision_model.vision_adapter.mlp.fc1.weight",
    "adapter.c_proj": "vision_model.vision_adapter.mlp.fc2.weight",
    "projection": "multi_modal_projector.linear_1.weight",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "c_fc": "mlp.fc1",
    "c_proj": "mlp.fc2",
}


def transformers_key(name: str, has_vision: bool) -> str:
    """The key of the tensor that holds logical tensor `name`, experts in the fused form."""
    if name.startswith("vision."):
        stem = name.removeprefix("vision.")
        stem, _, kind = stem.rpartition(".") if stem.endswith((".weight", ".bias")) else (stem, "", "")
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", stem)
        key = f"vision_model.model.layers.{layer[1]}.{_VISION_NAMES[layer[2]]}" if layer else _VISION_NAMES[stem]
        return f"{key}.{kind}" if kind else key
    prefix = _TEXT_PREFIX if has_vision else ""
    if expert := expert_of(name):
        return f"{prefix}model.{expert.experts}.{'down_proj' if expert.part == 'down' else 'gate_up_proj'}"
    if layer := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        return f"{prefix}model.layers.{layer[1]}.{_TEXT_NAMES[layer[2]]}"
    return prefix + _TEXT_NAMES[name]


def logical_tensors(
    reader: TensorReader, config: Llama4Config, lenient: bool = False, has_vision: bool | None = None
) -> Iterator[LogicalTensor]:
    """Every logical tensor of a directory, in model order. Raises BindingError; if `lenient` what is missing is `absent`.

    `has_vision`: whether the directory's keys are those of a model that sees; None: as `config` says.
    """
    has_vision = config.vision_config is not None if has_vision is None else has_vision
    for name in parameter_shapes(config):
        try:
            yield _bind(reader, config, name, has_vision)
        except BindingError as error:
            if not lenient:
                raise
            yield absent(name, error)


def _bind(reader: TensorReader, config: Llama4Config, name: str, has_vision: bool) -> LogicalTensor:
    """Raises BindingError."""
    keys = reader.keys()
    key = transformers_key(name, has_vision)
    if name == "output" and key not in keys and config.text_config.tie_word_embeddings:
        key = transformers_key("tok_embeddings", has_vision)
    expert = expert_of(name)
    if expert is None:
        if key not in keys:
            raise BindingError(f"no tensor {key}")
        return LogicalTensor(name, (key,), reader.dtype(key), partial(reader.read, key))
    if key in keys:
        load = partial(expert_of_fused, reader, key, expert.expert, expert.part)
        return LogicalTensor(name, (key,), reader.dtype(key), load)
    stem = key.rpartition(".")[0]
    linear = f"{stem}.{expert.expert}.{expert.part}_proj.weight"
    if linear not in keys:
        raise BindingError(f"no tensor {key} or {linear}")
    return LogicalTensor(name, (linear,), reader.dtype(linear), partial(reader.read, linear))


def expert_of_fused(reader: TensorReader, key: str, expert: int, part: str, rows: Rows | None) -> Bits:
    """One projection as [out, in], from [experts, in, out]; gate and up lie side by side, gate first."""
    shape = reader.shape(key)
    if len(shape) != 3 or expert >= shape[0]:
        raise ShapeError(f"{key} has shape {list(shape)}: no matrix of expert {expert}")
    width = shape[2] // 2
    columns = {"gate": (0, width), "up": (width, shape[2]), "down": None}[part]
    return cut(reader.read(key, (expert, expert + 1), columns)[0].T, rows)
