"""The algebra of the tables: a stored tensor is a strided placement of logical tensors.

A logical tensor (the gate projections of a layer's experts, say) has named axes, `E D F`. Every file format stores it, or
the part of it that one rank holds, at some offset with some stride along each axis: transposing permutes the strides,
merging two axes into one leaves them alone, fusing gate and up shifts an offset. So each op of a table is a bijection by
construction, has its inverse for nothing, and converting is copying boxes from one set of strides to another:
Meta -> Transformers, back, and from any number of ranks to any other.

The pattern language of the tables, one token a stored dimension:

    Q D            the axes, in stored order (`E D` for a logical `D E` is a transpose)
    (E D) F        two axes merged into one dimension, the first outermost
    [q|k|v] D      logical tensors concatenated along this dimension, each by its one axis that the pattern does not name
    E D [gate|up]  the same along the last dimension: two expert projections fused
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

Strides = tuple[int, ...]


class MappingError(ValueError):
    """Names, shapes or rank counts that the tables cannot account for; the message names the key."""


@dataclass(frozen=True)
class Box:
    """A part of a logical tensor: `start` and `size` along each of its axes, in elements."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def common(self, other: Box) -> Box | None:
        """What both hold; None if that is nothing."""
        start = tuple(map(max, self.start, other.start))
        size = tuple(
            min(a + n, b + m) - first
            for first, a, n, b, m in zip(start, self.start, self.size, other.start, other.size, strict=True)
        )
        return None if any(n <= 0 for n in size) else Box(start, size)


@dataclass(frozen=True)
class Placement:
    """Where a box of the logical tensor `tensor` lies inside a stored tensor: element offset, and a stride an axis."""

    tensor: str
    box: Box
    offset: int
    strides: Strides

    def within(self, box: Box) -> Placement:
        """The part of it that is `box`, which must lie inside of its own."""
        steps = zip(box.start, self.box.start, self.strides, strict=True)
        return Placement(self.tensor, box, self.offset + sum((a - b) * s for a, b, s in steps), self.strides)


@dataclass(frozen=True)
class Copy:
    """One strided copy. `shape` and both stride tuples run over the same loop axes, outermost first, in elements.

    The target stride of the last axis is 1: a copy is a set of runs that are contiguous in the target.
    """

    shape: tuple[int, ...]
    source_offset: int
    source_strides: Strides
    target_offset: int
    target_strides: Strides


_TOKEN = re.compile(r"\(([^()\[\]]+)\)|\[([^()\[\]]+)\]|([A-Za-z]\w*)|(\S)")


