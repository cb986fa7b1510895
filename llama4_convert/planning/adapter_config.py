"""adapter_config.json: ranks and scalings by module, and a closed list of what may stand in it. All else is no plain LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from llama4_convert.checkpoints.confined import Stopped, confined
from llama4_convert.errors import BadInput
from llama4_convert.files import json_object
from quant.typed import InvalidField, decode

# Fields that say what was trained, or how, and decide nothing in a merge: the keys of the weights say which modules.
_IDLE = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("lora_dropout", "bias", "lora_bias", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying"),
}
# Ways to begin that leave the base weights alone. Others (pissa, olora, corda, loftq, lora_ga) take a part out of them.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")

_Rank = Annotated[int, Meta(ge=1)]
_Alpha = Annotated[float, Meta(gt=-1e30, lt=1e30)]


class AdapterConfig(Struct, frozen=True):
    """The fields of adapter_config.json that decide what a merge computes; their names are PEFT's."""

    r: _Rank
    lora_alpha: _Alpha
    peft_type: str | None = None
    use_rslora: bool | None = None
    """scale by alpha / sqrt(rank) instead of alpha / rank"""
    rank_pattern: dict[str, _Rank] | None = None
    """regular expression for the end of a module's path -> its rank"""
    alpha_pattern: dict[str, _Alpha] | None = None
    target_parameters: list[str] | None = None
    """weights that were trained as parameters, by the ends of their paths"""
    peft_version: Any = None
    init_lora_weights: Any = True

    @staticmethod
    def read(path: Path) -> AdapterConfig:
        """Raises BadInput, naming the field."""
        body = json_object(path)
        _check_plain(path, body)
        try:
            return decode(body, AdapterConfig, path.name)
        except InvalidField as error:
            raise BadInput(f"{error}: save the adapter again") from error

    @property
    def version(self) -> tuple[int, ...] | None:
        """The version of PEFT that wrote the file; None where the file states none, or numbers that no release has."""
        numbers = (
            re.match(r"\d{1,9}(\.\d{1,9})*(?!\d)", self.peft_version) if isinstance(self.peft_version, str) else None
        )
        return tuple(map(int, numbers[0].split("."))) if numbers else None

    def scalings(self, modules: Iterable[str]) -> dict[str, tuple[int, float]]:
        """By module, each named by its path in the model: the rank of its factors, and the factor of B @ A. Raises BadInput."""
        names = list(modules)
        paths = [self._matched_path(name) for name in names]
        ranks = _first_matches("rank_pattern", self.rank_pattern, paths, self.r)
        alphas = _first_matches("alpha_pattern", self.alpha_pattern, paths, self.lora_alpha)
        return {
            name: (rank, alpha / math.sqrt(rank) if self.use_rslora else alpha / rank)
            for name, rank, alpha in zip(names, ranks, alphas, strict=True)
        }

    def _matched_path(self, module: str) -> str:
        """What patterns are compared with: the module's path, or its weight's where that is a target parameter."""
        weight = f".{module}.weight"
        return weight[1:] if any(weight.endswith(f".{name}") for name in self.target_parameters or ()) else module


def _check_plain(path: Path, body: Mapping[str, Any]) -> None:
    if body.get("peft_type") != "LORA":
        raise BadInput(f"{path.name}: peft_type is {body.get('peft_type')!r:.40}: only LORA can be merged here")
    known = {*_IDLE, *AdapterConfig.__struct_fields__}
    for name, value in body.items():
        if name not in known and value:
            raise BadInput(
                f"{path.name}: {name} is {value!r:.60}, which is not plain LoRA: merge it with PEFT, then convert the result"
            )
    if body.get("init_lora_weights", True) not in _BEGINNINGS:
        raise BadInput(
            f"{path.name}: init_lora_weights is {body['init_lora_weights']!r:.40}, which changes the base weights as well: save"
            " the adapter with path_initial_model_for_weight_conversion, or merge it with PEFT"
        )


def _first_matches(field: str, patterns: Mapping[str, Any] | None, paths: list[str], default: Any) -> list[Any]:
    """For each path the value of the first pattern that is the path, or the end of it. Raises BadInput, naming the field."""
    if not patterns:
        return [default] * len(paths)
    try:
        found = confined(__name__, "match_paths", [list(patterns), paths])
    except Stopped as error:
        raise BadInput(f"adapter_config.json: {field}: {error}: write the ends of paths, as PEFT does") from error
    values = list(patterns.values())
    return [default if at is None else values[at] for at in found]


def match_paths(given: tuple[list[str], list[str]]) -> list[int | None]:
    """For each path the number of the first pattern that matches it, as PEFT's `get_pattern_key` matches.

    Patterns are compiled inside of PEFT's own, as they are used: some are expressions only there, and some only alone.
    """
    patterns, paths = given
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(rf"(.*\.)?({pattern})$"))
        except (re.error, OverflowError) as error:
            raise ValueError(f"{pattern!r:.60} is no regular expression ({error})") from error
    return [next((i for i, one in enumerate(compiled) if one.match(path)), None) for path in paths]
