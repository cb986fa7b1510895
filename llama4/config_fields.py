"""Typed access to a config.json: absent and null mean the default, a wrong type is an error that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama4.geometry import InvalidModel, RopeScaling

DEFAULT_CONTEXT = 131072


class ConfigError(InvalidModel):
    """A config.json that no Llama 4 can be built from; the message names the field."""


class ConfigFields:
    """Typed access to an object of a config.json; absent and null mean the default."""

    def __init__(self, values: Mapping[str, Any], prefix: str) -> None:
        self.values, self.prefix = values, prefix

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
            raise ConfigError(f"{self.prefix}{name} must be a number, not {value!r:.40}")
        return float(value)

    def whole(self, name: str, default: int, least: int = 1, most: int = 1 << 40) -> int:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f"{self.prefix}{name} must be a whole number from {least} to {most:,}, not {value!r:.40}")
        return value

    def token(self, name: str, default: int) -> int | None:
        """A token id; negative ones stand for a token that the vocabulary lacks."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.prefix}{name} must be a token id, not {value!r:.40}")
        return value if 0 <= value < 1 << 40 else None

    def side(self, name: str, default: int) -> int:
        """A side in pixels: a number, or a list of two equal ones."""
        value = self.values.get(name)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            return ConfigFields({name: value[0]}, self.prefix).whole(name, default)
        return self.whole(name, default)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, (bool, int)):  # published configs of the 4.x era have numbers here
            raise ConfigError(f"{self.prefix}{name} must be true or false, not {value!r:.40}")
        return bool(value)

    def integers(self, name: str) -> tuple[int, ...] | None:
        return self._list(name, int)

    def strings(self, name: str) -> tuple[str, ...] | None:
        return self._list(name, str)

    def _list(self, name: str, kind: type) -> tuple[Any, ...] | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(x, kind) for x in value):
            raise ConfigError(f"{self.prefix}{name} must be a list with one entry a layer, not {value!r:.40}")
        return tuple(value)

    def nested(self, name: str) -> ConfigFields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.prefix}{name} must be an object, not {value!r:.40}")
        return ConfigFields(value, f"{self.prefix}{name}.")

    def ratio(self, name: str, default: float) -> float:
        ratio = self.number(name, default)
        if not 0 < ratio <= 1:
            raise ConfigError(f"{self.prefix}{name} must be above 0 and at most 1, not {ratio:g}")
        return ratio

    def _rope(self) -> ConfigFields | None:
        """Where RoPE's numbers are: Transformers 4 writes `rope_scaling`, which wins over Transformers 5's `rope_parameters`."""
        both = [self.nested(name) for name in ("rope_scaling", "rope_parameters")]
        return next((inner for inner in both if inner and inner.values), None)

    def rope_theta(self, default: float) -> float:
        inner, outer = self._rope(), self.number("rope_theta", default)
        return inner.number("rope_theta", outer) if inner else outer

    def rope_scaling(self) -> RopeScaling | None:
        inner = self._rope()
        if inner is None:
            return None
        kind = inner.values.get("rope_type") or inner.values.get("type") or "default"
        if kind == "default":
            return None
        if kind != "llama3":
            raise ConfigError(f"{inner.prefix}rope_type is {kind!r:.40}: Llama 4 has llama3 or default")
        context = self.whole("max_position_embeddings", DEFAULT_CONTEXT)
        return RopeScaling(
            factor=inner.number("factor", 0),
            high_freq_factor=inner.number("high_freq_factor", 0),
            low_freq_factor=inner.number("low_freq_factor", 0),
            original_context=inner.whole("original_max_position_embeddings", context),
        )
