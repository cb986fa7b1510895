"""A PEFT LoRA adapter: what its directory holds, and which tensor of the model each of its keys changes.

Keys are PEFT's: a module's path, then `lora_A.weight` and the like. A module that is wrapped more than once (the fused experts,
one wrapper for each of their two parameters) has `base_layer` in its path. Any other key is a tensor that was trained whole.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import msgspec

from llama4.weights import TensorReader
from llama4_convert.checkpoints.digests import digests
from llama4_convert.checkpoints.layouts import directory_names, is_checkpoint
from llama4_convert.checkpoints.numbers import count_nonfinite, widened
from llama4_convert.checkpoints.pth import PthIndex, check_records
from llama4_convert.checkpoints.readers import DirectoryReader, RankReader
from llama4_convert.checkpoints.transformers import SafetensorsIndex, TransformersCheckpoint
from llama4_convert.checkpoints.wrapped_names import unwrapped
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.planning.adapter_config import AdapterConfig
from llama4_convert.planning.changes import Change, Changed, Changes, LowRankUpdate, TensorReplacement, row_blocks
from llama4_convert.planning.plan import Plan
from mappings import Binding, Box, Placement, load_table
from mappings.matrices import Matrix, linearized

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_TEXT_PREFIX = "language_model."
_FACTOR = re.compile(r"(.+)\.lora_(?:(A|B)\.(weight|bias)|embedding_(A|B))")
# Behind a factor the adapter's name stands in a model's own state dict; save_pretrained leaves it out.
_ADAPTER = re.compile(r"\.lora_(?:[AB]\.([^.]+)\.(?:weight|bias)|embedding_[AB]\.([^.]+))$")
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.|$)")
_FUSED = ("gate_up_proj", "down_proj")
# axolotl's linearized experts: a list for each projection.
_LISTS = re.compile(r"\.experts\.(gate|up|down)_projs\.(\d+)(?=\.)")
_CHECK_BYTES = 16 << 20  # searched for NaN at once
_NAMED_MODULES = 3  # in a warning


class AdapterSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What was merged of an adapter."""

    matrices_merged: int
    """Matrices that a product was added to; an expert's projection is one."""
    tensors_replaced: list[str]
    """Keys of tensors that were trained whole and replace the model's."""
    rank: int
    """The rank that adapter_config.json states."""
    ranks: list[int]
    """The ranks of all pairs of factors."""
    sha256: dict[str, str]
    """SHA-256 of the adapter's files, by name."""


@dataclass(frozen=True)
class Adapter:
    """An opened adapter. Every tensor is float and finite; `changes` finds the model's tensor for each."""

    path: Path
    config: AdapterConfig
    reader: TensorReader
    fingerprint: Mapping[str, str]  # SHA-256 of its two files, by name
    notes: tuple[str, ...] = ()  # what a user should know of how its files are read
    zeros: frozenset[str] = frozenset()  # keys of tensors that are all zeros

    @staticmethod
    def open(path: Path) -> Adapter:
        """Reads the whole adapter. Raises UsageError, BadInput or EnvironmentFailed."""
        if CONFIG not in directory_names(path):
            if is_checkpoint(path):
                raise UsageError(f"{path} is a whole model, no adapter: convert it, without --adapter")
            inside = sorted(found.parent for found in path.glob(f"*/{CONFIG}"))  # PEFT's place for all but "default"
            hint = f", {inside[0]}" if inside else ""
            raise UsageError(f"{path} has no {CONFIG}: give the directory of a PEFT adapter{hint}")
        config = AdapterConfig.read(path / CONFIG)
        file = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if file is None:
            raise BadInput(f"{path} has neither {' nor '.join(WEIGHTS)}: it comes with {CONFIG}, fetch it again")
        reader, notes = _reader(file)
        zeros = frozenset(key for key in reader.keys() if _all_zeros(file, reader, key))  # noqa: SIM118
        if not reader.keys():
            raise BadInput(f"{file.name} holds no tensor: nothing was trained, or it was saved in another way")
        fingerprint = {p.name: digests(p, {"sha256"}, lambda n: None)["sha256"] for p in (path / CONFIG, file)}
        return Adapter(path, config, reader, fingerprint, notes, zeros)

    def changes(self, binding: Binding) -> Changes:
        """By logical tensor: what changes it, and where. Raises BadInput naming the key that does not fit the model."""
        return _BoundAdapter(self, binding).changes

    def warnings(self, plan: Plan) -> list[str]:
        """What a user should know of how its files are read, and of modules of `plan` whose product is zero."""
        changes = {piece.change for tensor in plan.changed for piece in tensor.changes}
        products = [change for change in changes if isinstance(change, LowRankUpdate)]
        idle = sorted({p.a for p in products if not p.scaling or self.zeros & {p.a, p.b}})
        if not idle:
            return list(self.notes)
        modules = [key.removeprefix(_PREFIX).partition(".lora_")[0] for key in idle]
        more = f" and {len(idle) - _NAMED_MODULES} more" if len(idle) > _NAMED_MODULES else ""
        words = f"{len(idle)} of {len({p.a for p in products})} pairs of factors change nothing"
        why = "a factor or the scaling is zero: was the adapter saved before it was trained?"
        return [*self.notes, f"{self.path}: {words} ({', '.join(modules[:_NAMED_MODULES])}{more}): {why}"]

    def summary(self, plan: Plan) -> AdapterSummary:
        """What `plan`, which was made with this adapter, merges."""
        changes = {piece.change for tensor in plan.changed for piece in tensor.changes}
        products = [change for change in changes if isinstance(change, LowRankUpdate)]
        replaced = {change.key for change in changes if isinstance(change, TensorReplacement) and change.replaces}
        return AdapterSummary(
            matrices_merged=len({(p.a, p.expert) for p in products}),
            tensors_replaced=sorted(replaced),
            rank=self.config.r,
            ranks=sorted({p.rank for p in products}),
            sha256=dict(self.fingerprint),
        )


