"""The origin of a tensor of a converted directory, by its manifest and the tables: keys and ranks, no bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from llama4_convert.checkpoints.manifest import Manifest
from llama4_convert.checkpoints.tensors import TORCH_NAMES
from llama4_convert.conversion.explanation import Origin
from llama4_convert.conversion.steps import Move, layout_of, row, steps
from mappings import Binding, Placement
from mappings.matrices import Matrix, matrices


def origin(name: str, dtype: str, manifest: Manifest, binding: Binding) -> Origin | None:
    """The origin of a tensor of the directory, which is stored as `dtype`; None for a name that the tables do not have.

    Raises MappingError where manifest and model do not fit together.
    """
    found = _targets(name, dtype not in TORCH_NAMES, binding)
    if found is None:
        return None
    key, targets, matrix = found
    recipe = manifest.options.get("recipe")
    layout, cast = manifest.source.get("layout"), manifest.options.get("dtype")
    made = partial(Origin, tool=manifest.tool, layout=layout, recipe=recipe["name"] if recipe else None, dtype=cast)
    if layout != "meta":
        return made(tensors=[key], files=[], row=None, op=[])
    ranks = manifest.source.get("ranks", 1)
    moves = list(_moves(targets, set(manifest.meta_keys), binding, ranks))
    keys = list(dict.fromkeys(move.key for move in moves))
    op = steps(binding, moves, None if matrix else layout_of(binding, key), ranks)
    if recipe and matrix:
        op = [*(step for step in op if step != "copy as it is"), f"store as recipe {recipe['name']} says"]
    if cast and not (recipe and matrix):
        op.append(f"cast to {cast}")
    return made(
        tensors=keys,
        files=[f"consolidated.{rank:02d}.pth" for rank in range(ranks)],
        row=row(binding, [target.tensor for target in targets], [*keys, key]),
        op=op,
    )


def _targets(name: str, encoded: bool, binding: Binding) -> tuple[str, list[Placement], Matrix | None] | None:
    """The key of Transformers, where its logical tensors lie in it, and the matrix, if it is one of several or encoded."""
    module = name.partition(".weight")[0]
    for key in binding.transformers:
        for matrix in matrices(binding, key):
            if matrix.module == module and (encoded or name != key):
                return key, [matrix.target], matrix
    if name not in binding.transformers:
        return None
    return name, binding.transformers_placements(name), None


def _moves(targets: list[Placement], recorded: set[str], binding: Binding, ranks: int) -> Iterator[Move]:
    for target in targets:
        key = next((key for key in binding.spellings(target.tensor) if key in recorded), None)
        if key is None:
            continue
        for rank in range(1 if binding.is_replicated(key) else ranks):
            for held in binding.meta_placements(key, ranks, rank):
                if held.tensor == target.tensor and held.box.common(target.box):
                    yield Move(key, held, target)
