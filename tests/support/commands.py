"""Runs the command line in this process, as its entry point does, and builds small sources to damage."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import save_file

from llama4_convert.commands import cli

SHARD = 200_000
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that begins with `error:`; warnings may stand before it, nothing may stand after it."""
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        assert lines[-1] == errors[0], self.err
        assert all(line.startswith("warning: ") for line in lines[:-1]), self.err
        return errors[0].removeprefix("error: ")

    @property
    def json(self) -> Any:
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1
        return json.loads(self.out)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    capsys.readouterr()
    with mock.patch("sys.argv", ["llama4-convert", *map(str, arguments)]), pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return Outcome(stopped.value.code, captured.out, captured.err)


class Faults:
    """Lets the `left`-th call of some functions of `os` that `when` is true of fail, and with `for_ever` all that follow."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        names: tuple[str, ...],
        code: int,
        *,
        left: int = -1,
        for_ever: bool = False,
        when: Callable[..., bool] = lambda *_: True,
    ) -> None:
        self.left, self.code, self.for_ever, self.when = left, code, for_ever, when
        self.raised = 0
        for name in names:
            monkeypatch.setattr(os, name, self._failing(getattr(os, name)))

    def _failing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.when(*arguments):
                self.left -= 1
                if self.left == 0 or (self.for_ever and self.left < 0):
                    self.raised += 1
                    raise OSError(self.code, os.strerror(self.code))
            return function(*arguments, **options)

        return call


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def times(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.lstat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def loads_as_a_model(folder: Path) -> bool:
    """Whether a reader would take `folder` for a model: by an index, or by a bare file."""
    return any((folder / name).exists() for name in (INDEX, "model.safetensors", "pytorch_model.bin"))


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


class Stop(Exception):
    """What `stopping_after` ends a run with."""


def stopping_after(limit: float) -> Callable[[int], None]:
    """A `progress` that interrupts a run once it has moved more than `limit` bytes."""
    moved = 0

    def progress(n: int) -> None:
        nonlocal moved
        moved += n
        if moved > limit:
            raise Stop

    return progress


def flip(path: Path, offset: int, bit: int = 4) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def data_offset(path: Path, record: str) -> int:
    """Where the first byte of a record lies; `record` is the end of its name."""
    with zipfile.ZipFile(path) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith(record))
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return entry.header_offset + 30 + name + extra


def write_adapter(model: Path, path: Path) -> Path:
    """A LoRA adapter of rank 2 for the first queries of a directory in Transformers' layout, with the files that PEFT saves."""
    text = json.loads((model / "config.json").read_text())["text_config"]
    width, rows = text["hidden_size"], text["num_attention_heads"] * text["head_dim"]
    module = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    factors = {"A": np.full((2, width), 0.01, np.float32), "B": np.full((rows, 2), 0.01, np.float32)}
    path.mkdir(parents=True)
    save_file({f"{module}.lora_{name}.weight": x for name, x in factors.items()}, path / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(told))
    return path


def change_params(source: Path, **changes: Any) -> None:
    """Set fields of params.json; `moe_args__top_k=3` sets a nested one."""
    params = json.loads((source / "params.json").read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = params
        for key in outer:
            place = place[key]
        place[last] = value
    (source / "params.json").write_text(json.dumps(params))
