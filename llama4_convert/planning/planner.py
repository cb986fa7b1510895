"""Makes the plan of a Transformers directory, from the source's index alone: no byte of tensor data is read."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from llama4.config_fields import ConfigError
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.errors import BadInput
from llama4_convert.planning.adapter import Adapter
from llama4_convert.planning.binding import bind_directory, bind_source, check_replicas, check_tensors
from llama4_convert.planning.encoded import linear_layers, output_tensors
from llama4_convert.planning.locations import of_meta, of_transformers
from llama4_convert.planning.plan import Plan, gathered
from llama4_convert.planning.record_order import streamed_records, unread_records
from llama4_convert.planning.shards import files_of, groups_of
from mappings import MappingError
from quant.recipe import Recipe


def make_plan(
    source: MetaCheckpoint,
    *,
    text_only: bool = False,
    dtype: str | None = None,
    shard_size: float = inf,
    allow_rank_mismatch: bool = False,
    recipe: Recipe | None = None,
    device: str = "cpu",
    adapter: Adapter | None = None,
) -> Plan:
    """Plan the conversion of `source` to Transformers' layout; with a `recipe`, quantized as that says, on `device`.

    `dtype` ("BF16", "F16", "F32") casts every tensor, None keeps each as it is. `shard_size` bounds an output file in bytes;
    only a tensor, or tensors that share a source record, larger than that exceed it. Raises BadInput where names, shapes or
    ranks do not fit together, naming the key.
    """
    geometry = replace(source.geometry, vision=None) if text_only else source.geometry
    try:
        binding, geometry = bind_source(geometry, source)
        claims = binding.claim(source.keys, text_only=text_only)
        check_tensors(binding, source)
        warnings, compare = check_replicas(binding, source, allow_rank_mismatch)
        changes = adapter.changes(binding) if adapter else {}
        tensors = output_tensors(binding, of_meta(binding, source, claims.spelling), changes, dtype, recipe, device)
    except MappingError as error:
        raise BadInput(f"{source.path.name}: {error}") from error
    streamed = streamed_records([tensor.pieces for tensor in tensors], source)
    skipped = {key for key, rule in claims.dropped.items() if rule.when == "text_only"}
    files = files_of(groups_of(tensors, streamed), shard_size)
    streamed = streamed_records([gathered(read).pieces for file in files for read in file.reads()], source)
    return Plan(
        geometry=geometry,
        text_only=text_only,
        files=files,
        meta_keys=tuple(sorted(set(claims.spelling.values()))),
        dropped={key: rule.why for key, rule in claims.dropped.items()} | source.unused_scales,
        base_evidence=tuple(key for key, rule in claims.dropped.items() if rule.only_in == "base"),
        streamed=streamed,
        unread=unread_records(source, streamed, skipped),
        compare=tuple(compare),
        warnings=tuple(warnings),
        linear_layers=linear_layers(binding, recipe),
    )


def plan_directory(
    source: TransformersCheckpoint,
    recipe: Recipe | None,
    shard_size: float = inf,
    device: str = "cpu",
    adapter: Adapter | None = None,
) -> Plan:
    """Plan to write a Transformers directory anew, experts fused or linearized: with an adapter merged, quantized, or both.

    Raises BadInput where names and shapes do not fit config.json, naming the key.
    """
    try:
        config, binding = bind_directory(source)
        changes = adapter.changes(binding) if adapter else {}
        tensors = output_tensors(binding, of_transformers(binding, source), changes, None, recipe, device)
    except (MappingError, ConfigError) as error:
        raise BadInput(f"{source.path}: {error}") from error
    return Plan(
        geometry=config.to_geometry(),
        text_only=config.vision_config is None,
        files=files_of([[tensor] for tensor in tensors], shard_size),
        meta_keys=(),
        dropped={},
        base_evidence=(),
        streamed=frozenset(),
        unread=(),
        compare=(),
        warnings=(),
        linear_layers=linear_layers(binding, recipe),
    )
