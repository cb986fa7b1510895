"""The GPUs of gpus.toml, and the memory allowances that stand beside them: data with its sources."""

from __future__ import annotations

import difflib
import tomllib
from functools import cache
from importlib import resources
from typing import Literal

from msgspec import Struct, structs

from llama4_convert.errors import UsageError
from quant.typed import decode


class Gpu(Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of GPU: a table of gpus.toml."""

    name: str
    """as its maker calls it"""
    mib: int
    """memory of one GPU in MiB, as its driver reports it"""
    fp8: bool
    """whether it multiplies in FP8"""
    source: str
    """where `mib` comes from"""
    maker: Literal["nvidia", "amd"] = "nvidia"
    also: tuple[str, ...] = ()
    """other keys of the same GPU"""
    key: str = ""
    """the name of the table: "h100-80gb" """

    @property
    def nbytes(self) -> int:
        return self.mib << 20


class Allowance(Struct, frozen=True, forbid_unknown_fields=True):
    """Memory of one GPU that no arithmetic on the model gives."""

    mib: int
    source: str

    @property
    def nbytes(self) -> int:
        return self.mib << 20


class Allowances(Struct, frozen=True, forbid_unknown_fields=True):
    overhead: Allowance
    """what CUDA and the runtime take beside weights, KV cache and activations"""
    activations: Allowance
    """the least that is kept free for activations"""
    context: Allowance
    """the part of `overhead` that is taken before weights are loaded"""


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    allowances: Allowances
    gpus: dict[str, Gpu]


@cache
def _file() -> _File:
    text = resources.files("llama4_convert.fitting").joinpath("gpus.toml").read_text(encoding="utf-8")
    return decode(tomllib.loads(text), _File, "gpus.toml")


def allowances() -> Allowances:
    return _file().allowances


@cache
def gpus() -> dict[str, Gpu]:
    """The GPUs by key, smallest memory first."""
    rows = sorted(_file().gpus.items(), key=lambda item: item[1].mib)
    return {key: structs.replace(gpu, key=key) for key, gpu in rows}


def find_gpu(name: str) -> Gpu:
    """A GPU by its key ("h100-80gb") or another name; case does not matter. Raises UsageError with the nearest known key."""
    known, wanted = gpus(), name.strip().lower()
    for key, gpu in known.items():
        if wanted in (key, *gpu.also):
            return gpu
    if wanted == "list":
        raise UsageError(f"name one of {', '.join(known)}")
    models = [key for key in known if key.split("-")[0] == wanted.split("-")[0]]
    near = models or difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
    raise UsageError(f"no GPU {name!r:.40} is known: {hint}")
