"""adapter_config.json: ranks and scalings by module, and a closed list of what may stand in it. All else is no plain LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_convert.errors import BadInput
from llama4_convert.files import json_object

# Fields that say what was trained, or how, and nothing of what a merge makes of it: the keys of the weights say which modules.
_IDLE = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "peft_type",
        "peft_version",
        "inference_mode",
    ),
    *(
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
    ),
    *("lora_dropout", "bias", "lora_bias", "megatron_core", "runtime_config", "qalora_group_size", "eva_config"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "ensure_weight_tying"),
}
# Ways to begin that leave the base weights alone. Others (pissa, olora, corda, loftq, lora_ga) take a part out of them.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_parameters: tuple[str, ...]
    peft_version: tuple[int, ...] | None

    @staticmethod
    def read(path: Path) -> AdapterConfig:
        """Raises BadInput naming the field."""
        body = json_object(path)
        _check_plain(path, body)
        version = body.get("peft_version")
        numbers = re.match(r"\d+(\.\d+)*", version) if isinstance(version, str) else None
        return AdapterConfig(
            _number(path, "r", body.get("r"), whole=True),
            _number(path, "lora_alpha", body.get("lora_alpha")),
            body.get("use_rslora") is True,
            _pattern(path, "rank_pattern", body, whole=True),
            _pattern(path, "alpha_pattern", body),
            _names(path, "target_parameters", body),
            tuple(map(int, numbers[0].split("."))) if numbers else None,
        )

    def rank(self, module: str) -> int:
        """Of the factors of a module, by its path in the model."""
        return int(_matching(self.rank_pattern, self._matched(module), self.r))

    def scaling(self, module: str) -> float:
        """What B @ A is multiplied with."""
        alpha: float = _matching(self.alpha_pattern, self._matched(module), self.alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _matched(self, module: str) -> str:
        """What patterns are held against: the module's path, or its weight's where that is a target parameter."""
        weight = f".{module}.weight"
        return weight[1:] if any(weight.endswith(f".{name}") for name in self.target_parameters) else module


def _check_plain(path: Path, body: Mapping[str, Any]) -> None:
    if body.get("peft_type") != "LORA":
        raise BadInput(f"{path.name}: peft_type is {body.get('peft_type')!r:.40}: only LORA can be merged here")
    for name, value in body.items():
        if name not in _IDLE and value:
            raise BadInput(
                f"{path.name}: {name} is {value!r:.60}, which is not plain LoRA: merge it with PEFT, then convert the result"
            )
    if body.get("init_lora_weights", True) not in _BEGINNINGS:
        raise BadInput(
            f"{path.name}: init_lora_weights is {body['init_lora_weights']!r:.40}, which changes the base weights as well: save"
            " the adapter with path_initial_model_for_weight_conversion, or merge it with PEFT"
        )


def _number(path: Path, name: str, value: Any, whole: bool = False) -> Any:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or (whole and value < 1) or not abs(value) < 1e30:
        raise BadInput(f"{path.name}: {name} must be a {'whole ' if whole else ''}number, not {value!r:.40}")
    return value


def _pattern(path: Path, name: str, body: Mapping[str, Any], whole: bool = False) -> dict[str, Any]:
    value = body.get(name) or {}
    if not isinstance(value, dict):
        raise BadInput(f"{path.name}: {name} must be an object, not {value!r:.40}")
    for pattern, number in value.items():
        _number(path, f"{name}[{pattern!r:.60}]", number, whole)
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise BadInput(f"{path.name}: {name}: {pattern!r:.60} is no regular expression ({error})") from error
    return dict(value)


def _names(path: Path, name: str, body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get(name) or []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise BadInput(f"{path.name}: {name} must be a list of names, not {value!r:.40}")
    return tuple(value)


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first pattern that is the module's path, or the end of it, decides."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)
