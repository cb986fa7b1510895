"""The index of a directory in Transformers' layout: config.json and the headers of its safetensors files."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from msgspec import Struct

from llama4_convert.checkpoints.layouts import (
    SINGLE,
    directory_names,
    incomplete_set,
    no_checkpoint,
    shards,
    unfinished,
)
from llama4_convert.checkpoints.manifest import INDEX, NAME, make_again
from llama4_convert.checkpoints.safetensors_header import read_header
from llama4_convert.checkpoints.tensors import Record, StoredTensor
from llama4_convert.checkpoints.wrapped_names import unwrapped
from llama4_convert.errors import BadInput
from llama4_convert.files import is_file_name, json_object
from mappings import load_table
from quant.typed import InvalidField, decode

_SAMPLE_BYTES = 4096


class _WeightIndex(Struct):
    """model.safetensors.index.json; other fields are of no interest."""

    weight_map: dict[str, str]
    """key -> the name of the file that holds the tensor"""


@dataclass(frozen=True)
class SafetensorsIndex:
    """One file: its tensors, each in a record of its own. safetensors has no checksums, so a record has none either."""

    path: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(tensor.record for tensor in self.tensors.values())

    @staticmethod
    def read(path: Path) -> SafetensorsIndex:
        """Raises BadInput or EnvironmentFailed."""
        return SafetensorsIndex(path, read_header(path))


@dataclass(frozen=True)
class TransformersCheckpoint:
    """An opened directory. Every tensor of its files is one that the index promises, and the other way round."""

    path: Path
    config: Mapping[str, Any]  # config.json
    files: tuple[SafetensorsIndex, ...]
    has_index: bool = True  # or one file; else numbered shards, of which nothing says that they are all
    notes: tuple[str, ...] = ()  # what a user should know of which files are read

    @staticmethod
    def open(path: Path) -> TransformersCheckpoint:
        """Read config.json, the index and every header. Raises UsageError, BadInput or EnvironmentFailed."""
        weight_map, names, notes = _weight_files(path)
        if not (path / "config.json").exists():
            raise BadInput(f"{path} has safetensors files and no config.json: take that of the same model")
        config = json_object(path / "config.json")
        if config.get("quantization_config", {}) is None:  # as Transformers reads it: not quantized
            del config["quantization_config"]
        files = tuple(SafetensorsIndex.read(path / name) for name in names)
        if weight_map is not None:
            _check_index(weight_map, files)
        elif len({key for index in files for key in index.tensors}) < sum(len(index.tensors) for index in files):
            raise BadInput(f"{path} has no {INDEX}, and two of its shards hold tensors of one name: fetch the index")
        is_name = load_table().transformers_names.fullmatch
        plain, more = unwrapped([key for i in files for key in i.tensors], is_name, path.name)
        if more:
            files = tuple(replace(i, tensors={plain[key]: tensor for key, tensor in i.tensors.items()}) for i in files)
            notes = (*notes, *more)
        return TransformersCheckpoint(path, config, files, weight_map is not None or names == [SINGLE], notes)

    @staticmethod
    def open_llama4(path: Path) -> TransformersCheckpoint:
        """As `open`; raises BadInput, too, where config.json names another kind of model."""
        checkpoint = TransformersCheckpoint.open(path)
        kind = checkpoint.config.get("model_type")
        if kind not in (None, "llama4", "llama4_text"):
            raise BadInput(f"config.json: model_type is {kind!r:.40}: this is no Llama 4")
        return checkpoint

    @property
    def archives(self) -> tuple[SafetensorsIndex, ...]:
        """Every file of tensors: what a run opens."""
        return self.files

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {key: tensor for index in self.files for key, tensor in index.tensors.items()}

    @cached_property
    def paths(self) -> Mapping[str, Path]:
        """Key -> the file that holds the tensor."""
        return {key: index.path for index in self.files for key in index.tensors}

    def without_prefix(self, prefix: str) -> TransformersCheckpoint:
        """The same with shorter keys."""
        shortened = (
            {key.removeprefix(prefix): tensor for key, tensor in index.tensors.items()} for index in self.files
        )
        files = tuple(SafetensorsIndex(i.path, tensors) for i, tensors in zip(self.files, shortened, strict=True))
        return replace(self, files=files)

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 a file: of config.json, and of what each weights file says of itself and three samples of each tensor.

        Not of all weights: reading hundreds of GB to recognize them would double the work. A manifest of ours in the source
        has their digests and is taken in.
        """
        found = {}
        for name in ("config.json", "llama4-convert.json"):
            if (self.path / name).is_file():
                found[name] = hashlib.sha256((self.path / name).read_bytes()).hexdigest()
        for index in self.files:
            listed = [(k, t.dtype, t.shape, t.record) for k, t in index.tensors.items()]
            digest = hashlib.sha256(repr((index.path.stat().st_size, listed)).encode())
            with open(index.path, "rb") as file:
                for record in index.records:
                    for start in (0, record.size // 2, max(0, record.size - _SAMPLE_BYTES)):
                        file.seek(record.offset + start)
                        digest.update(file.read(min(_SAMPLE_BYTES, record.size - start)))
            found[index.path.name] = digest.hexdigest()
        return found


def _weight_files(path: Path) -> tuple[Mapping[str, str] | None, list[str], tuple[str, ...]]:
    """(key -> file if there is an index, the names of the files, notes) of a directory with safetensors. Raises BadInput."""
    names, weight_map = directory_names(path), None
    if INDEX in names:
        try:
            weight_map = decode(json_object(path / INDEX), _WeightIndex, INDEX).weight_map
        except InvalidField as error:
            raise BadInput(f"{error}: {make_again(path)}") from error
        used = sorted(set(weight_map.values()))
        for name in used:
            if not is_file_name(name):
                raise BadInput(f"{INDEX} names a file that is not in the directory: {name!r:.80}")
        if SINGLE in names and SINGLE not in used:
            raise BadInput(
                f"{path} holds two sets of weights: Transformers takes {SINGLE}, vLLM the files of {INDEX}: remove one of the two"
            )
        notes: list[str] = []
    elif SINGLE in names:
        used, notes = [SINGLE], []
    else:
        used, notes = _without_index(path, names)
    if unused := sorted(set(shards(names)) - set(used)):
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        notes.append(
            f"{unused[0]}{more} of {path.name} is not read, since no index names it: readers that take every"
            " model*.safetensors (llama.cpp, mlx-lm) do"
        )
    if "adapter_config.json" in names:
        notes.append(
            f"an adapter lies beside the weights of {path.name} and is not read: Transformers loads it with them where PEFT is"
            " installed; --adapter merges it"
        )
    return weight_map, used, tuple(notes)


def _without_index(path: Path, names: Collection[str]) -> tuple[list[str], list[str]]:
    """(shards, notes) of a directory that has numbered shards and no index. Raises BadInput unless they are all of one set."""
    if not shards(names) or NAME in names:  # this tool writes the index last
        raise no_checkpoint(path)
    if why := incomplete_set(names):
        raise BadInput(f"{path} has no {INDEX}, and its shards are not one complete set: {why}")
    if file := unfinished(path):
        raise BadInput(f"{path} has no {INDEX}, and {file} says that a download or a run has not ended: let it end")
    note = f"{path.name} has no {INDEX}: its {len(shards(names))} shards are read; Transformers wants the index"
    return shards(names), [note]


def _check_index(weight_map: Mapping[str, str], files: tuple[SafetensorsIndex, ...]) -> None:
    present = {key for index in files for key in index.tensors}
    for index in files:
        for key in index.tensors:
            if weight_map.get(key) != index.path.name:
                raise BadInput(f"{INDEX} does not say that {key} is in {index.path.name}, where it is")
    for key in sorted(weight_map.keys() - present):
        raise BadInput(f"{INDEX} promises {key} in {weight_map[key]}, which lacks it")
