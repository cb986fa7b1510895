"""What a validation leaves on disk, so that it goes on after a kill and a second candidate need not wait for the reference.

    FOLDER/<key of the reference and the prompts>/  layers.3.npy  layers.3.scores.npy ...       states of the reference
                                                    matching_tensors.json   digests of tensors known to be right
                                                    <key of the candidate>/  progress.json  free.12.npy  forced.12.npy

A key is a digest of everything that decides the numbers: the content of the checkpoint (CRCs of Meta's archives; of
safetensors, which have none, headers, sizes and times of the files), the prompts, the dtype, the versions of this package and
of torch. States are raw bits; nothing is pickled. The validations used last stay, older ones go.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
import torch
from isal.isal_zlib import crc32
from torch import Tensor

from llama4.loading import DTYPES, to_bits, to_tensor
from llama4.weights import Bits
from llama4_convert.checkpoints.readers import DirectoryReader, RankReader
from llama4_convert.errors import EnvironmentFailed, one_line
from llama4_convert.files import locked, write_small
from llama4_convert.reference.checkpoint import Checkpoint
from llama4_convert.validation.parity.models import Models
from llama4_convert.validation.parity.prompts import Batch
from llama4_convert.validation.parity.stages import Step
from llama4_convert.validation.parity.walk import Parity, States
from llama4_convert.validation.weight_check import ComparisonProgress
from llama4_convert.version import VERSION
from quant.typed import decode

T = TypeVar("T")
_Files = dict[Literal["reference", "free", "forced"], str]  # a walk's state -> the file that has it, without .npy
_KEPT_VALIDATIONS = 4
_SECONDS_BETWEEN_SAVES = 10.0
_PROGRESS_FILE = "progress.json"
_MATCHING_TENSORS_FILE = "matching_tensors.json"


def default_folder() -> Path:
    """Where the command keeps its caches: under XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama4-convert" / "validate"


def content_key(checkpoint: Checkpoint) -> str:
    """Digest of a checkpoint: its configuration, and what its files hold as far as that is known without reading them."""
    parts: list[Any] = [repr(checkpoint.config)]
    for reader in checkpoint.readers:
        if isinstance(reader, RankReader):
            parts.append(reader.index.fingerprint)
        elif isinstance(reader, DirectoryReader):
            files = [(index.path.name, os.stat(index.path)) for index in reader.checkpoint.files]
            parts += [[name, found.st_size, found.st_mtime_ns] for name, found in files]
            parts += sorted(
                f"{key} {t.dtype} {t.shape} {t.record.offset}" for key, t in reader.checkpoint.tensors.items()
            )
    return _digest(parts)


def run_key(models: Models, batch: Batch) -> str:
    """Digest of all that decides what the reference computes."""
    pixels = None
    if batch.pixel_values is not None:
        pixels = hashlib.sha256(batch.pixel_values.numpy().tobytes()).hexdigest()
    tokens = [prompt.tokens for prompt in batch.prompts]
    settings = [models.dtype_name, repr(models.config), repr(sorted(models.rounded_tensors.items()))]
    return _digest([VERSION, torch.__version__, content_key(models.original), tokens, pixels, *settings])


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()[:32]


@contextlib.contextmanager
def open_journal(
    folder: str | os.PathLike[str] | None, models: Models, batch: Batch, warn: Callable[[str], None]
) -> Iterator[CandidateJournal | None]:
    """What is kept of a validation in `folder`; None without one, or where Transformers runs the reference, which is small."""
    if folder is None or models.reference_runner != "llama4":
        yield None
        return
    with open_cache(Path(folder), run_key(models, batch), models.dtype, warn) as cache:
        yield cache.candidate(content_key(models.candidate) + models.runner) if cache else None


@contextlib.contextmanager
def open_cache(folder: Path, key: str, dtype: torch.dtype, warn: Callable[[str], None]) -> Iterator[Cache | None]:
    """The cache of one reference and its prompts; None, and a warning, where none can be had: busy, full, not allowed."""
    own = folder / key
    with contextlib.ExitStack() as stack:
        cache = None
        try:
            own.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(own))
            os.utime(own)
            _drop_old(folder)
            cache = Cache(own, dtype, warn)
        except (OSError, EnvironmentFailed) as error:
            warn(f"this run keeps nothing and cannot go on after an interruption: {one_line(error, 150)}")
        yield cache


def _drop_old(folder: Path) -> None:
    """Remove all but the validations used last; one that another process holds stays as well."""
    found = [path for path in folder.iterdir() if path.is_dir() and re.fullmatch("[0-9a-f]{32}", path.name)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT_VALIDATIONS:]:
        with contextlib.suppress(OSError, EnvironmentFailed), locked(path):
            shutil.rmtree(path, ignore_errors=True)


