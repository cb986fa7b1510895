"""Loads the tables and binds them to one model: which stored tensors there are, and where each logical tensor lies in them."""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from mappings.layout import Box, Layout, MappingError, Placement

# What quantizers put behind the name of a weight: compressed-tensors, bitsandbytes.
_QUANTIZED = r"(_[a-z_]+|\.(nested_)?(absmax|quant_map)|\.quant_state\.\w+)?"
TEXT_WHERE = ("layer", "moe", "dense")


@dataclass(frozen=True)
class ModelShape:
    """What a table needs to know of a model. `sizes` maps axis names to elements; an axis may still be missing (see
    `Binding.solve`). `units` says in how many indivisible units an axis comes (heads), for the ranks to share.
    """

    sizes: Mapping[str, int]
    units: Mapping[str, int]
    n_layers: int
    moe_layers: Collection[int]
    n_vision_layers: int | None  # None: no vision tower


@dataclass(frozen=True)
class Family:
    """A row of a table: logical tensors, and the patterns by which either layout stores them."""

    where: str
    axes: Mapping[str, tuple[str, ...]]
    shard: tuple[str, ...]
    meta: Mapping[str, Layout]
    transformers: Mapping[str, Layout]

    @staticmethod
    def parse(row: Mapping[str, Any]) -> Family:
        axes = {name: tuple(spec.split()) for name, spec in row["tensors"].items()}
        family = Family(
            row["where"],
            axes,
            tuple(row.get("shard", ())),
            {key: Layout.parse(pattern, axes) for key, pattern in row["meta"].items()},
            {key: Layout.parse(pattern, axes) for key, pattern in row["transformers"].items()},
        )
        for side in (family.meta, family.transformers):
            missing = set(axes) - {t for layout in side.values() for t in layout.tensors}
            if missing:
                raise MappingError(f"row {'/'.join(axes)}: no stored key for {', '.join(sorted(missing))}")
        return family


@dataclass(frozen=True)
class Drop:
    """Keys that a converted checkpoint does not need: shell-like patterns, the reason, and what they are evidence of."""

    patterns: tuple[re.Pattern[str], ...]
    why: str
    only_in: str | None = None
    when: str | None = None

    @staticmethod
    def parse(row: Mapping[str, Any]) -> Drop:
        patterns = tuple(re.compile(_numbered(key).replace(r"\*", ".*")) for key in row["keys"])
        return Drop(patterns, row["why"], row.get("only_in"), row.get("when"))

    def matches(self, key: str) -> bool:
        return any(pattern.fullmatch(key) for pattern in self.patterns)


@dataclass(frozen=True)
class LogicalTensor:
    """A tensor of the model whatever its file format: full size of each axis, and the axis that ranks split, if any."""

    name: str
    sizes: Mapping[str, int]
    shard: str | None


@dataclass(frozen=True)
class Stored:
    """A stored key: its layout, and the logical tensor that each name of the layout stands for here."""

    key: str
    layout: Layout
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Claims:
    """How a set of Meta keys covers a model: logical tensor -> the key that holds it, and dropped key -> its rule."""

    spelling: Mapping[str, str]
    dropped: Mapping[str, Drop]


@dataclass(frozen=True)
class Table:
    text: tuple[Family, ...]
    vision: tuple[Family, ...]
    drops: tuple[Drop, ...]
    prefix_with_vision: str

    @functools.cached_property
    def meta_names(self) -> re.Pattern[str]:
        """Every key that a model in Meta's layout may have, those that are dropped among them."""
        keys = [_numbered(key) for family in (*self.text, *self.vision) for key in family.meta]
        return re.compile(
            "|".join(
                [*keys, *(pattern.pattern for drop in self.drops if drop.when is None for pattern in drop.patterns)]
            )
        )

    @functools.cached_property
    def transformers_names(self) -> re.Pattern[str]:
        """Every key that a model in Transformers' layout may have: with a vision tower or without, linearized, quantized."""
        text = [_numbered(key) for family in self.text for key in family.transformers]
        vision = [_numbered(key) for family in self.vision for key in family.transformers]
        experts = [r"model\.layers\.\d+\.feed_forward\.experts\.\d+\.(gate|up|down)_proj\.weight"]
        inner = f"({re.escape(self.prefix_with_vision)})?({'|'.join(text + experts)})"
        return re.compile(f"({inner}|{'|'.join(vision)}){_QUANTIZED}")

    def bind(self, shape: ModelShape) -> Binding:
        """Instantiate every row for every layer that has it. Raises MappingError where two rows claim one key."""
        with_vision = shape.n_vision_layers is not None
        binding = Binding(shape, self.drops)
        for family, layer in _occurrences(self.text, shape):
            binding._add(family, layer, "", self.prefix_with_vision if with_vision else "")
        if with_vision:
            for family, layer in _occurrences(self.vision, shape):
                binding._add(family, layer, "vision.", "")
        return binding