@dataclass(frozen=True)
class Layout:
    """A parsed pattern. `dims` has one entry a stored dimension: the axes merged there, or the tensors concatenated."""

    pattern: str
    tensors: tuple[str, ...]
    dims: tuple[tuple[str, ...], ...]
    concat: int | None

    @staticmethod
    def parse(pattern: str, axes_of: Mapping[str, tuple[str, ...]]) -> Layout:
        """Parse `pattern`, or `name` alone, or `name: pattern`, over the logical tensors of one family."""
        name, _, body = pattern.rpartition(":")
        name, body = name.strip(), body.strip()
        if not name and body in axes_of:
            name, body = body, " ".join(axes_of[body])
        dims: list[tuple[str, ...]] = []
        concat: int | None = None
        tensors: tuple[str, ...] = (name,) if name else ()
        for merged, joined, axis, junk in _TOKEN.findall(body):
            if junk:
                raise MappingError(f"pattern {pattern!r}: unexpected {junk!r}")
            if joined:
                concat, tensors = len(dims), tuple(part.strip() for part in joined.split("|"))
                dims.append(tensors)
            else:
                dims.append(tuple(merged.split()) if merged else (axis,))
        if not tensors and len(axes_of) == 1:
            tensors = tuple(axes_of)
        if len(set(tensors)) != len(tensors):
            raise MappingError(f"pattern {pattern!r}: holds a tensor twice")
        if not tensors or any(tensor not in axes_of for tensor in tensors):
            raise MappingError(f"pattern {pattern!r}: names none of {', '.join(axes_of)}")
        layout = Layout(pattern, tensors, tuple(dims), concat)
        for tensor in tensors:
            named = [a for i, dim in enumerate(dims) if i != concat for a in dim]
            rest = [a for a in axes_of[tensor] if a not in named]
            if len(rest) != (concat is not None) or len(named) + len(rest) != len(axes_of[tensor]):
                raise MappingError(f"pattern {pattern!r}: does not use each axis of {tensor} ({axes_of[tensor]}) once")
        return layout

    def joined_axis(self, axes: tuple[str, ...]) -> str:
        """The axis by which a logical tensor with `axes` takes part in the concatenation."""
        named = {a for i, dim in enumerate(self.dims) if i != self.concat for a in dim}
        return next(a for a in axes if a not in named)

    def shape(self, sizes: Mapping[str, Mapping[str, int]]) -> tuple[int, ...]:
        """Shape of the stored tensor; `sizes` gives, for each logical tensor, the size of each axis (local to a rank)."""
        first = sizes[self.tensors[0]]
        return tuple(
            sum(sizes[t][self.joined_axis(tuple(sizes[t]))] for t in dim)
            if i == self.concat
            else prod(first[axis] for axis in dim)
            for i, dim in enumerate(self.dims)
        )

    def place(
        self, sizes: Mapping[str, Mapping[str, int]], strides: Sequence[int] | None = None
    ) -> dict[str, tuple[int, Strides]]:
        """Element offset and strides (in the order of the logical axes) of every logical tensor in the stored one.

        `strides` are the stored tensor's own, in elements; None means contiguous.
        """
        shape = self.shape(sizes)
        if strides is None:
            strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
        placed: dict[str, tuple[int, Strides]] = {}
        joined_before = 0
        for tensor in self.tensors:
            of_axis: dict[str, int] = {}
            offset = 0
            for i, dim in enumerate(self.dims):
                if i == self.concat:
                    axis = self.joined_axis(tuple(sizes[tensor]))
                    of_axis[axis] = strides[i]
                    offset = joined_before * strides[i]
                    joined_before += sizes[tensor][axis]
                else:
                    step = strides[i]
                    for axis in reversed(dim):
                        of_axis[axis] = step
                        step *= sizes[tensor][axis]
            placed[tensor] = offset, tuple(of_axis[axis] for axis in sizes[tensor])
        return placed


def copies(target: Placement, source: Placement) -> Copy | None:
    """The copy that brings what `source` and `target` have in common of one logical tensor; None if nothing."""
    if source.tensor != target.tensor:
        raise MappingError(f"{source.tensor} cannot be copied to {target.tensor}")
    box = source.box.common(target.box)
    if box is None:
        return None
    read, written = source.within(box), target.within(box)
    return _coalesced(box.size, read.offset, read.strides, written.offset, written.strides)


def _coalesced(
    shape: Sequence[int], source_offset: int, source: Sequence[int], target_offset: int, target: Sequence[int]
) -> Copy:
    """The same copy with the fewest loop axes: target strides descending, neighbours merged where both sides allow."""
    axes = [(t, n, s) for n, s, t in zip(shape, source, target, strict=True) if n > 1] or [(1, 1, 1)]
    axes.sort(key=lambda axis: -axis[0])
    merged: list[tuple[int, int, int]] = []
    for t, n, s in axes:
        if merged and merged[-1][0] == t * n and merged[-1][2] == s * n:
            merged[-1] = (t, merged[-1][1] * n, s)
        else:
            merged.append((t, n, s))
    if merged[-1][0] != 1:
        merged.append((1, 1, 1))
    return Copy(
        tuple(n for _, n, _ in merged),
        source_offset,
        tuple(s for _, _, s in merged),
        target_offset,
        tuple(t for t, _, _ in merged),
    )
