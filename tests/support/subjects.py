"""What a stranger may hand us, and what reads it: for mutants.py, which damages such bytes, and fuzz.py, which makes them up."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama4_convert import card, convert, inspect, plan
from llama4_convert.checkpoints.digests import read_ids
from llama4_convert.checkpoints.inert_pickle import RefusedPickle, read_state_dict
from llama4_convert.checkpoints.manifest import INDEX, NAME, Manifest
from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.checkpoints.tensors import StoredTensor
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.inspection.verify import verify
from llama4_convert.metadata.tokenizer import tokenizer_files
from llama4_convert.reports.html.report import render
from llama4_convert.validation.results import Validation
from quant.recipe import RecipeError, load
from quant.typed import InvalidField, decode
from tests.support import commands

# What `validate --json` prints, as far as a model card wants it.
PARITY = {
    "passed": True,
    "runner": "llama4",
    "dtype": "float32",
    "kind": "int4",
    "tensors_compared": 50,
    "tokens": 256,
    "config_differences": [],
    "tensors_different": [],
    "gates_failed": [],
    "gates": {"kl_mean": 0.2},
    "kl_mean": 0.01,
    "kl_p999": 0.2,
    "top1_agreement": 0.99,
    "nmse": 0.001,
    "tensors_quantized": {
        "int4": {"matrices": 6, "relative_mse_mean": 0.01, "relative_mse_largest": 0.02, "worst": "w"}
    },
    "layers": [{"layer": 0, "nmse_local": 0.01, "nmse_propagated": 0.01, "router_agreement": 1.0}],
}

REFUSED = (BadInput, RefusedPickle, UsageError, RecipeError, InvalidField)
# Of Python's audited actions, what no file may lead to. Importing our own modules late is our own doing.
FORBIDDEN = (
    *("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn"),
    *("socket.", "urllib.", "ctypes."),
)
FORBIDDEN_EXACT = (
    *("exec", "compile", "pickle.find_class"),
    *("os.remove", "os.rename", "os.rmdir", "os.chmod", "shutil.rmtree"),
)


class Watch:
    """Notes every forbidden action of the `with` blocks of `on`."""

    def __init__(self) -> None:
        self._on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    @contextmanager
    def on(self) -> Iterator[None]:
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "exec" and "/encodings/" in getattr(arguments[0], "co_filename", ""):
            return  # a codec of Python's own, imported when it is first met
        if event.startswith(FORBIDDEN) or event in FORBIDDEN_EXACT:
            self.seen.append(event)
        elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            self.seen.append(f"open for writing: {arguments[0]}")


@dataclass(frozen=True)
class Subject:
    """`seed` is what is whole. What is handed in takes its place in `file`, between the rest, or goes to `read` itself."""

    seed: bytes
    read: Callable[[bytes], object]
    is_text: bool = False
    file: Path | None = None
    before: bytes = b""
    after: bytes = b""

    def put(self, data: bytes) -> None:
        if self.file:
            self.file.write_bytes(self.before + data + self.after)


def without_crc(tensor: StoredTensor) -> StoredTensor:
    return replace(tensor, record=replace(tensor.record, crc=0))


def subjects(source: Path, folder: Path) -> dict[str, Subject]:
    """By name. `source`: Meta's directory of a small model; `folder`: where to put copies of it and what is made of it."""
    meta, out = folder / "meta", folder / "out"
    shutil.copytree(source, meta)
    convert(source, out)
    rank = sorted(meta.glob("*.pth"))[0]
    with zipfile.ZipFile(rank) as archive:
        pickle = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    raw = rank.read_bytes()
    directory = raw.rindex(b"data.pkl") - 200  # the central directory begins with this name
    weights = sorted(out.glob("*.safetensors"))[0]
    tensors = weights.read_bytes()
    end = 8 + int.from_bytes(tensors[:8], "little")
    recipe, ids = folder / "recipe.toml", folder / "ids.json"
    recipe.write_bytes((Path(__file__).resolve().parents[2] / "quant" / "recipes" / "mixed.toml").read_bytes())
    digits = "0123456789abcdef" * 4
    ids.write_text(
        f'[{{"path": "config.json", "oid": "{digits[:40]}"}}, {{"path": "x", "lfs": {{"oid": "{digits}"}}}}]'
    )
    lora, parity = commands.write_adapter(out, folder / "lora"), folder / "parity.json"
    parity.write_text(json.dumps({"path": str(out), **PARITY}))
    tensors_of_whole = {key: without_crc(tensor) for key, tensor in PthIndex.read(rank).tensors.items()}

    def archive_index(_: bytes) -> None:
        """What is read must say what the whole one says; but a CRC may be another, which the tensor's bytes then contradict."""
        found = PthIndex.read(rank).tensors
        assert {key: without_crc(tensor) for key, tensor in found.items()} == tensors_of_whole, "another index was read"

    def text(path: Path, read: Callable[[bytes], object]) -> Subject:
        return Subject(path.read_bytes(), read, True, path)

    def page(data: bytes) -> str:
        return render(decode(json.loads(data), Validation, "parity.json"))

    found = {
        "pickle": Subject(pickle, read_state_dict),
        "zip directory": Subject(raw[directory:], archive_index, file=rank, before=raw[:directory]),
        "zip record": Subject(raw[:4096], archive_index, file=rank, after=raw[4096:]),
        "safetensors": Subject(tensors[:end], lambda _: inspect(out), True, weights, after=tensors[end:]),
        "index": text(out / INDEX, lambda _: plan(out, recipe="nf4")),
        "config": text(out / "config.json", lambda _: plan(out, recipe="nf4")),
        "manifest": text(out / NAME, lambda _: (Manifest.read(out), verify(out), inspect(out))),
        "params": text(meta / "params.json", lambda _: plan(meta)),
        "tokenizer": Subject(
            (meta / "tokenizer.model").read_bytes(),
            lambda data: tokenizer_files(data, variant="instruct", vision=True, max_length=100),
            True,
        ),
        "recipe": text(recipe, lambda _: load(str(recipe))),
        "ids": text(ids, lambda _: read_ids(ids, out)),
        "adapter": text(lora / "adapter_config.json", lambda _: plan(out, adapter=lora)),
        "parity": text(parity, lambda _: (card(out, validation=parity), page(parity.read_bytes()))),
    }
    # What readers import late is imported by now, and is no doing of what is handed in.
    for subject in found.values():
        subject.read(subject.seed)
    return found