class Cache:
    """The reference's steps: a record of those that earlier runs have made, which takes those that this one makes."""

    def __init__(self, folder: Path, dtype: torch.dtype, warn: Callable[[str], None]) -> None:
        self.folder, self.dtype, self.warn = folder, dtype, warn
        self.is_broken = False

    def step(self, stage: str) -> Step | None:
        state = self.load(stage, self.dtype)
        return None if state is None else Step(state, self.load(f"{stage}.scores", self.dtype))

    def save_step(self, stage: str, step: Step) -> None:
        if step.scores is not None:  # first: a state alone would be taken for a dense layer's
            self.save(f"{stage}.scores", step.scores)
        self.save(stage, step.state)

    def load(self, name: str, dtype: torch.dtype, folder: Path | None = None) -> Tensor | None:
        """None if it is not there, or was cut off."""
        try:
            with open((folder or self.folder) / f"{name}.npy", "rb") as file:
                bits = np.load(file, allow_pickle=False)
                if file.read() != _checksum(bits):
                    return None
            return to_tensor(bits, next(name for name, kind in DTYPES.items() if kind == dtype))
        except (OSError, ValueError, EOFError, KeyError):
            return None

    def save(self, name: str, state: Tensor, folder: Path | None = None) -> None:
        """Never raises: what cannot be kept is only slower next time."""
        if self.is_broken:
            return
        path = (folder or self.folder) / f"{name}.npy"
        partial = path.with_suffix(".partial")
        try:
            with open(partial, "wb") as file:
                bits = to_bits(state)
                np.save(file, bits, allow_pickle=False)
                # Instead of waiting for the disk: after a power cut the file may hold zeros.
                file.write(_checksum(bits))
            partial.replace(path)
        except OSError as error:
            self.is_broken = True
            partial.unlink(missing_ok=True)
            self.warn(f"nothing more is kept of this run: {one_line(error, 150)}")

    def candidate(self, key: str) -> CandidateJournal:
        """The journal of the candidate that has this key."""
        folder = self.folder / key
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
        return CandidateJournal(self, folder, _read(self.folder / _MATCHING_TENSORS_FILE, dict[str, str]) or {})


class _Progress(msgspec.Struct):
    """progress.json."""

    weights: ComparisonProgress = msgspec.field(default_factory=ComparisonProgress)
    stages: int = 0  # that are done
    names: _Files = msgspec.field(default_factory=dict)
    parity: Parity = msgspec.field(default_factory=Parity)


def _read(file: Path, type_: type[T]) -> T | None:
    """None if it is not there, or damaged."""
    try:
        return decode(json.loads(file.read_bytes()), type_, file.name)
    except (OSError, ValueError):
        return None


def _checksum(bits: Bits) -> bytes:
    return int(crc32(bits.data)).to_bytes(4, "little")


class CandidateJournal:
    """How far a candidate has come: the journal of a walk (`parity.walk.Journal`), and of the comparison of weights before it."""

    def __init__(self, cache: Cache, folder: Path, matching: dict[str, str]) -> None:
        self.cache, self.folder = cache, folder
        self.matching = matching  # digests of tensors that some candidate had right, by name
        self._saved_at = time.monotonic()

    def resume(self) -> tuple[int, States, Parity]:
        progress = self._progress()
        loaded: dict[str, Tensor] = {}
        for name in set(progress.names.values()):
            folder = self.cache.folder if name == progress.names.get("reference") else self.folder
            state = self.cache.load(name, self.cache.dtype, folder)
            if state is None:
                return 0, States(), Parity()
            loaded[name] = state
        states = States(**{side: loaded[name] for side, name in progress.names.items()})
        return progress.stages, states, progress.parity

    def save(self, stages: int, stage: str, states: States, parity: Parity) -> None:
        if time.monotonic() - self._saved_at < _SECONDS_BETWEEN_SAVES or self.cache.is_broken:
            return
        names: _Files = {"reference": stage}
        if states.free is not None:
            names["free"] = self._saved_state(f"free.{stages}", states.free, {stage: states.reference})
        if states.forced is not None:
            known = {stage: states.reference, names.get("free", ""): states.free}
            names["forced"] = self._saved_state(f"forced.{stages}", states.forced, known)
        self._write(_Progress(self._progress().weights, stages, names, parity))
        for path in self.folder.glob("*.npy"):
            if path.stem not in names.values():
                path.unlink()

    def _saved_state(self, name: str, state: Tensor, known: Mapping[str, Tensor | None]) -> str:
        """The file that has a state: that of a known one that is the same, or a new one."""
        for other, same in known.items():
            if state is same:
                return other
        self.cache.save(name, state, self.folder)
        return name

    def step(self, stage: str) -> Step | None:
        return self.cache.step(stage)

    def save_step(self, stage: str, step: Step) -> None:
        self.cache.save_step(stage, step)

    def comparison(self) -> ComparisonProgress:
        """How far the comparison of weights has come."""
        return self._progress().weights

    def save_comparison(self, weights: ComparisonProgress, is_last: bool = False) -> None:
        if is_last or time.monotonic() - self._saved_at >= _SECONDS_BETWEEN_SAVES:
            progress = self._progress()
            progress.weights = weights
            self._write(progress)
            with contextlib.suppress(OSError, EnvironmentFailed):
                write_small(self.cache.folder / _MATCHING_TENSORS_FILE, json.dumps(self.matching.copy()).encode())

    def finish(self) -> None:
        """The result is complete: the next run of this candidate begins anew."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _progress(self) -> _Progress:
        return _read(self.folder / _PROGRESS_FILE, _Progress) or _Progress()

    def _write(self, progress: _Progress) -> None:
        self._saved_at = time.monotonic()
        with contextlib.suppress(OSError, EnvironmentFailed):
            write_small(self.folder / _PROGRESS_FILE, json.dumps(msgspec.to_builtins(progress)).encode())
