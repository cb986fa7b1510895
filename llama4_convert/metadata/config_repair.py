"""Repairs a fine-tune's config.json: training frameworks strip fields or get them wrong.

Sizes are read off the tensors. Fields that no tensor shows (RoPE's scaling, chunks, which layers rotate ...) are taken from the
base model: a fine-tune computes with them, whatever its config.json says. Every change is reported as a `Repair`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from llama4.config import Llama4Config, Llama4TextConfig, Llama4VisionConfig
from llama4.config_differences import differences
from llama4.config_fields import ConfigError
from llama4_convert.checkpoints.tensors import TORCH_NAMES, StoredTensor
from llama4_convert.errors import BadInput, one_line
from llama4_convert.files import parse_object
from llama4_convert.metadata.config import to_json

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_SIZES = (
    *(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "intermediate_size_mlp",
        "num_local_experts",
    ),
    *("moe_layers", "interleave_moe_layer_step"),
)
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")  # tensors show their products only
_A_LAYER = ("no_rope_layers", "layer_types")  # lists with an entry for each
# Fields that are taken over together: several spellings, or one that is counted from another.
_TOGETHER = {
    "rope": ("rope_theta", "rope_scaling", "rope_parameters"),
    "no_rope": ("no_rope_layers", "no_rope_layer_interval", "layer_types", "attention_chunk_size"),
}
PAD = "pad_token_id"  # also stands beside text_config, for Transformers 5.0.0
TOKENS = ("bos_token_id", "eos_token_id", PAD)
GENERATION = "generation_config.json"
TEXT_PREFIX = "language_model."  # with a vision tower the language model sits one level deeper
_VISION = ("vision_model.", "multi_modal_projector.")
_IMAGE_TOKENS = ("image_token_index", "boi_token_index", "eoi_token_index")
_DTYPE = ("dtype", "torch_dtype")


class Repair(NamedTuple):
    """A field of config.json, its value before (None: the field is missing), and its value now."""

    field: str
    found: Any
    used: Any

    def sentence(self, base: str) -> str:
        found = "is missing" if self.found is None else f"is {one_line(json.dumps(self.found), 80)}"
        return f"{self.field} {found}: repaired, by {base} or by the tensors, to {one_line(json.dumps(self.used), 160)}"


def tensor_sizes(tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The fields of a text model's config.json that its tensors decide: field -> value."""
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    found: dict[str, Any] = {}
    if len(embeddings := shapes.get("model.embed_tokens.weight", ())) == 2:
        found["vocab_size"], found["hidden_size"] = embeddings
    layers: set[int] = set()
    moe: set[int] = set()
    for key, shape in shapes.items():
        if not (match := _LAYER.fullmatch(key)) or not shape:
            continue
        layers.add(int(match[1]))
        if match[2] == "feed_forward.router.weight":
            moe.add(int(match[1]))
            found["num_local_experts"] = shape[0]
        elif match[2] == "feed_forward.shared_expert.gate_proj.weight":
            found["intermediate_size"] = shape[0]
        elif match[2] == "feed_forward.gate_proj.weight":
            found["intermediate_size_mlp"] = shape[0]
    if layers:
        found["num_hidden_layers"] = max(layers) + 1
        found["moe_layers"] = sorted(moe)
    return found


