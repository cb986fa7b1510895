"""The GPUs of gpus.toml, and the allowances that stand beside them: data with its sources."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from llama4_convert.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    key: str
    name: str
    nbytes: int  # of one, as its driver reports it
    fp8: bool  # multiplies in FP8
    maker: Literal["nvidia", "amd"]
    source: str  # of nbytes


@dataclass(frozen=True)
class Allowances:
    """Bytes of one GPU that no arithmetic on the model tells; their sources are in gpus.toml."""

    overhead: int  # what CUDA and the runtime have beside weights, KV cache and activations
    activations: int  # the least that is kept for activations
    context: int  # of the overhead, what is taken before weights are loaded


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(resources.files("llama4_convert.fitting").joinpath("gpus.toml").read_text(encoding="utf-8"))


@cache
def gpus() -> dict[str, Gpu]:
    """The GPUs by key, smallest memory first."""
    rows = sorted(_table()["gpus"].items(), key=lambda item: item[1]["mib"])
    return {
        key: Gpu(key, row["name"], row["mib"] << 20, row["fp8"], row.get("maker", "nvidia"), row["source"])
        for key, row in rows
    }


@cache
def allowances() -> Allowances:
    return Allowances(**{name: row["mib"] << 20 for name, row in _table()["allowances"].items()})


def find_gpu(name: str) -> Gpu:
    """A GPU by its key ("h100-80gb") or another name; case does not matter. Raises UsageError with the nearest known key."""
    known, wanted = gpus(), name.strip().lower()
    for key, row in _table()["gpus"].items():
        if wanted in (key, *row.get("also", ())):
            return known[key]
    models = [key for key in known if key.split("-")[0] == wanted.split("-")[0]]
    near = models or difflib.get_close_matches(wanted, known, n=1)
    if wanted == "list":
        raise UsageError(f"name one of {', '.join(known)}")
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
    raise UsageError(f"no GPU {name!r:.40} is known: {hint}")
