"""What a validation leaves on disk, so that it goes on after a kill and a second candidate need not wait for the reference.

    FOLDER/<key of the reference and the prompts>/  layers.3.npy  layers.3.scores.npy ...       states of the reference
                                                    equal.json                        digests of tensors known to be right
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
from llama4_convert.validation.parity.prompts import Batch
from llama4_convert.validation.parity.stages import Step
from llama4_convert.validation.parity.walk import Parity, States
from llama4_convert.validation.weight_check import Compared, MatrixLoss
from llama4_convert.version import VERSION

_KEPT = 4  # validations that stay
_EVERY = 10.0  # seconds between two notes of how far a candidate has come
_PROGRESS = "progress.json"
_EQUAL = "equal.json"


def default_folder() -> Path:
    """Where the command line keeps it: XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama4-convert" / "validate"


def content_key(checkpoint: Checkpoint) -> str:
    """Digest of a checkpoint: its configuration, and what its files hold as far as that is known without reading them."""
    told: list[Any] = [repr(checkpoint.config)]
    for reader in checkpoint.readers:
        if isinstance(reader, RankReader):
            told.append(reader.index.fingerprint)
        elif isinstance(reader, DirectoryReader):
            files = [(index.path.name, os.stat(index.path)) for index in reader.checkpoint.files]
            told += [[name, found.st_size, found.st_mtime_ns] for name, found in files]
            told += sorted(
                f"{key} {t.dtype} {t.shape} {t.record.offset}" for key, t in reader.checkpoint.tensors.items()
            )
    return _digest(told)


def run_key(reference: Checkpoint, batch: Batch, dtype: str, *more: Any) -> str:
    """Digest of all that decides what the reference computes."""
    pixels = None
    if batch.pixel_values is not None:
        pixels = hashlib.sha256(batch.pixel_values.numpy().tobytes()).hexdigest()
    tokens = [prompt.tokens for prompt in batch.prompts]
    return _digest([VERSION, torch.__version__, content_key(reference), tokens, pixels, dtype, *map(repr, more)])


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()[:32]


@contextlib.contextmanager
def opened(folder: Path, key: str, dtype: torch.dtype, warn: Callable[[str], None]) -> Iterator[Cache | None]:
    """The cache of one reference and its prompts; None, and a warning, where none can be had: busy, full, not allowed."""
    mine = folder / key
    with contextlib.ExitStack() as stack:
        cache = None
        try:
            mine.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(mine))
            os.utime(mine)
            _drop_old(folder)
            cache = Cache(mine, dtype, warn)
        except (OSError, EnvironmentFailed) as error:
            warn(f"this run keeps nothing and cannot go on after an interruption: {one_line(error, 150)}")
        yield cache


def _drop_old(folder: Path) -> None:
    """All but the validations used last; one that another process holds stays as well."""
    found = [path for path in folder.iterdir() if path.is_dir() and re.fullmatch("[0-9a-f]{32}", path.name)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT:]:
        with contextlib.suppress(OSError, EnvironmentFailed), locked(path):
            shutil.rmtree(path, ignore_errors=True)


class Cache:
    """The reference's steps: a record of those that an earlier run has made, which takes those that this one makes."""

    def __init__(self, folder: Path, dtype: torch.dtype, warn: Callable[[str], None]) -> None:
        self.folder, self.dtype, self.warn = folder, dtype, warn
        self.is_broken = False

    def step(self, stage: str) -> Step | None:
        state = self.load(stage, self.dtype)
        return None if state is None else Step(state, self.load(f"{stage}.scores", self.dtype))

    def keep(self, stage: str, step: Step) -> None:
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
                file.write(
                    _checksum(bits)
                )  # instead of waiting for the disk: after a power cut the file may hold zeros
            partial.replace(path)
        except OSError as error:
            self.is_broken = True
            partial.unlink(missing_ok=True)
            self.warn(f"nothing more is kept of this run: {one_line(error, 150)}")

    def candidate(self, key: str) -> CandidateNotes:
        """How far an earlier run has come with a candidate of that key."""
        folder = self.folder / key
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
        told = _json(self.folder / _EQUAL)
        equal = {name: digest for name, digest in told.items() if isinstance(digest, str)}
        return CandidateNotes(self, folder, equal)


def _json(file: Path) -> dict[str, Any]:
    """Empty if it is not there, or damaged."""
    try:
        body: Any = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _checksum(bits: Bits) -> bytes:
    return int(crc32(bits.data)).to_bytes(4, "little")


@dataclass
class CandidateNotes:
    """The journal of a walk (`parity.Journal`), and of the bit comparison before it."""

    cache: Cache
    folder: Path
    equal: dict[str, str]  # digests of tensors that some candidate had right, by name
    _noted: float = field(default_factory=time.monotonic)

    def resume(self) -> tuple[int, States, Parity]:
        body = self._read()
        n = body.get("stages", 0)
        names = body.get("names") or {}
        loaded: dict[str, Tensor] = {}
        for name in set(names.values()):
            folder = self.cache.folder if name == names["reference"] else self.folder
            state = self.cache.load(name, self.cache.dtype, folder)
            if state is None:
                return 0, States(), Parity()
            loaded[name] = state
        if not n:
            return 0, States(), Parity()
        told = body["parity"]
        told["strayed"] = tuple(told["strayed"]) if told["strayed"] else None
        return n, States(**{side: loaded[name] for side, name in names.items()}), Parity(**told)

    def compared(self) -> Compared:
        """How far the bit comparison has come."""
        body = self._read().get("weights")
        if not body:
            return Compared()
        losses = [MatrixLoss(*loss) for loss in body["losses"]]
        return Compared(body["done"], body["wrong"], body["largest"], losses)

    def note(self, compared: Compared, is_last: bool = False) -> None:
        if is_last or time.monotonic() - self._noted >= _EVERY:
            losses = [[loss.key, loss.kind, loss.relative_mse] for loss in compared.losses]
            self._write({"weights": {**vars(compared), "losses": losses}})
            with contextlib.suppress(OSError, EnvironmentFailed):
                write_small(self.cache.folder / _EQUAL, json.dumps(self.equal.copy()).encode())

    def done(self, stages: int, stage: str, states: States, parity: Parity) -> None:
        if time.monotonic() - self._noted < _EVERY or self.cache.is_broken:
            return
        names = {"reference": stage}
        for side in ("free", "forced"):
            state = getattr(states, side)
            if state is None:
                continue
            if state is states.reference:
                names[side] = stage
            elif side == "forced" and state is states.free:
                names[side] = names["free"]
            else:
                names[side] = f"{side}.{stages}"
                self.cache.save(names[side], state, self.folder)
        self._write({"stages": stages, "names": names, "parity": asdict(parity)})
        for path in self.folder.glob("*.npy"):
            if path.stem not in names.values():
                path.unlink()

    def keep(self, stage: str, step: Step) -> None:
        self.cache.keep(stage, step)

    def finished(self) -> None:
        """All is said: the next run of this candidate begins anew."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> dict[str, Any]:
        return _json(self.folder / _PROGRESS)

    def _write(self, body: Mapping[str, Any]) -> None:
        self._noted = time.monotonic()
        with contextlib.suppress(OSError, EnvironmentFailed):
            write_small(self.folder / _PROGRESS, json.dumps({**self._read(), **body}).encode())
