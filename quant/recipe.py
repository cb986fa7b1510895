"""Recipes: which tensor is kept in how many bits, in which format. Readable TOML, built in or the user's own.

A recipe is a list of rules; for a matrix of a family, in a layer, of an expert, the first rule that names all three decides. What
no rule names stays as it is. Only the feed-forward families can be named: runtimes permute the rows of q and k as they load,
and of a quantized matrix some of them permute the weights alone.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

FAMILIES = ("routed_experts", "shared_expert", "dense_mlp")
FORMATS = ("compressed-tensors", "bitsandbytes", "meta")
_SCHEMES = {"compressed-tensors": ("int4", "fp8"), "bitsandbytes": ("nf4",), "meta": ("fp8",)}
KEEP = "keep"

Method = Literal["plain", "search", "signed"]
Granularity = Literal["channel", "tensor", "block"]


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message says what to write instead."""


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantized. Fields that a kind does not have keep their defaults."""

    kind: str  # "int4", "fp8" or "nf4"
    group_size: int = 128  # int4: neighbouring inputs that share a scale
    method: Method = "search"  # int4; fp8 without "signed"
    granularity: Granularity = "channel"  # fp8
    block_size: int = 64  # nf4
    double_quant: bool = True  # nf4: the scales are quantized too


@dataclass(frozen=True)
class Rule:
    families: tuple[str, ...]
    scheme: Scheme | None  # None: kept as it is
    layers: tuple[int, ...] | None = None  # negative ones count from the end; None: all
    experts: tuple[int, ...] | None = None  # of routed experts; None: all

    def names(self, family: str, layer: int, n_layers: int, expert: int | None) -> bool:
        if family not in self.families:
            return False
        if self.layers is not None and not {layer, layer - n_layers} & set(self.layers):
            return False
        return self.experts is None or expert is None or expert in self.experts


@dataclass(frozen=True)
class Recipe:
    name: str
    summary: str
    format: str
    rules: tuple[Rule, ...]

    def scheme(self, family: str, layer: int, n_layers: int, expert: int | None = None) -> Scheme | None:
        """What becomes of a matrix; None if it stays as it is."""
        rule = next((rule for rule in self.rules if rule.names(family, layer, n_layers, expert)), None)
        return rule.scheme if rule else None

    def to_json(self) -> dict[str, Any]:
        """All that decides bytes, in JSON's types: of a user's file too, which may change under the same name."""
        told = asdict(self)
        del told["summary"]
        plain: dict[str, Any] = json.loads(json.dumps(told))
        return plain

    def check(self, n_layers: int, n_experts: int) -> None:
        """Raises RecipeError for layers and experts that the model has not."""
        for number, rule in enumerate(self.rules, 1):
            for layer in rule.layers or ():
                if not -n_layers <= layer < n_layers:
                    raise RecipeError(f"recipe {self.name}, rule {number}: no layer {layer}, the model has {n_layers}")
            for expert in rule.experts or ():
                if not 0 <= expert < n_experts:
                    raise RecipeError(f"recipe {self.name}, rule {number}: no expert {expert}, there are {n_experts}")


def built_in() -> dict[str, Recipe]:
    """The recipes that come with us, by name."""
    folder = resources.files("quant") / "recipes"
    files = {f.name.removesuffix(".toml"): f for f in folder.iterdir() if f.name.endswith(".toml")}
    return {name: parse(files[name].read_text("utf-8"), name) for name in sorted(files)}


def load(name_or_path: str) -> Recipe:
    """A built-in recipe by name, or a TOML file by path. Raises RecipeError."""
    recipes = built_in()
    if name_or_path in recipes:
        return recipes[name_or_path]
    path = Path(name_or_path)
    if path.suffix != ".toml" and not path.is_file():
        hint = _hint(name_or_path, recipes)
        named = "" if hint.startswith("choose") else f" There are {', '.join(recipes)};"
        raise RecipeError(f"no recipe {name_or_path!r}: {hint}{named or ','} or give the path of a .toml file")
    try:
        return parse(path.read_text("utf-8"), path.stem)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text") from error


def parse(text: str, name: str) -> Recipe:
    """A recipe from its TOML. Raises RecipeError, naming the rule and the field."""
    where = f"recipe {name}"
    try:
        body = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"{where} is no valid TOML: {error}") from error
    _only(body, ("summary", "format", "rule"), where)
    summary = _field(body, "summary", str, where, "")
    kind = _field(body, "format", str, where)
    if kind not in FORMATS:
        raise RecipeError(f"{where}: format is {kind!r:.40}: {_hint(kind, FORMATS)}")
    rules = body.get("rule")
    if not isinstance(rules, list) or not rules or not all(isinstance(rule, dict) for rule in rules):
        raise RecipeError(f"{where} has no [[rule]]: write at least one")
    return Recipe(name, summary, kind, tuple(_rule(r, kind, f"{where}, rule {n}") for n, r in enumerate(rules, 1)))


def _rule(body: Mapping[str, Any], kind: str, where: str) -> Rule:
    options = tuple(field.name for field in fields(Scheme) if field.name != "kind")
    _only(body, ("families", "scheme", "layers", "experts", *options), where)
    families = body.get("families")
    if not isinstance(families, list) or not families:
        raise RecipeError(f"{where}: families must be a list of {', '.join(FAMILIES)}")
    for family in families:
        if family not in FAMILIES:
            raise RecipeError(f"{where}: no family {family!r:.40} can be quantized: {_hint(str(family), FAMILIES)}")
    scheme = _field(body, "scheme", str, where)
    known = (*_SCHEMES[kind], KEEP)
    if scheme not in known:
        raise RecipeError(f"{where}: {kind} has no scheme {scheme!r:.40}: {_hint(scheme, known)}")
    if kind == "meta":
        _check_meta(body, where)
    return Rule(
        tuple(families),
        _scheme(body, scheme, where),
        _whole_numbers(body, "layers", where),
        _whole_numbers(body, "experts", where),
    )


def _check_meta(body: Mapping[str, Any], where: str) -> None:
    """Meta's files have the routed experts of a layer in one tensor, and its script knows one way to quantize them."""
    if body["families"] != ["routed_experts"]:
        raise RecipeError(f"{where}: the format meta quantizes routed_experts alone")
    for name in body.keys() - {"families", "scheme", "layers"}:
        raise RecipeError(f"{where}: the format meta has no {name}: leave it out")


