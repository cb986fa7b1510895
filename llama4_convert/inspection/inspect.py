"""`inspect`: what a checkpoint in either layout holds, from its index alone; with `stats` from every number in it."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4.weights import Bits, TensorReader
from llama4_convert.checkpoints import is_meta
from llama4_convert.checkpoints.manifest import Manifest
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.meta_quantized import stored_codes
from llama4_convert.checkpoints.tensor_kinds import Share, active_parameters, kind_of, listed
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.errors import BadInput
from llama4_convert.inspection.composition import quantization, spelling
from llama4_convert.planning.binding import bind_source
from llama4_convert.planning.plan import Plan
from llama4_convert.planning.planner import make_plan

if TYPE_CHECKING:
    from llama4_convert.checkpoints.readers import DirectoryReader

Progress = Callable[[int], None]
Start = Callable[[int, int], None]
_PIECE = 64 << 20  # bytes that are read at once, where a row of a tensor has not more


def inspect(
    path: str | os.PathLike[str],
    *,
    stats: bool = False,
    start: Start = lambda total, done: None,
    progress: Progress = lambda n: None,
) -> dict[str, Any]:
    """What is in `path`, as the JSON of the design says. Raises UsageError, BadInput or EnvironmentFailed.

    Geometry fields have the names of config.json. In Meta's layout a tensor's shape is one rank's, `parameters` counts
    what a conversion keeps, and `bytes` all ranks. `by_kind` shares both out (see `composition`), `active_parameters` are
    those that a token of text meets; `spelling`, `quantization` and `manifest` are None where there is no such thing.
    `nonfinite` lists the tensors with NaN or infinities, and whether quantization has replaced them; None where nobody has
    counted.

    `stats` reads everything and tells of each tensor `min`, `max`, `mean`, `std`, `zeros`, `nan`, `inf` and a `histogram`
    (see `tensor_statistics`), in Meta's layout over all ranks; a quantized matrix is told of as the weight that it stands for.
    `start(total, done)` and `progress(n)` count the bytes.
    """
    path = Path(path)
    readers: dict[str, list[TensorReader]]
    quantized: Collection[str] = ()
    if is_meta(path):
        checkpoint = MetaCheckpoint.open(path)
        plan = make_plan(checkpoint, allow_rank_mismatch=True)
        told = _meta(checkpoint, plan)
        readers = _meta_readers(checkpoint, plan)
    else:
        directory = TransformersCheckpoint.open(path)
        reader = _directory_reader(directory)
        told, quantized = _transformers(directory, reader), reader.quantized
        readers = {key: [reader] for key in reader.keys()}  # noqa: SIM118
    nonfinite: list[dict[str, Any]] = []
    told["manifest"] = None
    if manifest := Manifest.read(path):
        told["manifest"] = _told_by(manifest)
        nonfinite = [
            {"tensor": key, "nan": nan, "inf": inf, "replaced": key in quantized}
            for key, (nan, inf) in sorted(manifest.nonfinite().items())
        ]
        told["nonfinite"] = nonfinite
    if stats:
        told["stats"] = found = _stats(readers, start, progress)
        counted = [{"tensor": s["tensor"], "nan": s["nan"], "inf": s["inf"], "replaced": False} for s in found]
        told["nonfinite"] = [one for one in counted if one["nan"] or one["inf"]] + [
            o for o in nonfinite if o["replaced"]
        ]
    return told


def _meta_readers(checkpoint: MetaCheckpoint, plan: Plan) -> dict[str, list[TensorReader]]:
    """For each key the ranks that hold a part of it; of a replicated tensor, or a dropped one, the first."""
    from llama4_convert.checkpoints.readers import RankReader

    ranks: defaultdict[str, set[int]] = defaultdict(set)
    for tensor in plan.tensors:
        for piece in tensor.pieces:
            ranks[piece.key].add(piece.rank)
    readers: list[TensorReader] = [RankReader(index) for index in checkpoint.ranks]
    return {key: [readers[rank] for rank in sorted(ranks[key] or {0})] for key in checkpoint.ranks[0].tensors}


def _directory_reader(directory: TransformersCheckpoint) -> DirectoryReader:
    from llama4_convert.checkpoints.quantized import QuantizedReader
    from llama4_convert.checkpoints.readers import DirectoryReader

    return QuantizedReader(directory) if "quantization_config" in directory.config else DirectoryReader(directory)


def _stats(readers: dict[str, list[TensorReader]], start: Start, progress: Progress) -> list[dict[str, Any]]:
    from llama4_convert.inspection.statistics import DTYPES, statistics

    def pieces(key: str, several: Iterable[TensorReader]) -> Iterator[Bits]:
        for reader in several:
            shape = reader.shape(key)
            height, row = (shape[0], prod(shape[1:])) if shape else (1, 1)
            step = max(1, _PIECE // max(1, row * ITEM_SIZES[reader.dtype(key)]))
            for first in range(0, height, step):
                bits = reader.read(key, (first, first + step))
                yield bits
                progress(bits.nbytes)

    told = {key: several for key, several in readers.items() if several[0].dtype(key) in DTYPES}
    start(sum(prod(r.shape(key)) * ITEM_SIZES[r.dtype(key)] for key, several in told.items() for r in several), 0)
    return [
        {"tensor": key, **statistics(pieces(key, several), several[0].dtype(key)).to_json()}
        for key, several in told.items()
    ]


def _meta(checkpoint: MetaCheckpoint, plan: Plan) -> dict[str, Any]:
    g = plan.geometry
    first = checkpoint.ranks[0]
    # A key's kind is that of what it becomes.
    kinds = {piece.key: kind_of(tensor.name) for tensor in plan.tensors for piece in tensor.pieces}
    shares, dtypes = defaultdict[str, Share](Share), defaultdict[str, Share](Share)
    stored = {key: stored_codes(tensor) for key, tensor in first.tensors.items()}
    for key, tensor in stored.items():
        nbytes = sum(stored_codes(index.tensors[key]).numel * tensor.itemsize for index in checkpoint.ranks)
        shares[kinds.get(key, "dropped")].add(1, 0, nbytes)
        dtypes[tensor.dtype].add(1, 0, nbytes)
    for scales in checkpoint.scales:
        for key, tensor in scales.tensors.items():
            n = int(key not in stored)
            stored[key] = tensor
            shares["quantization_scales"].add(n, 0, tensor.numel * tensor.itemsize)
            dtypes[tensor.dtype].add(n, 0, tensor.numel * tensor.itemsize)
    for kind, parameters in plan.parameters_by_kind().items():
        shares[kind].parameters += parameters
    binding, _ = bind_source(checkpoint.geometry, checkpoint)
    return {
        "path": str(checkpoint.path),
        "layout": "meta",
        "ranks": len(checkpoint.ranks),
        "geometry": {
            "hidden_size": g.dim,
            "num_hidden_layers": g.n_layers,
            "num_attention_heads": g.n_heads,
            "num_key_value_heads": g.n_kv_heads,
            "vocab_size": g.vocab_size,
            "num_local_experts": g.n_experts,
            "num_experts_per_tok": g.top_k,
            "moe_layers": len(g.moe_layers),
            "intermediate_size": g.dense_dim if g.is_dense else g.expert_dim,
            "intermediate_size_mlp": g.dense_dim,
            "attention_chunk_size": g.chunk_size,
            "no_rope_layer_interval": g.nope_interval,
            "use_qk_norm": g.use_qk_norm,
            "vision_layers": g.vision.n_layers if g.vision else None,
        },
        "parameters": plan.parameters,
        "active_parameters": _active(shares, g.n_experts, g.top_k),
        "bytes": sum(share.bytes for share in shares.values()),
        "by_kind": listed(shares),
        "dtypes": _by_dtype(dtypes),
        "spelling": spelling(binding, plan.meta_keys, kinds),
        "quantization": _meta_quantization(checkpoint),
        "tensors": [{"name": k, "dtype": t.dtype, "shape": list(t.shape)} for k, t in stored.items()],
        "dropped": [{"name": name, "why": why} for name, why in plan.dropped.items()],
        "nonfinite": None,
    }


def _meta_quantization(checkpoint: MetaCheckpoint) -> dict[str, Any] | None:
    """As `composition.quantization` tells of a directory: each rank's matrices are quantized by themselves."""
    groups: dict[str, dict[str, Any]] = {}
    for key, record in checkpoint.quantized.items():
        group = groups.setdefault(
            record.kind,
            {
                "scheme": record.kind,
                "granularity": "row of each rank",
                "matrices": 0,
                "parameters": 0,
                "bytes": 0,
                "bits_per_weight": 0.0,
                "kinds": {},
            },
        )
        group["matrices"] += record.experts
        for index in checkpoint.ranks:
            tensor = index.tensors[key]
            codes = stored_codes(tensor)
            group["parameters"] += tensor.numel
            group["bytes"] += codes.numel * codes.itemsize
    if not groups:
        return None
    scales = sum(t.numel * t.itemsize for index in checkpoint.scales for t in index.tensors.values())
    for group in groups.values():
        group["kinds"] = {"routed_experts": group["matrices"]}
        group["bytes"] += scales // len(groups)
        group["bits_per_weight"] = 8 * group["bytes"] / max(1, group["parameters"])
    return {"method": "meta", "format": next(iter(groups)), "groups": list(groups.values()), "ignored": []}


