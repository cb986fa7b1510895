"""The command line that repeats a validation, for its result."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from os import PathLike
from typing import Any

_DEFAULTS: Mapping[str, Any] = {
    "tokens": 256,
    "prompts": None,
    "token-ids": None,
    "image": (),
    "with": "llama4",
    "reference-with": "llama4",
    "dtype": "float32",
    "gate": (),
    "seed": 0,
}


def command_line(path: str | PathLike[str], reference: str | PathLike[str], options: Mapping[str, Any]) -> str:
    """`options` by the names of the command; those that have their default are left out, a list is an option repeated."""
    words = ["llama4-convert", "validate", str(path), "--reference", str(reference)]
    for name, value in options.items():
        if value != _DEFAULTS[name]:
            for one in value if isinstance(value, (list, tuple)) else [value]:
                words += [f"--{name}", str(one)]
    return shlex.join(words)
