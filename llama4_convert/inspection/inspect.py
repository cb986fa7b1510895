"""`inspect`: what a checkpoint in either layout holds, from its index alone; with `stats` from every number in it."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from llama4.weights import Bits, TensorReader
from llama4_convert.checkpoints.families import FAMILIES, active_parameters, family_of
from llama4_convert.checkpoints.layouts import is_meta
from llama4_convert.checkpoints.manifest import DroppedKey, Manifest, NonFiniteTensor, describe_errors
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.meta_quantized import stored_codes
from llama4_convert.checkpoints.tensors import ITEM_SIZES, StoredTensor
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.errors import BadInput
from llama4_convert.inspection.composition import quantization, quantization_of_meta, spelling
from llama4_convert.inspection.results import (
    DtypeShare,
    Inspection,
    ManifestSummary,
    Share,
    Sizes,
    TensorEntry,
    TensorStatistics,
)
from llama4_convert.planning.binding import bind_meta, check_complete, model_shape
from llama4_convert.planning.plan import Plan
from llama4_convert.planning.planner import TransformersLayout, make_plan
from llama4_convert.progress import Progress, Start
from mappings import load_table

if TYPE_CHECKING:
    from llama4_convert.checkpoints.readers import DirectoryReader

_MAX_READ_BYTES = 64 << 20  # at once, where a row of a tensor has not more

Readers = Mapping[str, Sequence[TensorReader]]  # key -> whatever holds a part of the tensor


def inspect(
    path: str | os.PathLike[str],
    *,
    stats: bool = False,
    start: Start = lambda total, done: None,
    progress: Progress = lambda n: None,
) -> Inspection:
    """What is in `path`, in either layout. Without `stats` no tensor data is read.

    `stats` reads every number, and adds to the result what those of each tensor are like. `start(total, done)` and
    `progress(n)` count the bytes. Raises UsageError, BadInput or EnvironmentFailed.
    """
    path = Path(path)
    replaced: list[NonFiniteTensor] = []
    if is_meta(path):
        checkpoint = MetaCheckpoint.open(path)
        plan = make_plan(bind_meta(checkpoint, allow_rank_mismatch=True), TransformersLayout())
        result, readers, quantized = _of_meta(checkpoint, plan), _meta_readers(checkpoint, plan), frozenset[str]()
    else:
        directory = TransformersCheckpoint.open(path)
        check_complete(directory)
        reader = _directory_reader(directory)
        result, quantized = _of_transformers(directory, reader), frozenset(reader.quantized)
        readers = {key: [reader] for key in reader.keys()}  # noqa: SIM118
    if manifest := Manifest.read(path):
        result.manifest = _summary(manifest)
        result.nonfinite = [
            NonFiniteTensor(tensor=key, nan=nan, inf=inf, replaced=key in quantized)
            for key, (nan, inf) in sorted(manifest.nonfinite().items())
        ]
        replaced = [tensor for tensor in result.nonfinite if tensor.replaced]
    if stats:
        result.stats = _statistics(readers, start, progress)
        counted = [NonFiniteTensor(tensor=s.tensor, nan=s.nan, inf=s.inf, replaced=False) for s in result.stats]
        result.nonfinite = [tensor for tensor in counted if tensor.nan or tensor.inf] + replaced
    return result


def _meta_readers(checkpoint: MetaCheckpoint, plan: Plan) -> Readers:
    """For each key the ranks that hold a part of it; of a replicated tensor, or a dropped one, the first."""
    from llama4_convert.checkpoints.readers import RankReader

    ranks: defaultdict[str, set[int]] = defaultdict(set)
    for tensor in plan.tensors:
        for piece in tensor.pieces:
            ranks[piece.key].add(piece.file)
    readers = [RankReader(index) for index in checkpoint.ranks]
    return {key: [readers[rank] for rank in sorted(ranks[key] or {0})] for key in checkpoint.ranks[0].tensors}


def _directory_reader(directory: TransformersCheckpoint) -> DirectoryReader:
    from llama4_convert.checkpoints.quantized import QuantizedReader
    from llama4_convert.checkpoints.readers import DirectoryReader

    return QuantizedReader(directory) if "quantization_config" in directory.config else DirectoryReader(directory)


def _statistics(readers: Readers, start: Start, progress: Progress) -> list[TensorStatistics]:
    from llama4_convert.inspection.statistics import DTYPES, statistics

    def pieces(key: str, several: Iterable[TensorReader]) -> Iterator[Bits]:
        for reader in several:
            shape = reader.shape(key)
            height, row = (shape[0], prod(shape[1:])) if shape else (1, 1)
            step = max(1, _MAX_READ_BYTES // max(1, row * ITEM_SIZES[reader.dtype(key)]))
            for first in range(0, height, step):
                bits = reader.read(key, (first, first + step))
                yield bits
                progress(bits.nbytes)

    floats = {key: several for key, several in readers.items() if several[0].dtype(key) in DTYPES}
    start(sum(prod(r.shape(key)) * ITEM_SIZES[r.dtype(key)] for key, several in floats.items() for r in several), 0)
    return [statistics(pieces(key, several), several[0].dtype(key)).result(key) for key, several in floats.items()]


class _Shares:
    """Sums over tensors, by family and by dtype."""

    def __init__(self) -> None:
        self.families = {kind: Share(kind=kind) for kind in FAMILIES}
        self.dtypes: defaultdict[str, DtypeShare] = defaultdict(DtypeShare)

    def add(self, family: str, dtype: str, nbytes: int, tensors: int = 1) -> None:
        for share in (self.families[family], self.dtypes[dtype]):
            share.tensors += tensors
            share.bytes += nbytes

    @property
    def present(self) -> list[Share]:
        """The families of the model."""
        return [share for share in self.families.values() if share.tensors or share.parameters or share.bytes]

    def by_dtype(self) -> dict[str, DtypeShare]:
        """The dtype with most bytes first."""
        return dict(sorted(self.dtypes.items(), key=lambda item: (-item[1].bytes, item[0])))

    def active_parameters(self, experts: object, top_k: object) -> int | None:
        return active_parameters({share.kind: share.parameters for share in self.present}, experts, top_k)


def _of_meta(checkpoint: MetaCheckpoint, plan: Plan) -> Inspection:
    g, shares = plan.geometry, _Shares()
    families = {piece.key: family_of(tensor.name) for tensor in plan.tensors for piece in tensor.pieces}
    stored = {key: stored_codes(tensor) for key, tensor in checkpoint.ranks[0].tensors.items()}
    for key, tensor in stored.items():
        nbytes = sum(stored_codes(index.tensors[key]).nbytes for index in checkpoint.ranks)
        shares.add(families.get(key, "dropped"), tensor.dtype, nbytes)
    for scales in checkpoint.scales:
        for key, tensor in scales.tensors.items():
            shares.add("quantization_scales", tensor.dtype, tensor.nbytes, tensors=int(key not in stored))
            stored[key] = tensor
    for family, parameters in plan.parameters_by_kind().items():
        shares.families[family].parameters += parameters
    binding = load_table().bind(model_shape(plan.geometry))
    return Inspection(
        path=str(checkpoint.path),
        layout="meta",
        ranks=len(checkpoint.ranks),
        geometry=Sizes(
            hidden_size=g.dim,
            num_hidden_layers=g.n_layers,
            num_attention_heads=g.n_heads,
            num_key_value_heads=g.n_kv_heads,
            vocab_size=g.vocab_size,
            num_local_experts=g.n_experts,
            num_experts_per_tok=g.top_k,
            moe_layers=len(g.moe_layers),
            intermediate_size=g.dense_dim if g.is_dense else g.expert_dim,
            intermediate_size_mlp=g.dense_dim,
            attention_chunk_size=g.chunk_size,
            no_rope_layer_interval=g.nope_interval,
            use_qk_norm=g.use_qk_norm,
            vision_layers=g.vision.n_layers if g.vision else None,
        ),
        parameters=plan.parameters,
        active_parameters=shares.active_parameters(g.n_experts, g.top_k),
        bytes=sum(share.bytes for share in shares.present),
        by_kind=shares.present,
        dtypes=shares.by_dtype(),
        spelling=spelling(binding, plan.meta_keys, families),
        quantization=quantization_of_meta(checkpoint),
        tensors=_entries(stored),
        dropped=[DroppedKey(name=name, why=why) for name, why in plan.dropped.items()],
        warnings=list(checkpoint.notes),
    )


def _of_transformers(checkpoint: TransformersCheckpoint, reader: DirectoryReader) -> Inspection:
    from llama4_convert.checkpoints.quantized import QuantizedReader

    config = checkpoint.config
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise BadInput(f"{checkpoint.path / 'config.json'}: text_config is no object: take that of the same model")
    vision, moe_layers = config.get("vision_config"), text.get("moe_layers")
    sizes = {name: text.get(name) for name in Sizes.__struct_fields__}
    sizes["moe_layers"] = len(moe_layers) if isinstance(moe_layers, list) else moe_layers
    sizes["vision_layers"] = vision.get("num_hidden_layers") if isinstance(vision, dict) else None
    shares = _Shares()
    for key, tensor in checkpoint.tensors.items():
        shares.add(family_of(key), tensor.dtype, tensor.nbytes)
    for key in reader.keys():  # noqa: SIM118
        # Packed words are no parameters: what they stand for is.
        shares.families[family_of(key)].parameters += prod(reader.shape(key))
    found = quantization(reader) if isinstance(reader, QuantizedReader) else None
    matrices: Counter[str] = Counter()
    for group in found.groups if found else ():
        matrices[group.scheme] += group.matrices
    return Inspection(
        path=str(checkpoint.path),
        layout="transformers",
        files=len(checkpoint.files),
        geometry=Sizes(**sizes),
        parameters=sum(share.parameters for share in shares.present),
        active_parameters=shares.active_parameters(sizes["num_local_experts"], sizes["num_experts_per_tok"]),
        bytes=sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        by_kind=shares.present,
        dtypes=shares.by_dtype(),
        spelling=None,
        quantization=found,
        quantized=dict(sorted(matrices.items())),
        tensors=_entries(checkpoint.tensors),
        warnings=list(checkpoint.notes),
    )


def _entries(tensors: Mapping[str, StoredTensor]) -> list[TensorEntry]:
    return [TensorEntry(name=key, dtype=t.dtype, shape=list(t.shape)) for key, t in tensors.items()]


def _summary(manifest: Manifest) -> ManifestSummary:
    return ManifestSummary(
        tool=manifest.tool,
        source=manifest.source,
        options={name: value for name, value in manifest.options.items() if name != "recipe"},
        recipe=manifest.options.get("recipe"),
        files=len(manifest.files),
        complete=manifest.marker in manifest.files,
        errors=describe_errors(manifest.errors) if manifest.errors else None,
    )