def other_model(base: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> str | None:
    """Why the tensors are no fine-tune of `base`, in words; None if they may be. Numbers of layers and tokens may differ."""
    expected, sizes = Llama4TextConfig.from_json(base), tensor_sizes(tensors)
    for field in ("hidden_size", "intermediate_size", "intermediate_size_mlp", "num_local_experts"):
        is_idle = field == "num_local_experts" and not expected.moe_layers
        if field in sizes and not is_idle and sizes[field] != getattr(expected, field):
            return f"{field} is {sizes[field]} in its tensors and {getattr(expected, field)} there"
    common = range(min(sizes.get("num_hidden_layers", 0), expected.num_hidden_layers))
    moe = [layer for layer in common if layer in sizes["moe_layers"]]
    if moe != [layer for layer in common if expected.is_moe(layer)]:
        return f"layers {moe[:6]} have experts in its tensors, and {list(expected.moe_layers[:6])} there"
    return None


def vision_keys(tensors: Mapping[str, StoredTensor]) -> list[str]:
    return [key for key in tensors if key.startswith(_VISION)]


def text_fields(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's fields of a config.json: those of `text_config` where there is a vision tower."""
    return _part(body, "text_config") or body


def _part(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be an object, not {value!r:.40}")
    return value


def repair(
    found: Mapping[str, Any], base: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Any], list[Repair]]:
    """A fine-tune's config.json and its base's -> the repaired config.json, and what was changed.

    The result is a text model's if `tensors` are those of one. Raises ConfigError, and BadInput if it is no fine-tune of `base`.
    """
    found_text, base_text = text_fields(found), text_fields(base)
    texts = {key.removeprefix(TEXT_PREFIX): tensor for key, tensor in tensors.items()}
    if apart := other_model(base_text, texts):
        raise BadInput(f"it is no fine-tune of the base: {apart}")
    text, repairs = repair_text(found_text, base_text, texts)
    if not vision_keys(tensors):
        body = {**text, "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    else:
        inner = {name: value for name, value in text.items() if name != "architectures"}
        outer = found if "text_config" in found else {name: text[name] for name in _DTYPE if name in text}
        body = {**outer, "text_config": {**inner, "model_type": "llama4_text"}, "model_type": "llama4"}
        body["architectures"] = ["Llama4ForConditionalGeneration"]
        if body.get(PAD) is not None:
            body[PAD] = text.get(PAD)
        repairs += _repair_vision(body, base)
    reported = {one.field for one in repairs}
    names = [name for name in ("model_type", "architectures", PAD) if name in body and name not in reported]
    repairs += [Repair(name, found.get(name), body[name]) for name in names if found.get(name) != body[name]]
    return body, repairs + _repair_dtype(body, tensors)


def _repair_dtype(body: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> list[Repair]:
    """The dtype of most tensors, in place. The field was called `torch_dtype` before Transformers 5."""
    counted = Counter(tensor.dtype for tensor in tensors.values() if tensor.dtype in TORCH_NAMES)
    used = [TORCH_NAMES[dtype] for dtype, _ in counted.most_common(1)]
    name = next((name for name in _DTYPE if body.get(name)), _DTYPE[-1])
    if not used or body.get(name) == used[0]:
        return []
    found = body.get(name)
    for part in (body, body.get("text_config", body)):
        part[name] = used[0]
    return [Repair(name, found, used[0])]


def _repair_vision(body: dict[str, Any], base: Mapping[str, Any]) -> list[Repair]:
    """The fields of the vision tower, in place: the tower is the base's, and so is its configuration."""
    found, expected = _part(body, "vision_config"), _part(base, "vision_config")
    if not expected:
        if not found:
            raise ConfigError("there is a vision tower, and no vision_config here or in the base's config.json")
        return []
    repairs = [
        Repair(name, None, base[name])
        for name in _IMAGE_TOKENS
        if body.get(name) is None and base.get(name) is not None
    ]
    body |= {one.field: one.used for one in repairs}
    is_null = any(value is None and expected.get(name) is not None for name, value in found.items())
    try:
        if found and not is_null and Llama4VisionConfig.from_json(found) == Llama4VisionConfig.from_json(expected):
            return repairs
    except ConfigError:  # what is left contradicts itself
        pass
    taken = {name: value for name, value in expected.items() if name not in _DTYPE}
    body["vision_config"] = {name: value for name, value in found.items() if name in _DTYPE} | taken
    changed = (name for name in taken if found.get(name) != taken[name])
    return repairs + [Repair(f"vision_config.{name}", found.get(name), taken[name]) for name in changed]


def repair_text(
    found: Mapping[str, Any], base: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Any], list[Repair]]:
    """A fine-tune's text configuration and its base's -> the repaired one, and what was changed. Raises ConfigError."""
    text = dict(found)
    expected = Llama4TextConfig.from_json(base)
    for size in list(_sizes_that_differ(text, tensors)):
        text[size.field] = size.used
    if text.get("max_position_embeddings") is None:
        _take(text, base, ("max_position_embeddings",))
    _heads(text, expected, tensors)
    for difference in list(differences(Llama4Config(expected), Llama4Config(Llama4TextConfig.from_json(text)))):
        field = difference.field
        a_layer = field.startswith("no_rope") or field in _A_LAYER
        if field in (*_SIZES, *_HEADS) or (a_layer and expected.num_hidden_layers != _n_layers(text)):
            continue
        together = "rope" if field.startswith("rope_") else "no_rope" if field in _TOGETHER["no_rope"] else ""
        _take(text, base, _TOGETHER.get(together, (field,)))
    text |= wrong_tokens(text, base) | _nulls(text, base)
    names = [*text, *(name for name in found if name not in text)]
    repairs = [Repair(name, found.get(name), text.get(name)) for name in names if found.get(name) != text.get(name)]
    return text, repairs


def _sizes_that_differ(text: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[Repair]:
    now = Llama4TextConfig.from_json(text)
    for field, used in tensor_sizes(tensors).items():
        value = getattr(now, field)
        if (list(value) if isinstance(value, tuple) else value) == used:
            continue
        yield Repair(field, text.get(field), used)
        if field == "moe_layers":
            step = used[0] + 1 if used else 0
            yield Repair("interleave_moe_layer_step", text.get("interleave_moe_layer_step"), step)


def _nulls(text: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Field -> its value, for fields that are null: Transformers 5 refuses null where its class has a number."""
    now = Llama4TextConfig.from_json(text)
    names = [name for name, value in text.items() if value is None and base.get(name) is not None]
    own = {name: getattr(now, name) for name in names if name in (*_SIZES, *_A_LAYER)}
    plain = {name: [*map(_number, value)] if isinstance(value, tuple) else value for name, value in own.items()}
    return plain | {name: base[name] for name in names if name not in (*own, *_TOGETHER["rope"])}


def _number(entry: Any) -> Any:
    return int(entry) if isinstance(entry, bool) else entry


def _heads(text: dict[str, Any], base: Llama4TextConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Takes the base's heads, in place, where the projections have as many rows as these make."""
    rows = (base.num_attention_heads * base.head_dim, base.num_key_value_heads * base.head_dim)
    keys = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight")
    if all(key in tensors and tensors[key].shape[:1] == (n,) for key, n in zip(keys, rows, strict=True)):
        now = Llama4TextConfig.from_json(text)
        text |= {name: getattr(base, name) for name in _HEADS if getattr(now, name) != getattr(base, name)}


def wrong_tokens(found: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens that are missing or plain words, each with the base's.

    Special tokens stand behind the words, the first of them begins a text. Another one of them is the fine-tune's to choose.
    """
    specials = [i for name in TOKENS for i in _ids(base.get(name))]
    lowest = min(specials, default=0)
    return {
        name: base[name]
        for name in TOKENS
        if base.get(name) is not None and not any(i >= lowest for i in _ids(found.get(name)))
    }


def repair_generation(found: bytes | None, base: bytes | None) -> tuple[bytes | None, list[Repair]]:
    """Repairs generation_config.json, which decides what ends a text: it, or its wrong token ids, are taken from the base."""
    if base is None:
        return found, []
    if found is None:
        return base, [Repair(GENERATION, None, "the base's")]
    body, expected = parse_object(found, GENERATION), parse_object(base, GENERATION)
    if not (wrong := wrong_tokens(body, expected)):
        return found, []
    repairs = [Repair(f"{GENERATION}: {name}", body.get(name), used) for name, used in wrong.items()]
    return to_json({**body, **wrong}), repairs


def _ids(value: Any) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def _take(text: dict[str, Any], base: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Takes fields from the base, in place; a field that the base leaves to readers' defaults is removed."""
    for name in names:
        text.pop(name, None)
        if name in base:
            text[name] = base[name]


def _n_layers(text: Mapping[str, Any]) -> int:
    return Llama4TextConfig.from_json(text).num_hidden_layers
