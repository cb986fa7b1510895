"""Recipes: which tensor is kept in how many bits, in which format. Readable TOML, built in or the user's own.

A recipe is a list of rules. The first rule that names a matrix's family, layer and expert decides; a matrix that no rule names
stays as it is. Rules name feed-forward families only: runtimes permute the rows of q and k as they load, and some of them
permute the weights of a quantized matrix without its scales.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from msgspec import UNSET, Meta, Struct, UnsetType, structs

from quant.typed import InvalidField, decode, suggestion

Family = Literal["routed_experts", "shared_expert", "dense_mlp"]
Format = Literal["compressed-tensors", "bitsandbytes", "meta"]
Method = Literal["plain", "search", "signed"]
Granularity = Literal["channel", "tensor", "block"]
FAMILIES: tuple[str, ...] = get_args(Family)
FORMATS: tuple[str, ...] = get_args(Format)
KEEP = "keep"
# Of a file that nobody vouches for: a rule for each layer takes 6 KB. tomllib takes time quadratic in the dots of a key.
_MAX_BYTES = 64 << 10
_MAX_DOTS = 100
_SCHEMES = {"compressed-tensors": ("int4", "fp8"), "bitsandbytes": ("nf4",), "meta": ("fp8",)}
_OPTIONS = {
    "int4": ("group_size", "method"),
    "fp8": ("granularity", "method"),
    "nf4": ("block_size", "double_quant"),
    KEEP: (),
}


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
    """What becomes of the matrices of some families, in all or some layers, of all or some experts."""

    families: tuple[str, ...]
    scheme: Scheme | None  # None: kept as it is
    layers: tuple[int, ...] | None = None  # negative ones count from the end; None: all
    experts: tuple[int, ...] | None = None  # of routed experts; None: all

    def names(self, family: str, layer: int, n_layers: int, expert: int | None) -> bool:
        """Does the rule decide about a matrix of this family, layer and expert?"""
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
        fields = asdict(self)
        del fields["summary"]
        plain: dict[str, Any] = json.loads(json.dumps(fields))
        return plain

    def check(self, n_layers: int, n_experts: int) -> None:
        """Raises RecipeError for layers and experts that the model does not have."""
        for number, rule in enumerate(self.rules, 1):
            for layer in rule.layers or ():
                if not -n_layers <= layer < n_layers:
                    raise RecipeError(f"recipe {self.name}: rule {number}: no layer {layer}, the model has {n_layers}")
            for expert in rule.experts or ():
                if not 0 <= expert < n_experts:
                    raise RecipeError(f"recipe {self.name}: rule {number}: no expert {expert}, there are {n_experts}")


def built_in() -> dict[str, Recipe]:
    """The recipes that come with this package, by name."""
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
        hint = suggestion(name_or_path, recipes)
        named = "" if hint.startswith("choose") else f" There are {', '.join(recipes)};"
        raise RecipeError(f"no recipe {name_or_path!r}: {hint}{named or ','} or give the path of a .toml file")
    if path.exists() and not path.is_file():
        raise RecipeError(f"{path} is no regular file: give the path of a .toml file")
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise RecipeError(f"{path} is larger than {_MAX_BYTES >> 10} KiB, which no recipe is")
        return parse(data.decode(), path.stem)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text") from error


def parse(text: str, name: str) -> Recipe:
    """A recipe from its TOML. Raises RecipeError, naming the rule and the field."""
    where = f"recipe {name}"
    if any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
        raise RecipeError(f"{where} has a line with more than {_MAX_DOTS} dots, which no recipe needs")
    try:
        fields = decode(tomllib.loads(text), _File, where)
    except InvalidField as error:
        raise RecipeError(str(error)) from error
    except (ValueError, RecursionError) as error:  # of tomllib: also a number of more digits than Python reads
        raise RecipeError(f"{where} is no valid TOML: {error}") from error
    return Recipe(name, fields.summary, fields.format, tuple(rule.to_rule() for rule in fields.rule))


_LARGEST_NUMBER = 1 << 31  # of a layer or an expert: beyond any model, and short enough for a message
_Number = Annotated[int, Meta(ge=-_LARGEST_NUMBER, le=_LARGEST_NUMBER)]
_Numbers = Annotated[list[_Number], Meta(min_length=1)]


class _Rule(Struct, forbid_unknown_fields=True):
    """A [[rule]] as it is written: with the options of its scheme beside it."""

    families: Annotated[list[Family], Meta(min_length=1)]
    scheme: Literal["int4", "fp8", "nf4", "keep"]
    layers: _Numbers | UnsetType = UNSET
    experts: _Numbers | UnsetType = UNSET
    group_size: Literal[32, 64, 128] | UnsetType = UNSET
    method: Method | UnsetType = UNSET
    granularity: Granularity | UnsetType = UNSET
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] | UnsetType = UNSET
    double_quant: bool | UnsetType = UNSET

    def __post_init__(self) -> None:
        self._allow(self.scheme, "layers", "experts", *_OPTIONS[self.scheme])
        if self.scheme == "fp8" and self.method == "signed":
            raise ValueError('method is "signed": choose one of plain, search')

    def _allow(self, owner: str, *names: str) -> None:
        """Raises ValueError for optional fields that are written but not allowed by `owner`, a scheme or a format."""
        for name, value in structs.asdict(self).items():
            if value is not UNSET and name not in ("families", "scheme", *names):
                raise ValueError(f"{owner} has no {name}: leave it out")

    def check_format(self, format: str) -> None:
        """Raises ValueError for a rule that matrices of this format cannot follow."""
        known = (*_SCHEMES[format], KEEP)
        if self.scheme not in known:
            raise ValueError(f'{format} has no scheme "{self.scheme}": {suggestion(self.scheme, known)}')
        if format != "meta":
            return
        # Meta's files have the routed experts of a layer in one tensor, and its script knows one way to quantize them.
        if self.families != ["routed_experts"]:
            raise ValueError("the format meta quantizes routed_experts alone")
        self._allow("the format meta", "layers")

    def to_rule(self) -> Rule:
        options = {name: getattr(self, name) for name in _OPTIONS[self.scheme]}
        given = {name: value for name, value in options.items() if value is not UNSET}
        return Rule(
            tuple(self.families),
            None if self.scheme == KEEP else Scheme(self.scheme, **given),
            None if self.layers is UNSET else tuple(self.layers),
            None if self.experts is UNSET else tuple(self.experts),
        )


class _File(Struct, forbid_unknown_fields=True):
    """A recipe's TOML."""

    format: Format
    rule: list[_Rule] = []
    summary: str = ""

    def __post_init__(self) -> None:
        if not self.rule:
            raise ValueError("no [[rule]]: write at least one")
        for number, rule in enumerate(self.rule, 1):
            try:
                rule.check_format(self.format)
            except ValueError as error:
                raise ValueError(f"rule {number}: {error}") from None
