"""The tables bound to a source, and what its index must hold by them: sizes, shapes and dtypes, and replicas that agree."""

from __future__ import annotations

from collections.abc import Sequence

from llama4.config import Llama4Config
from llama4.geometry import Geometry
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.tensors import TORCH_NAMES
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from mappings import Binding, MappingError, ModelShape, load_table


def bind_directory(source: TransformersCheckpoint) -> tuple[Llama4Config, Binding]:
    """The table bound to a Transformers directory. Raises ConfigError, and MappingError for a tensor that is no float."""
    config = Llama4Config.from_json(source.config)
    for index in source.files:
        for key, stored in index.tensors.items():
            if stored.dtype not in TORCH_NAMES:
                raise MappingError(f"{key} is {stored.dtype}: take a directory in bf16, fp16 or fp32")
    return config, load_table().bind(shape_of_config(config))


def bind_source(geometry: Geometry, source: MetaCheckpoint) -> tuple[Binding, Geometry]:
    """The table bound to the source; sizes that params.json leaves open are read off the tensors."""
    ranks = len(source.ranks)
    shapes = source.shapes()
    table = load_table()

    def bind(g: Geometry) -> Binding:
        return table.bind(model_shape(g))

    if None in (geometry.vocab_size, geometry.n_experts, geometry.expert_dim, geometry.dense_dim):
        draft = bind(geometry)
        vocab, experts, width, dense = (draft.solve(axis, shapes, ranks) for axis in ("V", "E", "F", "G"))
        if (vocab or geometry.vocab_size) is None or (experts is None and geometry.n_experts is None):
            what = "tok_embeddings.weight" if vocab is None else "a router (feed_forward.router_DE)"
            raise MappingError(f"neither params.json nor a tensor tells the size: there is no {what}")
        geometry = geometry.completed(vocab or 0, experts or 0, width or 0, dense or 0)
        if geometry.n_experts and geometry.top_k > geometry.n_experts:
            raise MappingError(f"params.json has a top_k of {geometry.top_k}, the router {geometry.n_experts} experts")
    return bind(geometry), geometry


def shape_of_config(config: Llama4Config) -> ModelShape:
    """The same for a Transformers directory."""
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
    """The sizes that the tables' axes have in this geometry (the letters are explained in the tables)."""
    sizes = {"D": g.dim, "Q": g.n_heads * g.head_dim, "K": g.n_kv_heads * g.head_dim}
    open_sizes = {"V": g.vocab_size, "E": g.n_experts, "F": g.expert_dim, "G": g.dense_dim}
    sizes |= {axis: size for axis, size in open_sizes.items() if size is not None}
    units = {"Q": g.n_heads, "K": g.n_kv_heads}
    if v := g.vision:
        sizes |= {"P": v.patch_dim, "N": v.n_patches + 1, "C": v.dim, "H": v.dim, "M": v.mlp_dim}
        sizes |= {"S": v.shuffled_dim, "A": v.output_dim, "O": v.output_dim}
        units["H"] = v.n_heads
    return ModelShape(sizes, units, g.n_layers, frozenset(g.moe_layers), v.n_layers if v else None)


def check_tensors(binding: Binding, source: MetaCheckpoint) -> None:
    """Every rank's shapes and dtypes against the geometry."""
    ranks = len(source.ranks)
    for rank, index in enumerate(source.ranks):
        for key, tensor in index.tensors.items():
            if key not in binding.meta:
                continue
            expected = binding.meta_shape(key, ranks)
            if tensor.shape != expected:
                raise MappingError(_shape_message(binding, key, tensor.shape, expected, source, rank))
            if tensor.dtype not in TORCH_NAMES:
                raise MappingError(
                    f"{key} is {tensor.dtype}: only bf16, fp16 and fp32 checkpoints can be converted"
                    " (Meta's quantized originals need their scales)"
                )
        for key in index.others:
            if key in binding.meta:
                raise MappingError(f"{key} in {index.path.name} is no tensor")


def _shape_message(
    binding: Binding, key: str, found: Sequence[int], expected: Sequence[int], source: MetaCheckpoint, rank: int
) -> str:
    ranks, where = len(source.ranks), source.ranks[rank].path.name
    text = f"{key} in {where} has shape {list(found)}, but params.json with {ranks} rank(s) makes it {list(expected)}"
    for other in (n for n in range(1, 129) if n != ranks and not binding.is_replicated(key)):
        try:
            fits = all(binding.meta_shape(k, other) == s for k, s in source.shapes().items() if k in binding.meta)
        except MappingError:
            continue
        if fits:
            missing = (
                f"consolidated.{ranks:02d}.pth and later are missing" if other > ranks else "some files are not its"
            )
            return f"{text}: these are files of a checkpoint with {other} ranks, {missing}"
    return text


def check_replicas(binding: Binding, source: MetaCheckpoint, allow: bool) -> tuple[list[str], list[tuple[str, int]]]:
    """Replicated tensors must be equal on all ranks; where each fills a record, the zip CRCs tell without reading.

    Returns warnings, and the (key, rank) that remain to be compared by value with rank 0's.
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
    return (
        f"the ranks disagree: {key} differs between {first} and {other}: download them again"
        " (--allow-rank-mismatch takes the first)"
    )