def _reader(file: Path) -> tuple[TensorReader, tuple[str, ...]]:
    """The tensors of an adapter by PEFT's names, and notes. What is no plain state dict in a zip is refused, never executed."""
    if file.suffix == ".safetensors":
        tensors = SafetensorsIndex.read(file)
        names, notes = _plain_names(tensors.tensors, file.name)
        renamed = replace(tensors, tensors={names[key]: tensor for key, tensor in tensors.tensors.items()})
        return DirectoryReader(TransformersCheckpoint(file.parent, {}, (renamed,))), tuple(notes)
    try:
        index = PthIndex.read(file)
    except BadInput as error:
        raise BadInput(f"{error}; or save the adapter as {WEIGHTS[0]} (save_pretrained does)") from error
    check_records(index, index.records, lambda n: None)
    names, notes = _plain_names(index.tensors, file.name)
    index = replace(index, tensors={names[key]: tensor for key, tensor in index.tensors.items()})
    return RankReader(index), (*index.notes, *notes)


def _plain_names(keys: Iterable[str], file: str) -> tuple[dict[str, str], list[str]]:
    """(key -> its name as `save_pretrained` writes it, what was taken off in words): no wrappers, no name of the adapter."""
    peft = {key: key.removeprefix(_PREFIX) for key in keys}
    adapters = {match[1] or match[2] for name in peft.values() if (match := _ADAPTER.search(name))}
    if len(adapters) > 1:
        raise BadInput(
            f"{file} holds several adapters ({', '.join(sorted(adapters)[:3])}): save the one that is meant alone"
        )
    notes = [f"{file}: the adapter's name, {name!r}, is taken out of the keys" for name in adapters]
    for name in adapters:
        named = re.compile(rf"(?<=\.)(lora_(?:embedding_)?[AB]|modules_to_save)\.{re.escape(name)}(?=\.|$)")
        peft = {key: named.sub(r"\1", plain) for key, plain in peft.items()}
    names, more = unwrapped(list(peft.values()), _is_name, file)
    if not notes and not more:
        return {key: key for key in peft}, []
    return {key: names[plain] for key, plain in peft.items()}, [*notes, *more]


def _is_name(name: str) -> bool:
    """Whether a key of an adapter changes a tensor that a Llama 4 may have."""
    factor = _FACTOR.fullmatch(name)
    module = _LISTS.sub(r".experts.\2.\1_proj", _WRAPPERS.sub("", factor[1] if factor else name))
    spellings = (f"{module}.weight", f"{module}.gate_up_proj") if factor else (module,)
    return any(map(load_table().transformers_names.fullmatch, spellings))


