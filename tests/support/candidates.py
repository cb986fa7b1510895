"""Candidates of `validate` that are damaged on purpose, and what it says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama4_convert.validation.results import Validation
from tests.support import commands, meta_model

WEIGHTS = "model-00001-of-00001.safetensors"
METRICS = ("top1_agreement", "kl_mean", "kl_p999", "nmse", "max_abs_diff", "perplexity_reference")
TEXT, VISION = "language_model.model.", "vision_model."
LAYER, TOWER = f"{TEXT}layers.1.", f"{VISION}model.layers.1."
SCOUT = meta_model.GEOMETRIES["scout"]


def written(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    params = {**SCOUT, "n_layers": 2, **changes}
    return meta_model.write_checkpoint(meta_model.build(params, 0, dtype), params, folder, ranks=2, dtype=dtype)


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / WEIGHTS, {"format": "pt"})
    index = path / commands.INDEX
    body = json.loads(index.read_text())
    index.write_text(json.dumps({**body, "weight_map": dict.fromkeys(tensors, WEIGHTS)}))


def change_config(path: Path, file: str = "config.json", **changes: Any) -> None:
    """`rope_scaling__factor=1` sets a nested field; fields of the text are found in text_config. ... deletes one."""
    body = json.loads((path / file).read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = body
        if outer[:1] != ["vision_config"] and (outer or [last])[0] not in body and "text_config" in body:
            place = body["text_config"]
        for key in outer:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    (path / file).write_text(json.dumps(body))


def fields(result: Validation) -> set[str]:
    return {difference.field for difference in result.config_differences}
