"""Which kind of model a checkpoint is: base, instruct or guard. params.json does not say, so it is concluded from evidence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from llama4.geometry import Geometry

if TYPE_CHECKING:
    from llama4_convert.planned import Plan

VARIANTS = ("base", "instruct", "guard")


def conclude(plan: Plan, source: Path) -> tuple[str, str]:
    """(variant, what it was concluded from). Keys weigh more than shapes, shapes more than the directory's name."""
    if plan.base_evidence:
        return "base", f"it carries {plan.base_evidence[0]}, which only base models do"
    if plan.geometry.is_dense:
        return "guard", "it has no experts"
    resolved = source.resolve()
    name = resolved.parent.name if resolved.name == "original" else resolved.name
    for variant in ("guard", "instruct", "base"):
        if variant in re.split(r"[^a-z0-9]+", name.lower()):
            return variant, f"the directory is called {name}"
    return "instruct", "nothing says that it is a base or a guard model"


def max_position_embeddings(variant: str, geometry: Geometry) -> int:
    """Tokens of context, by what Meta published: only Scout scales its RoPE, and only Scout was tuned to 10 M tokens."""
    if variant == "base":
        return 262144
    if variant == "guard":
        return 8192
    return 10485760 if geometry.rope_scaling else 1048576