def _numbered(key: str) -> str:
    """The regular expression of a key, `{layer}` any number."""
    return re.escape(key).replace(r"\{layer\}", r"\d+")


def _occurrences(families: Sequence[Family], shape: ModelShape) -> Iterator[tuple[Family, int | None]]:
    """Every (row, layer) in model order: a run of per-layer rows is walked layer by layer."""
    runs: list[list[Family]] = []
    for family in families:
        repeated = family.where in TEXT_WHERE or family.where == "vision_layer"
        if runs and repeated and runs[-1][0].where not in ("model", "vision"):
            runs[-1].append(family)
        else:
            runs.append([family])
    for run in runs:
        if run[0].where in ("model", "vision"):
            yield run[0], None
            continue
        n_layers = shape.n_vision_layers if run[0].where == "vision_layer" else shape.n_layers
        for layer in range(n_layers or 0):
            skipped = "dense" if layer in shape.moe_layers else "moe"
            for family in run:
                if family.where != skipped:
                    yield family, layer


@dataclass
class Binding:
    """A table bound to one model."""

    shape: ModelShape
    drops: tuple[Drop, ...]
    meta: dict[str, Stored] = field(default_factory=dict)
    transformers: dict[str, Stored] = field(default_factory=dict)  # in the order in which they are written
    _axes: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)  # name -> (axes, sharded)

    def _add(self, family: Family, layer: int | None, scope: str, prefix: str) -> None:
        at = scope + (f"layers.{layer}." if layer is not None else "")
        names = {tensor: at + tensor for tensor in family.axes}
        for tensor, name in names.items():
            self._axes[name] = (family.axes[tensor], family.shard)
        for keys, side, before in ((family.meta, self.meta, ""), (family.transformers, self.transformers, prefix)):
            for template, layout in keys.items():
                key = before + template.replace("{layer}", str(layer))
                if key in side:
                    raise MappingError(f"two rows of the table claim {key}")
                side[key] = Stored(key, layout, {tensor: names[tensor] for tensor in layout.tensors})

    @property
    def logical(self) -> Mapping[str, LogicalTensor]:
        """Every logical tensor by name. Raises MappingError if an axis has no size yet."""
        return {name: self.logical_tensor(name) for name in self._axes}

    def logical_tensor(self, name: str) -> LogicalTensor:
        """One of them."""
        axes, sharded = self._axes[name]
        missing = [axis for axis in axes if axis not in self.shape.sizes]
        if missing:
            raise MappingError(f"{name}: the size of axis {missing[0]} is not known")
        shard = next((axis for axis in axes if axis in sharded), None)
        return LogicalTensor(name, {axis: self.shape.sizes[axis] for axis in axes}, shard)

    def spellings(self, tensor: str) -> list[str]:
        """The Meta keys that may hold a logical tensor, the published one first."""
        return [key for key, stored in self.meta.items() if tensor in stored.tensors.values()]

    # -- coverage

    def claim(self, keys: Collection[str], *, text_only: bool = False) -> Claims:
        """Account for every key of a Meta checkpoint, or raise MappingError naming the first key that does not fit."""
        present = set(keys)
        spelling: dict[str, str] = {}
        for key, stored in self.meta.items():
            if key in present:
                for tensor in stored.tensors.values():
                    if tensor in spelling:
                        raise MappingError(f"{spelling[tensor]} and {key} both hold {tensor}: keep one of them")
                    spelling[tensor] = key
        dropped: dict[str, Drop] = {}
        unknown = []
        for key in sorted(present - self.meta.keys()):
            rule = next((d for d in self.drops if d.matches(key) and (d.when is None or text_only)), None)
            if rule:
                dropped[key] = rule
            else:
                unknown.append(key)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self.meta.keys(), n=1, cutoff=0.9)
            hint = f"; the nearest known key is {near[0]}" if near else ""
            raise MappingError(f"unknown key {unknown[0]}{_more(unknown)}{hint}")
        missing = [name for name in self._axes if name not in spelling]
        if missing:
            keys_of = " or ".join(self.spellings(missing[0]))
            raise MappingError(f"missing key {keys_of}{_more(missing)}")
        return Claims(spelling, dropped)

    def solve(self, axis: str, shapes: Mapping[str, Sequence[int]], ranks: int) -> int | None:
        """The full size of `axis`, read off a rank's tensor shapes (Meta keys); None where no shape shows it."""
        for key, shape in shapes.items():
            stored = self.meta.get(key)
            if stored is None or len(stored.layout.dims) != len(shape):
                continue
            for dim, size in zip(stored.layout.dims, shape, strict=True):
                first_axes, sharded = self._axes[next(iter(stored.tensors.values()))]
                if dim == (axis,):
                    return size * (ranks if axis in sharded else 1)
                is_joined = dim == stored.layout.tensors and stored.layout.concat is not None
                if is_joined and stored.layout.joined_axis(first_axes) == axis:
                    return size * (ranks if axis in sharded else 1) // len(dim)
        return None

    # -- places

    def _local(self, tensor: str, ranks: int) -> dict[str, int]:
        """Axis sizes of a rank's part. Raises MappingError if the ranks cannot share the sharded axis evenly."""
        logical = self.logical_tensor(tensor)
        sizes = dict(logical.sizes)
        if logical.shard and ranks > 1:
            units = self.shape.units.get(logical.shard, sizes[logical.shard])
            if units % ranks:
                what = "heads" if logical.shard in self.shape.units else "rows"
                raise MappingError(f"{tensor}: {units} {what} cannot be shared by {ranks} ranks")
            sizes[logical.shard] //= ranks
        return sizes

    def _place(self, stored: Stored, ranks: int, rank: int, strides: Sequence[int] | None) -> list[Placement]:
        sizes = {tensor: self._local(name, ranks) for tensor, name in stored.tensors.items()}
        placed = stored.layout.place(sizes, strides)
        placements = []
        for tensor, (offset, tensor_strides) in placed.items():
            shard = self.logical_tensor(stored.tensors[tensor]).shard
            start = tuple(rank * n if axis == shard else 0 for axis, n in sizes[tensor].items())
            box = Box(start, tuple(sizes[tensor].values()))
            placements.append(Placement(stored.tensors[tensor], box, offset, tensor_strides))
        return placements

    def meta_shape(self, key: str, ranks: int) -> tuple[int, ...]:
        """Shape of `key` in one rank's file of a checkpoint with `ranks` ranks."""
        stored = self.meta[key]
        return stored.layout.shape({t: self._local(name, ranks) for t, name in stored.tensors.items()})

    def meta_placements(self, key: str, ranks: int, rank: int, strides: Sequence[int] | None = None) -> list[Placement]:
        """What rank `rank` holds under `key`; `strides` in elements where the stored tensor is not contiguous."""
        return self._place(self.meta[key], ranks, rank, strides)

    def is_replicated(self, key: str) -> bool:
        """Whether every rank holds the same values under this Meta key."""
        return all(self.logical_tensor(name).shard is None for name in self.meta[key].tensors.values())

    def transformers_shape(self, key: str) -> tuple[int, ...]:
        stored = self.transformers[key]
        return stored.layout.shape({t: dict(self.logical_tensor(name).sizes) for t, name in stored.tensors.items()})

    def transformers_placements(self, key: str, strides: Sequence[int] | None = None) -> list[Placement]:
        return self._place(self.transformers[key], 1, 0, strides)


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


@functools.cache
def load_table() -> Table:
    """The tables of this package. Raises MappingError where a row contradicts itself."""

    def rows(name: str) -> dict[str, Any]:
        return tomllib.loads(resources.files("mappings").joinpath(name).read_text(encoding="utf-8"))

    text, vision = rows("llama4_text.toml"), rows("llama4_vision.toml")
    return Table(
        tuple(Family.parse(row) for row in text["family"]),
        tuple(Family.parse(row) for row in vision["family"]),
        tuple(Drop.parse(row) for row in rows("dropped.toml")["drop"]),
        text["prefix_with_vision"],
    )
