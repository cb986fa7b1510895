"""What the commands return that are no functions of the package: `recipes` and `completion`."""

from __future__ import annotations

from msgspec import Struct


class BuiltInRecipe(Struct, frozen=True, kw_only=True):
    """A recipe that ships with this tool."""

    name: str
    """what --recipe takes"""
    format: str
    """what reads its output: compressed-tensors, bitsandbytes or meta"""
    summary: str
    """a line"""


class Recipes(Struct, frozen=True, kw_only=True):
    """The built-in recipes."""

    recipes: list[BuiltInRecipe]
    """all of them"""


class Completion(Struct, frozen=True, kw_only=True):
    """A completion script."""

    shell: str
    """bash, zsh or fish"""
    script: str
    """the script"""
