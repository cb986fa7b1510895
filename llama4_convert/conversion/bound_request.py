"""A request bound to its source: the job that a run carries out, and what results say beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.conversion.request import Request
from llama4_convert.metadata.config_repair import Repair
from llama4_convert.planning.adapter import Adapter
from llama4_convert.streaming.job import Job
from quant.recipe import Recipe


@dataclass(frozen=True)
class BoundRequest:
    """What a conversion is, before a byte of tensor data is read: `job` runs, the other fields go into results."""

    request: Request
    source: MetaCheckpoint | TransformersCheckpoint
    job: Job
    ranks: int  # files of the source's weights
    variant: str
    variant_reason: str
    max_position_embeddings: int
    recipe: Recipe | None
    adapter: Adapter | None
    repaired: Sequence[Repair] | None = None  # fields of small files; None without --config-from and --vision-from


def recipe_options(recipe: Recipe | None, allow_nonfinite: bool = False) -> dict[str, Any]:
    """The options of a recipe that decide bytes, for the manifest."""
    if recipe is None:
        return {}
    allowed = {"allow_nonfinite": True} if allow_nonfinite else {}
    return {"recipe": recipe.to_json(), **allowed}


def adapter_source(adapter: Adapter | None) -> dict[str, Mapping[str, str]]:
    """The adapter as a part of the source, for the manifest."""
    return {"adapter": dict(adapter.fingerprint)} if adapter else {}
