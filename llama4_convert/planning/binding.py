"""A source bound to the tables: where it stores each logical tensor, and everything that its index must hold by the tables.

Sizes, shapes, dtypes and replicas are checked here, from the index alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from llama4.config import Llama4Config
from llama4.config_fields import ConfigError
from llama4.geometry import Geometry
from llama4_convert.checkpoints.manifest import INDEX, MAX_RANKS
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.tensors import TORCH_NAMES, Record, StoredTensor, TensorFile
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.errors import BadInput
from mappings import Binding, MappingError, ModelShape, Placement, load_table
from mappings.matrices import linearized

VISION_PREFIX = "vision."  # of the vision tower's logical tensors


@dataclass(frozen=True)
class StoredPart:
    """A stored tensor that holds a logical tensor, or a box of one, in the strides of `placement`.

    `file` numbers the source's files from 0: rank files, or safetensors files.
    """

    file: int
    key: str
    stored: StoredTensor
    placement: Placement


Locations = Mapping[str, Sequence[StoredPart]]  # by logical tensor


@dataclass(frozen=True)
class BoundSource:
    """A checkpoint, in either layout, as the planner sees it."""

    name: str  # the checkpoint in error messages
    binding: Binding
    geometry: Geometry
    files: Sequence[TensorFile]  # the files that a run opens; `StoredPart.file` numbers them
    locations: Locations
    records: Sequence[tuple[int, Record]] = ()  # (file number, record) whose CRC a run must check: safetensors has none
    compare: Sequence[tuple[str, int]] = ()  # (key, rank): replicas to compare with rank 0's by value
    meta_keys: Sequence[str] = ()  # the Meta keys that store the logical tensors
    dropped: Mapping[str, str] = field(default_factory=dict)  # key -> why
    base_evidence: Sequence[str] = ()  # keys that only base models carry
    warnings: Sequence[str] = ()


def bind_meta(source: MetaCheckpoint, *, text_only: bool = False, allow_rank_mismatch: bool = False) -> BoundSource:
    """Meta's directory bound to the tables; sizes that params.json leaves open are read off the tensors.

    Raises BadInput where names, shapes or ranks do not fit together, naming the key.
    """
    try:
        check_ranks(source)
        stated = replace(source.geometry, vision=None) if text_only else source.geometry
        binding, geometry = _bind_geometry(stated, source, len(source.ranks))
        claims = binding.claim(source.keys, text_only=text_only)
        _check_tensors(binding, source)
        warnings, compare = _check_replicas(binding, source, allow_rank_mismatch)
        locations = _locate_in_meta(binding, source, claims.spelling)
    except MappingError as error:
        raise BadInput(f"{source.path.name}: {error}") from error
    left_out = [key for key, rule in claims.dropped.items() if rule.when == "text_only"]
    skipped = {
        (rank, index.tensors[key].record.name)
        for rank, index in enumerate(source.ranks)
        for key in left_out
        if key in index.tensors
    }
    return BoundSource(
        name=source.path.name,
        binding=binding,
        geometry=geometry,
        files=source.archives,
        locations=locations,
        records=[(number, record) for number, record in source.records() if (number, record.name) not in skipped],
        compare=compare,
        meta_keys=sorted(set(claims.spelling.values())),
        dropped={key: rule.why for key, rule in claims.dropped.items()} | source.unused_scales,
        base_evidence=[key for key, rule in claims.dropped.items() if rule.only_in == "base"],
        warnings=[*source.notes, *warnings],
    )


def bind_transformers(source: TransformersCheckpoint) -> BoundSource:
    """A Transformers directory bound to the tables, experts fused or linear layers of their own.

    Raises BadInput where names, shapes or dtypes do not fit config.json, naming the key.
    """
    try:
        config = Llama4Config.from_json(source.config)
        for index in source.files:
            for key, stored in index.tensors.items():
                if stored.dtype not in TORCH_NAMES:
                    raise MappingError(f"{key} is {stored.dtype}: take a directory in bf16, fp16 or fp32")
        binding = load_table().bind(shape_of_config(config))
        locations = _locate_in_transformers(binding, source)
    except (MappingError, ConfigError) as error:
        raise BadInput(f"{source.path}: {error}") from error
    geometry = config.to_geometry()
    return BoundSource(str(source.path), binding, geometry, source.files, locations, warnings=source.notes)


def check_complete(source: TransformersCheckpoint) -> None:
    """Raises BadInput for shards without an index that are not exactly the tensors of config.json."""
    if source.has_index:
        return
    if "quantization_config" in source.config:
        raise BadInput(
            f"{source.path} is quantized and has no {INDEX}: fetch it, nothing else says which tensors there are"
        )
    bind_transformers(source)


def check_ranks(source: MetaCheckpoint) -> None:
    """Raises BadInput, naming the files, if rank files are missing at the end, or lie there that are another checkpoint's."""
    found, stated = len(source.ranks), _stated_ranks(source)
    if stated is None or stated == found:
        return
    names = [f"consolidated.{rank:02d}.pth" for rank in range(min(found, stated), max(found, stated))]
    if found < stated:
        raise MissingRanks(source.path, names, stated)
    raise BadInput(
        f"{source.path}: {names[0]} is none of its files: the tensors are cut for {stated} ranks; move it away"
    )