def _transformers(checkpoint: TransformersCheckpoint, reader: DirectoryReader) -> dict[str, Any]:
    from llama4_convert.checkpoints.quantized import QuantizedReader

    config = checkpoint.config
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise BadInput("config.json: text_config is no object: convert again, or download it again")
    vision = config.get("vision_config")
    fields = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"),
        *("num_local_experts", "num_experts_per_tok", "moe_layers", "intermediate_size", "intermediate_size_mlp"),
        *("attention_chunk_size", "no_rope_layer_interval", "use_qk_norm"),
    )
    geometry = {name: text.get(name) for name in fields}
    if isinstance(geometry["moe_layers"], list):
        geometry["moe_layers"] = len(geometry["moe_layers"])
    geometry["vision_layers"] = vision.get("num_hidden_layers") if isinstance(vision, dict) else None
    tensors = checkpoint.tensors
    shares, dtypes = defaultdict[str, Share](Share), defaultdict[str, Share](Share)
    for key, tensor in tensors.items():
        shares[kind_of(key)].add(1, 0, tensor.nbytes)
        dtypes[tensor.dtype].add(1, 0, tensor.nbytes)
    for key in reader.keys():  # noqa: SIM118
        # Packed words are no parameters: what they stand for is.
        shares[kind_of(key)].parameters += prod(reader.shape(key))
    told = quantization(reader) if isinstance(reader, QuantizedReader) else None
    matrices: Counter[str] = Counter()
    for group in told["groups"] if told else ():
        matrices[group["scheme"]] += group["matrices"]
    return {
        "path": str(checkpoint.path),
        "layout": "transformers",
        "files": len(checkpoint.files),
        "geometry": geometry,
        "parameters": sum(share.parameters for share in shares.values()),
        "active_parameters": _active(shares, geometry["num_local_experts"], geometry["num_experts_per_tok"]),
        "bytes": sum(t.nbytes for t in tensors.values()),
        "by_kind": listed(shares),
        "dtypes": _by_dtype(dtypes),
        "spelling": None,
        "quantization": told,
        "quantized": dict(sorted(matrices.items())),
        "tensors": [{"name": k, "dtype": t.dtype, "shape": list(t.shape)} for k, t in tensors.items()],
        "nonfinite": None,
    }


def _active(shares: Mapping[str, Share], experts: object, top_k: object) -> int | None:
    return active_parameters({kind: share.parameters for kind, share in shares.items()}, experts, top_k)


def _by_dtype(shares: Mapping[str, Share]) -> dict[str, dict[str, int]]:
    largest = sorted(shares.items(), key=lambda item: (-item[1].bytes, item[0]))
    return {dtype: {"tensors": share.tensors, "bytes": share.bytes} for dtype, share in largest}


def _told_by(manifest: Manifest) -> dict[str, Any]:
    """What the manifest says of the output: {tool, source, options, recipe, files, complete, errors}; without its digests."""
    recipe = manifest.options.get("recipe")
    told = {
        "tool": manifest.tool,
        "source": dict(manifest.source),
        "options": {name: value for name, value in manifest.options.items() if name != "recipe"},
        "recipe": recipe,
        "files": len(manifest.files),
        "complete": manifest.marker in manifest.files,
        "errors": None,
    }
    if manifest.errors:
        from llama4_convert.checkpoints.manifest import describe_errors

        told["errors"] = describe_errors(manifest.errors)
    return told