_OPTIONS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "int4": {"group_size": (32, 64, 128), "method": ("plain", "search", "signed")},
    "fp8": {"granularity": ("channel", "tensor", "block"), "method": ("plain", "search")},
    "nf4": {"block_size": (64, 128, 256, 512, 1024, 2048, 4096), "double_quant": (True, False)},
    KEEP: {},
}


def _scheme(body: Mapping[str, Any], kind: str, where: str) -> Scheme | None:
    given = {name: body[name] for options in _OPTIONS.values() for name in options if name in body}
    for name, value in given.items():
        choices = _OPTIONS[kind].get(name)
        if choices is None:
            raise RecipeError(f"{where}: {kind} has no {name}: leave it out")
        if type(value) is not type(choices[0]) or value not in choices:
            raise RecipeError(f"{where}: {name} is {value!r:.40}: choose one of {', '.join(map(str, choices))}")
    return None if kind == KEEP else Scheme(kind, **given)


def _only(body: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = tuple(known)
    for name in body:
        if name not in known:
            raise RecipeError(f"{where}: unknown field {name!r:.40}: {_hint(name, known)}")


def _hint(wrong: str, known: Iterable[str]) -> str:
    known = tuple(known)
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"


def _field(body: Mapping[str, Any], name: str, kind: type, where: str, default: Any = None) -> Any:
    value = body.get(name, default)
    if not isinstance(value, kind):
        raise RecipeError(f"{where}: {name} {'is missing' if value is None else f'must be text, not {value!r:.40}'}")
    return value


def _whole_numbers(body: Mapping[str, Any], name: str, where: str) -> tuple[int, ...] | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(type(n) is int for n in value):
        raise RecipeError(f"{where}: {name} must be a list of whole numbers, not {value!r:.40}")
    return tuple(value)