class MissingRanks(BadInput):
    """Rank files that are missing at the end; `names` are theirs."""

    def __init__(self, path: Path, names: list[str], ranks: int) -> None:
        which = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        super().__init__(f"{path} lacks {which}: its tensors are cut for {ranks} ranks; fetch what is missing")
        self.names = names


def with_vision_of(base: BoundSource, text: BoundSource, config: Llama4Config) -> BoundSource:
    """The text model of one source with the vision tower of another; `config` describes the whole.

    The base's files come first, since replicas are compared with those of its rank 0.
    """
    vision = {name: parts for name, parts in base.locations.items() if name.startswith(VISION_PREFIX)}
    stored = [part for parts in vision.values() for part in parts]
    keys = {part.key for part in stored}
    checked = {(part.file, part.stored.record.name): (part.file, part.stored.record) for part in stored}
    moved: dict[str, Sequence[StoredPart]] = {
        name: [replace(part, file=part.file + len(base.files)) for part in parts]
        for name, parts in text.locations.items()
    }
    return BoundSource(
        name=text.name,
        binding=load_table().bind(shape_of_config(config)),
        geometry=config.to_geometry(),
        files=(*base.files, *text.files),
        locations={**vision, **moved},
        records=[checked[key] for key in sorted(checked) if checked[key][1].crc is not None],
        compare=[(key, rank) for key, rank in base.compare if key in keys],
        warnings=[*base.warnings, *text.warnings],
    )


def _locate_in_meta(binding: Binding, source: MetaCheckpoint, spelling: Mapping[str, str]) -> Locations:
    """Where rank files store each logical tensor. `spelling`: logical tensor -> the Meta key that stores it.

    Replicated tensors are located in the first rank.
    """
    ranks = len(source.ranks)
    found: dict[str, list[StoredPart]] = defaultdict(list)
    for key in dict.fromkeys(spelling.values()):
        for rank in range(1 if binding.is_replicated(key) else ranks):
            stored = source.tensor(rank, key)
            for placement in binding.meta_placements(key, ranks, rank, stored.strides):
                found[placement.tensor].append(StoredPart(rank, key, stored, placement))
    return found


def _locate_in_transformers(binding: Binding, source: TransformersCheckpoint) -> Locations:
    """Where safetensors files store each logical tensor. Experts may be fused, or linear layers of their own.

    Raises MappingError for a key that is unknown, missing or of another shape than config.json makes it.
    """
    single = {m.key: m for key in binding.transformers for m in linearized(binding, key)}
    found: dict[str, list[StoredPart]] = defaultdict(list)
    for file, index in enumerate(source.files):
        for key, stored in index.tensors.items():
            expected: tuple[int, ...]
            if key in single:
                matrix = single[key]
                expected, placements = (matrix.n, matrix.k), [matrix.target]
            elif key in binding.transformers:
                expected, placements = binding.transformers_shape(key), binding.transformers_placements(key)
            else:
                raise MappingError(f"unknown key {key}: no Llama 4 of this config.json has it")
            if stored.shape != expected:
                raise MappingError(f"{key} has shape {list(stored.shape)}, but config.json makes it {list(expected)}")
            for placement in placements:
                found[placement.tensor].append(StoredPart(file, key, stored, placement))
    for name, logical in binding.logical.items():
        stored_elements = sum(prod(part.placement.box.size) for part in found[name])
        elements = prod(logical.sizes.values())
        if stored_elements != elements:
            keys = [key for key, stored in binding.transformers.items() if name in stored.tensors.values()]
            problem = "missing" if stored_elements < elements else "two keys hold"
            raise MappingError(f"{problem} {keys[0]}, or a part of it")
    return found


def _stated_ranks(source: MetaCheckpoint) -> int | None:
    """For how many ranks the tensors of rank 0 are cut; None if they fit params.json with no number of ranks."""
    geometry, shapes = source.geometry, source.shapes()
    widths = {shape[1] for key, shape in shapes.items() if key.endswith(".attention.wo.weight") and len(shape) == 2}
    ranks, rest = divmod(geometry.n_heads * geometry.head_dim, max(1, *widths, 1)) if len(widths) == 1 else (0, 0)
    if rest or not 1 <= ranks <= MAX_RANKS:
        return None
    try:
        binding, _ = _bind_geometry(geometry, source, ranks)
        fits = all(binding.meta_shape(key, ranks) == shape for key, shape in shapes.items() if key in binding.meta)
    except MappingError:
        return None
    return ranks if fits else None


