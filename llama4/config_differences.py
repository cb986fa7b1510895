"""The fields in which two configurations disagree, by their names in config.json."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from llama4.config import Llama4Config


class Difference(NamedTuple):
    """One field in which two configurations disagree, by its name in config.json; vision's are prefixed."""

    field: str
    expected: Any
    found: Any


def differences(expected: Llama4Config, found: Llama4Config) -> Iterator[Difference]:
    """The fields of `found` that contradict `expected`. What cannot matter is left out: experts where no layer is MoE."""
    text_a, text_b = expected.text_config, found.text_config
    idle = set()
    if not text_a.moe_layers and not text_b.moe_layers:
        idle = {"intermediate_size", "num_local_experts", "num_experts_per_tok"}
    for difference in _compare(text_a, text_b, ""):
        if difference.field not in idle:
            yield difference
    vision_a, vision_b = expected.vision_config, found.vision_config
    if vision_a is None or vision_b is None:
        if vision_a is not vision_b:
            yield Difference("vision_config", *("present" if v else None for v in (vision_a, vision_b)))
        return
    yield from _compare(vision_a, vision_b, "vision_config.")
    for name in ("image_token_index", "boi_token_index", "eoi_token_index"):
        a, b = getattr(expected, name), getattr(found, name)
        if a is not None and a != b:
            yield Difference(name, a, b)


def _compare(a: Any, b: Any, prefix: str) -> Iterator[Difference]:
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if x == y or (isinstance(x, float) and isinstance(y, float) and math.isclose(x, y, rel_tol=1e-12)):
            continue
        if is_dataclass(x) and is_dataclass(y):
            for inner in _compare(x, y, f"{prefix}{field.name}."):
                yield inner._replace(field=_ROPE_FIELDS.get(inner.field, inner.field))
        else:
            yield Difference(prefix + field.name, _plain(x), _plain(y))


# What `RopeScaling` calls by Meta's meaning, config.json calls by its own name.
_ROPE_FIELDS = {"rope_scaling.original_context": "rope_scaling.original_max_position_embeddings"}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        names = {field.name: _ROPE_FIELDS.get(f"rope_scaling.{field.name}", field.name) for field in fields(value)}
        return {name.removeprefix("rope_scaling."): getattr(value, own) for own, name in names.items()}
    if isinstance(value, tuple):
        return [int(x) if isinstance(x, bool) else x for x in value]
    return value