def _all_zeros(file: Path, reader: TensorReader, key: str) -> bool:
    """Whether every number is zero. Raises BadInput for what is no float matrix, or not finite."""
    dtype, shape = reader.dtype(key), reader.shape(key)
    if dtype not in ("BF16", "F16", "F32") or not shape:
        raise BadInput(f"{file.name}: {key} is {dtype} {list(shape)}: adapters hold matrices in bf16, fp16 or fp32")
    step, is_zero = max(1, _CHECK_BYTES // max(1, 4 * prod(shape[1:]))), True
    for start in range(0, shape[0], step):
        bits = reader.read(key, (start, start + step))
        if any(found := count_nonfinite(bits.tobytes(), dtype)):
            raise BadInput(f"{file.name}: {key} has {found} numbers: its training failed, or it is damaged")
        is_zero = is_zero and not widened(bits, dtype).any()
    return is_zero


class _BoundAdapter:
    """An adapter and the model that it changes: finds the tensor of the model for each key.

    A key is a factor of a module (`A`, `B`, `bias`, `embedding_A` or `embedding_B`), or a tensor that was trained as it is:
    `modules_to_save`, biases, embeddings saved beside their factors.
    """

    def __init__(self, adapter: Adapter, binding: Binding) -> None:
        self.adapter, self.binding, self.reader = adapter, binding, adapter.reader
        self.experts: dict[str, Matrix] = {m.key: m for key in binding.transformers for m in linearized(binding, key)}
        self.names: dict[str, str] = {}  # tensor of the model -> key that takes its place, or adds to it
        self.changes: dict[str, list[Changed]] = defaultdict(list)  # by logical tensor
        modules: dict[str, dict[str, str]] = defaultdict(dict)  # wrapped module -> its factors -> key
        for key in sorted(self.reader.keys()):
            if factor := _FACTOR.fullmatch(key):
                embedding = f"embedding_{factor[4]}" if factor[4] else None
                modules[factor[1]][embedding or ("bias" if factor[3] == "bias" else factor[2])] = key
            else:
                self._whole(key)
        paths = {module: _WRAPPERS.sub("", module.removeprefix(_PREFIX)) for module in modules}
        fused = [f"{path}.{name}" for path in paths.values() if path.endswith(".experts") for name in _FUSED]
        self.scalings = adapter.config.scalings({*paths.values(), *fused})
        for module, keys in modules.items():
            self._module(paths[module], keys)

    def _add(self, change: Change, placements: Iterable[Placement]) -> None:
        for placement in placements:
            self.changes[placement.tensor].append(Changed(change, placement))

    # -- names

    def _find(self, name: str) -> str | None:
        """The model's name for a tensor: text models and those with a vision tower differ by a prefix."""
        name = _LISTS.sub(r".experts.\2.\1_proj", name)
        spellings = (name, _TEXT_PREFIX + name, name.removeprefix(_TEXT_PREFIX))
        return next((s for s in spellings if s in self.binding.transformers or s in self.experts), None)

    def _claim(self, name: str, key: str, kind: str) -> None:
        other = self.names.setdefault(f"{kind} {name}", key)
        if other != key:
            raise self._error(key, f"changes {name}, and so does {other}")

    def _error(self, key: str, what: str) -> BadInput:
        return BadInput(f"{self.adapter.path}: {key} {what}")

    def _unknown(self, key: str) -> BadInput:
        hint = ", which is left out" if "vision_model" in key and not self.binding.shape.n_vision_layers else ""
        return self._error(key, f"matches no tensor of this model{hint}: is it an adapter of another one?")

    def _placements(self, name: str) -> tuple[tuple[int, ...], list[Placement]]:
        """Shape of a tensor of the model as an adapter sees it, and where it holds which logical tensors."""
        if name in self.experts:
            matrix = self.experts[name]
            return (matrix.n, matrix.k), [matrix.target]
        return self.binding.transformers_shape(name), self.binding.transformers_placements(name)

    # -- changes

    def _whole(self, key: str) -> None:
        name = self._find(_WRAPPERS.sub("", key.removeprefix(_PREFIX)))
        if name is None:
            raise self._unknown(key)
        self._add_stored(name, key, "whole")

    def _add_stored(self, name: str, key: str, kind: str, scaling: float | None = None) -> None:
        """The tensor `key` replaces the model's; with a `scaling` it is added."""
        self._claim(name, key, kind)
        shape, placements = self._placements(name)
        if self.reader.shape(key) != shape:
            is_vocabulary = "embed" in name or "lm_head" in name
            hint = ": the vocabulary was resized, which cannot be merged" if is_vocabulary else ""
            raise self._error(key, f"has shape {list(self.reader.shape(key))}, {name} {list(shape)}{hint}")
        for rows, placed in row_blocks(shape, placements):
            self._add(TensorReplacement(self.reader, key, rows, shape, scaling), placed)

    def _module(self, path: str, keys: Mapping[str, str]) -> None:
        kind = "embedding_" if any(part.startswith("embedding_") for part in keys) else ""
        for this, other in (("A", "B"), ("B", "A")):
            if kind + this in keys and kind + other not in keys:
                raise self._error(keys[kind + this], f"has no lora_{kind}{other} beside it")
        if kind + "A" not in keys or (kind and len(keys) > 2):
            raise self._error(next(iter(keys.values())), "belongs to no pair of factors")
        a, b = keys[kind + "A"], keys[kind + "B"]
        for key in (a, b):
            if len(self.reader.shape(key)) != 2:
                raise self._error(key, f"has shape {list(self.reader.shape(key))}: a factor has two dimensions")
        name = self._find(f"{path}.weight")
        if name is None and path.endswith(".experts") and not kind:
            if "bias" in keys:
                raise self._error(keys["bias"], "is a bias, which experts do not have")
            self._fused(path, a, b)
            return
        if name is None:
            raise self._unknown(a)
        if kind and not name.endswith("embed_tokens.weight"):
            raise self._error(a, f"is no pair of factors for {name}")
        self._linear(path, name, a, b, is_embedding=bool(kind))
        if "bias" in keys:
            self._bias(path, name, keys["bias"])

    def _linear(self, path: str, name: str, a: str, b: str, *, is_embedding: bool) -> None:
        self._claim(name, a, "added")
        shape, placements = self._placements(name)
        # PEFT's embedding has its factors the other way round: (B @ A)^T.
        n, k = reversed(shape) if is_embedding else shape
        scaling = self._scaling(path, name, a, b, (n, k), 1)
        for rows, placed in row_blocks(shape, placements):
            height = rows[1] - rows[0]
            if is_embedding:
                turned = [Placement(p.tensor, p.box, 0, (1, height)) for p in placed]
                self._add(LowRankUpdate(self.reader, a, b, scaling, (n, height), columns=rows), turned)
            else:
                self._add(LowRankUpdate(self.reader, a, b, scaling, (height, k), rows=rows), placed)

    def _bias(self, path: str, weight: str, key: str) -> None:
        name = self._find(f"{path}.bias")
        if name is None:
            raise self._error(key, f"has no bias to be added to: {weight} has none (lora_bias in {CONFIG})")
        self._add_stored(name, key, "added", self.scalings[path][1])

    def _fused(self, path: str, a: str, b: str) -> None:
        """`target_parameters`: E matrices at once. A [r E, x] has an expert's rows together, B [y, r E] has them E apart."""
        inner, outer = self.reader.shape(a)[1], self.reader.shape(b)[0]
        for parameter in _FUSED:
            name = self._find(f"{path}.{parameter}")
            if name is None:
                raise self._unknown(a)
            shape, placements = self._placements(name)
            if sorted(shape[1:]) == sorted((inner, outer)):
                break
        else:
            raise self._error(a, f"with {b} makes {[outer, inner]}, which no parameter of {path} is")
        self._claim(name, a, "added")
        n_experts, rows, columns = shape
        scaling = self._scaling(f"{path}.{parameter}", name, a, b, (outer, inner), n_experts)
        as_stored = (outer, inner) == (rows, columns) and (rows != columns or self._square_as_stored())
        for expert in range(n_experts):
            placed = []
            for whole in placements:
                _, height, width = whole.box.size
                box = Box((expert, 0, 0), (1, height, width))
                offset, strides = (whole.offset, (0, columns, 1)) if as_stored else (whole.offset * rows, (0, 1, rows))
                placed.append(Placement(whole.tensor, box, offset, strides))
            change = LowRankUpdate(self.reader, a, b, scaling, (outer, inner), expert=(expert, n_experts))
            self._add(change, placed)

    def _square_as_stored(self) -> bool:
        """Whether B @ A lies as the parameter does, where its shape does not tell: PEFT has changed that once."""
        version = self.adapter.config.version
        if version is None:
            raise BadInput(
                f"{self.adapter.path / CONFIG}: peft_version is missing or no version, and the experts are square: nothing"
                " tells which of their sides lora_A belongs to"
            )
        return version >= (0, 19, 1)

    def _scaling(self, path: str, name: str, a: str, b: str, shape: tuple[int, int], experts: int) -> float:
        """alpha / r. Raises BadInput for factors that do not make a matrix of `shape`, or not at the rank that is configured."""
        (rank_a, inner), (outer, rank_b) = self.reader.shape(a), self.reader.shape(b)
        rank, scaling = self.scalings[path]
        for key, found in ((a, rank_a), (b, rank_b)):
            if found != rank * experts:
                what = f"{found // experts if found % experts == 0 else found}"
                raise self._error(key, f"has rank {what}, but {CONFIG} makes it {rank}")
        if (outer, inner) != shape:
            wrong = a if inner != shape[1] else b
            raise self._error(wrong, f"does not fit: lora_B @ lora_A is {[outer, inner]}, {name} {list(shape)}")
        return scaling