def _bind_geometry(geometry: Geometry, source: MetaCheckpoint, ranks: int) -> tuple[Binding, Geometry]:
    """The tables bound to a geometry, and the geometry with the sizes that only the tensors, cut for `ranks`, tell."""
    if None in (geometry.vocab_size, geometry.n_experts, geometry.expert_dim, geometry.dense_dim):
        draft, shapes = load_table().bind(model_shape(geometry)), source.shapes()
        vocab, experts, width, dense = (draft.solve(axis, shapes, ranks) for axis in ("V", "E", "F", "G"))
        if (vocab or geometry.vocab_size) is None or (experts is None and geometry.n_experts is None):
            what = "tok_embeddings.weight" if vocab is None else "a router (feed_forward.router_DE)"
            raise MappingError(f"neither params.json nor a tensor tells the size: there is no {what}")
        geometry = geometry.completed(vocab or 0, experts or 0, width or 0, dense or 0)
        if geometry.n_experts and geometry.top_k > geometry.n_experts:
            raise MappingError(f"params.json has a top_k of {geometry.top_k}, the router {geometry.n_experts} experts")
    return load_table().bind(model_shape(geometry)), geometry


def shape_of_config(config: Llama4Config) -> ModelShape:
    """The sizes of the tables' axes by config.json (the letters are explained in the tables)."""
    c, v = config.text_config, config.vision_config
    sizes = {"D": c.hidden_size, "Q": c.num_attention_heads * c.head_dim, "K": c.num_key_value_heads * c.head_dim}
    sizes |= {"V": c.vocab_size, "E": c.num_local_experts, "F": c.intermediate_size, "G": c.intermediate_size_mlp}
    units = {"Q": c.num_attention_heads, "K": c.num_key_value_heads}
    if v:
        sizes |= {"P": 3 * v.patch_size**2, "N": v.patches_a_side**2 + 1, "C": v.hidden_size, "H": v.hidden_size}
        sizes |= {"M": v.intermediate_size, "S": v.shuffled_size, "A": v.vision_output_dim, "O": v.vision_output_dim}
        units["H"] = v.num_attention_heads
    layers = v.num_hidden_layers if v else None
    return ModelShape(sizes, units, c.num_hidden_layers, frozenset(c.moe_layers), layers)


def model_shape(g: Geometry) -> ModelShape:
    """The sizes of the tables' axes by params.json."""
    sizes = {"D": g.dim, "Q": g.n_heads * g.head_dim, "K": g.n_kv_heads * g.head_dim}
    open_sizes = {"V": g.vocab_size, "E": g.n_experts, "F": g.expert_dim, "G": g.dense_dim}
    sizes |= {axis: size for axis, size in open_sizes.items() if size is not None}
    units = {"Q": g.n_heads, "K": g.n_kv_heads}
    if v := g.vision:
        sizes |= {"P": v.patch_dim, "N": v.n_patches + 1, "C": v.dim, "H": v.dim, "M": v.mlp_dim}
        sizes |= {"S": v.shuffled_dim, "A": v.output_dim, "O": v.output_dim}
        units["H"] = v.n_heads
    return ModelShape(sizes, units, g.n_layers, frozenset(g.moe_layers), v.n_layers if v else None)


def _check_tensors(binding: Binding, source: MetaCheckpoint) -> None:
    """Compare every rank's shapes and dtypes with the geometry. Raises MappingError."""
    ranks = len(source.ranks)
    for index in source.ranks:
        for key, tensor in index.tensors.items():
            if key not in binding.meta:
                continue
            expected = binding.meta_shape(key, ranks)
            if tensor.shape != expected:
                raise MappingError(
                    f"{key} in {index.path.name} has shape {list(tensor.shape)}, but params.json with {ranks} rank(s) makes it"
                    f" {list(expected)}"
                )
            if tensor.dtype not in TORCH_NAMES:
                raise MappingError(
                    f"{key} is {tensor.dtype}: only bf16, fp16 and fp32 checkpoints can be converted"
                    " (Meta's quantized originals need their scales)"
                )
        for key in index.others:
            if key in binding.meta:
                raise MappingError(f"{key} in {index.path.name} is no tensor")


def _check_replicas(binding: Binding, source: MetaCheckpoint, allow: bool) -> tuple[list[str], list[tuple[str, int]]]:
    """Compare the replicas of tensors that all ranks hold, by the CRCs of their records where each fills one.

    Returns warnings, and the (key, rank) that a run must compare by value with rank 0's. Raises MappingError.
    """
    warnings, remaining = [], []
    for key, first in source.ranks[0].tensors.items():
        if key not in binding.meta or not binding.is_replicated(key):
            continue
        for rank, index in enumerate(source.ranks[1:], 1):
            other = index.tensors[key]
            if not (first.is_whole_record and other.is_whole_record):
                remaining.append((key, rank))
            elif first.record.crc != other.record.crc:
                if not allow:
                    raise MappingError(mismatch(key, source.ranks[0].path.name, index.path.name))
                warnings.append(
                    f"{key} differs between {source.ranks[0].path.name} and {index.path.name}: the first is taken"
                )
                break
    return warnings, [] if allow else remaining


def mismatch(key: str, first: str, other: str) -> str:
    """The message for a replica that differs; `first` and `other` are file names."""
    return (
        f"the ranks disagree: {key} differs between {first} and {other}: fetch them again"
        " (--allow-rank-mismatch takes the first)"
    )
