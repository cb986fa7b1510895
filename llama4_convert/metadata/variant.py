"""Which variant a checkpoint is: base, instruct or guard. params.json does not say, so it is inferred from evidence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from llama4.geometry import Geometry
from llama4_convert.checkpoints.manifest import NAME, Manifest

VARIANTS = ("base", "instruct", "guard")


def recorded_variant(manifest: Manifest) -> str | None:
    """The variant that a manifest records, of the output or of what it was exported from; None if it was not known."""
    found = manifest.options.get("variant") or manifest.source.get("variant")
    return found if found in VARIANTS else None


def infer_variant(geometry: Geometry, base_evidence: Sequence[str], source: Path) -> tuple[str, str]:
    """(variant, the evidence in words) of the checkpoint in `source`; `base_evidence` are its keys that only base models carry.

    Keys weigh more than shapes, shapes more than the directory's name.
    """
    if base_evidence:
        return "base", f"it carries {base_evidence[0]}, which only base models do"
    manifest = Manifest.read(source)
    if manifest and (recorded := recorded_variant(manifest)):
        return recorded, f"its {NAME} says so: it was exported from such a model"
    if geometry.is_dense:
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
