"""The way of a tensor from one layout to the other in words: the row of the tables, and the steps.

The words are made of the same patterns and placements as the copies, so that they cannot contradict them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llama4_convert.conversion.explanation import Row
from mappings import Binding, Layout, Placement
from quant.recipe import Scheme

_SCHEME_FIELDS = {
    "int4": ("group_size", "method"),
    "fp8": ("granularity", "method"),
    "nf4": ("block_size", "double_quant"),
}


class Move(NamedTuple):
    """What `held`, stored under the source's `key`, and `target` have in common, and is copied."""

    key: str
    held: Placement
    target: Placement

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """From where to where along each axis of the logical tensor."""
        common = self.held.box.common(self.target.box)
        assert common is not None
        return [(a, a + n) for a, n in zip(common.start, common.size, strict=True)]


def layout_of(binding: Binding, key: str) -> Layout | None:
    """The pattern of a stored key; None if no row names it (an expert that is a linear layer of its own)."""
    stored = binding.meta.get(key) or binding.transformers.get(key)
    return stored.layout if stored else None


def row(binding: Binding, tensors: Sequence[str], keys: Iterable[str]) -> Row:
    """The part of the table that is about these logical tensors and stored keys."""
    logical = {name: binding.logical_tensor(name) for name in tensors}
    keys = list(keys)
    return Row(
        table=f"mappings/llama4_{'vision' if tensors[0].startswith('vision.') else 'text'}.toml",
        tensors={name: " ".join(tensor.sizes) for name, tensor in logical.items()},
        sharded=sorted({tensor.shard for tensor in logical.values() if tensor.shard}),
        meta={key: binding.meta[key].layout.pattern for key in keys if key in binding.meta},
        transformers={key: binding.transformers[key].layout.pattern for key in keys if key in binding.transformers},
    )


def steps(binding: Binding, moves: Sequence[Move], target: Layout | None, ranks: int) -> list[str]:
    """The steps that make a tensor with the pattern `target` (None: one logical tensor, in plain order).

    `ranks`: rank count of a source in Meta's layout, 1 for a Transformers directory.
    """
    done: dict[str, None] = {}  # each step once, in order
    keys = list(dict.fromkeys(move.key for move in moves))
    for key in keys:
        done.update(dict.fromkeys(_taking_apart(binding, key, moves, target)))
    groups: dict[str, list[Move]] = defaultdict(list)
    for move in moves:
        groups[move.target.tensor].append(move)
    changed = False
    for tensor, several in groups.items():
        axes = list(binding.logical_tensor(tensor).sizes)
        if ranks > 1 and binding.logical_tensor(tensor).shard is None:
            done["take the first rank's: all ranks have the same"] = None
        found = [*_joined(axes, several, ranks), *_cut(axes, several)]
        changed = changed or bool(found)
        done.update(dict.fromkeys([*found, *_transposed(axes, several[0])]))
    if target is not None and (changed or [layout_of(binding, key) for key in keys] != [target]):
        done.update(dict.fromkeys(_putting_together(target, moves)))
    return list(done) or ["copy as it is"]


def _taking_apart(binding: Binding, key: str, moves: Sequence[Move], target: Layout | None) -> Iterable[str]:
    layout = layout_of(binding, key)
    if layout is None or (target is not None and layout.dims == target.dims):
        return
    stored = binding.meta.get(key) or binding.transformers[key]
    wanted = {move.target.tensor for move in moves if move.key == key}
    for i, dim in enumerate(layout.dims):
        if i == layout.concat:
            taken = [local for local, name in stored.tensors.items() if name in wanted]
            yield f"take {' and '.join(taken)} out of [{'|'.join(dim)}] (dimension {i})"
        elif len(dim) > 1:
            yield f"read dimension {i} as {' x '.join(dim)}"


def _putting_together(target: Layout, moves: Sequence[Move]) -> Iterable[str]:
    made = {move.target.tensor.rpartition(".")[2] for move in moves}
    for i, dim in enumerate(target.dims):
        if i == target.concat:
            names = [name for name in dim if name in made]
            whole = len(names) == len(dim)
            yield f"{'concatenate' if whole else 'put'} {', '.join(names)} " + (
                f"along dimension {i}" if whole else f"into [{'|'.join(dim)}] (dimension {i})"
            )
        elif len(dim) > 1:
            yield f"merge {' and '.join(dim)} into dimension {i}"


def _joined(axes: Sequence[str], moves: Sequence[Move], ranks: int) -> Iterable[str]:
    for i, axis in enumerate(axes):
        starts = {move.held.box.start[i] for move in moves}
        if len(starts) > 1:
            yield f"join {len(starts)} {'ranks' if ranks > 1 else 'tensors'} along {axis}"


def _cut(axes: Sequence[str], moves: Sequence[Move]) -> Iterable[str]:
    """Along which axes only a part is taken of what the source's tensors hold together."""
    for i, axis in enumerate(axes):
        held = [(m.held.box.start[i], m.held.box.start[i] + m.held.box.size[i]) for m in moves]
        wanted = [m.ranges[i] for m in moves]
        first, last = min(a for a, _ in wanted), max(b for _, b in wanted)
        if first > min(a for a, _ in held) or last < max(b for _, b in held):
            yield f"cut out {axis} {first}:{last}"


def _transposed(axes: Sequence[str], move: Move) -> Iterable[str]:
    long = [i for i, (a, b) in enumerate(move.ranges) if b - a > 1]

    def order(placement: Placement) -> str:
        return " ".join(axes[i] for i in sorted(long, key=lambda i: -placement.strides[i]))

    if order(move.held) != order(move.target):
        yield f"transpose {order(move.held)} to {order(move.target)}"


def scheme_words(scheme: Scheme) -> str:
    """ "int4 (group_size 128, method search)"."""
    fields = ", ".join(f"{name} {str(getattr(scheme, name)).lower()}" for name in _SCHEME_FIELDS[scheme.kind])
    return f"{scheme.kind} ({fields})"
