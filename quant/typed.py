"""Parsed JSON and TOML as typed structs: what does not fit its type is refused in one line, with the field and what to write.

The parser stays `json` or `tomllib`; `decode` takes what they return. Structs forbid unknown fields where a misspelled one
must not pass in silence, and check fields against each other in `__post_init__`, by raising ValueError with the wording.
"""

from __future__ import annotations

import difflib
import enum
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")

_LARGEST = sys.float_info.max
# A number that is neither NaN nor infinite; a plain `float` field takes both.
Finite = Annotated[float, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]

MAX_VALUE_LENGTH = 40  # characters of a wrong value that a message repeats
# msgspec's names of types, which are JSON's -> words.
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_AT = re.compile(r"^(.*?) - at (`key` in )?`\$([^`]*)`$", re.DOTALL)  # how msgspec ends its message, but at the root
_EXPECTED = re.compile(r"^Expected `([^`]*)`(.*?)(?:, got .*)?$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")


class InvalidField(ValueError):
    """A value that is not of its type; the message is one line with the file, the field and what to write."""


def decode(value: Any, type: type[T], where: str) -> T:
    """`value`, as `json` or `tomllib` parsed it, as `type`: a msgspec Struct, or any type that msgspec converts to.

    `where` names the source for the message, as "recipe.toml" or a path. Nothing is coerced: 3.0 and true are no whole
    numbers, "3" is no number (3 is a valid float).

    Raises InvalidField: 'recipe.toml: rule 2: unknown field "sheme": did you mean "scheme"?'.
    """
    _look_up_fields(typing.cast(Any, type))
    try:
        return msgspec.convert(value, type, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidField(f"{where}{_problem(error, value, type)}") from None
    except UnicodeEncodeError as error:
        raise InvalidField(f"{where}: {_shown(error.object)} is no text: it holds half of a surrogate pair") from None
    except RecursionError:
        raise InvalidField(f"{where}: nested too deeply") from None
    except ValueError:  # msgspec writes a whole number into its message, and Python none of more than 4,300 digits
        raise InvalidField(f"{where}: a whole number has thousands of digits") from None


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """'did you mean "scheme"?' where one of `known` is close to `wrong`, else all of them: "choose one of a, b"."""
    known = tuple(known)
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {json.dumps(near[0])}?" if near else f"choose one of {', '.join(known)}"


class _Place(NamedTuple):
    """Where in a value an error lies."""

    path: str  # "rule 2: scheme"; empty for the value itself
    value: Any
    kinds: tuple[Any, ...]  # one of these types is expected there

    @property
    def subject(self) -> str:
        return f": {self.path}" if self.path else ""


def _problem(error: msgspec.ValidationError, value: Any, kind: Any) -> str:
    """What stands behind `where`: msgspec's error in the words of the file's author."""
    root = _Place("", value, (kind,))
    if at := _AT.match(str(error)):
        try:
            return _sentence(at[1], error.__cause__, _located(root, at[3], at[2] is not None))
        except (LookupError, TypeError, StopIteration):  # that was no path, but the end of a field's wrong name
            pass
    return _sentence(str(error), error.__cause__, root)


def _sentence(text: str, cause: BaseException | None, place: _Place) -> str:
    """`text`: msgspec's, without the path; `cause`: what a __post_init__ raised."""
    if cause is not None:
        return f"{place.subject}: {cause}"
    if missing := re.fullmatch("Object missing required field `(.*)`", text):
        return f"{place.subject}: {missing[1]} is missing"
    if text.startswith("Object contains unknown field"):
        known = _field_types(place)
        name = next(name for name in place.value if name not in known)
        return f"{place.subject}: unknown field {_shown(name)}: {suggestion(name, known)}"
    if choices := [choice for kind in _flattened(place.kinds) for choice in _choices(kind)]:
        near = place.value if isinstance(place.value, str) else ""
        return f"{place.subject} is {_shown(place.value)}: {suggestion(near, choices)}"
    if expected := _EXPECTED.match(text):
        kind = " or ".join(_WORDS.get(name, name) for name in expected[1].split(" | "))
        limits = "" if str(_LARGEST) in expected[2] else expected[2]  # Finite's say nothing
        found = f"of length {len(place.value)}" if limits.startswith(" of length") else _shown(place.value)
        return f"{place.subject} must be {kind}{limits}, not {found}"
    return f"{place.subject}: {text}"


def _located(place: _Place, path: str, is_key: bool) -> _Place:
    """Follows msgspec's path, as `.rule[0].scheme`. It does not tell keys of mappings (`[...]`), so they are searched for."""
    shown, value, kinds = place
    for name, index in _STEP.findall(path):
        if name:
            kinds, value = _field_types(_Place(shown, value, kinds))[name], value[name]
            shown += f"{_separator(shown)}{name}"
        elif index == "...":
            keys, kinds = _mapping_types(kinds)
            key = next(key for key, item in value.items() if not _fits(item, kinds))
            value = value[key]
            shown += f"[{_shown(key)}]"
        else:
            kinds, value = _item_types(kinds, int(index)), value[int(index)]
            place_in_list = f" {int(index) + 1}" if shown and isinstance(value, dict) else f", entry {int(index) + 1}"
            shown = (shown + place_in_list).removeprefix(", ")
    if not is_key:
        return _Place(shown, value, kinds)
    keys, _ = _mapping_types(kinds)
    key = next(key for key in value if not _fits(key, keys))
    return _Place(f"{shown}{': ' if shown else ''}the key {_shown(key)}", key, keys)


def _separator(shown: str) -> str:
    """Between a path and the name of a field: "config.layers", "rule 2: layers"."""
    return "" if not shown else ": " if shown[-1].isdigit() and " " in shown else "."


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union, without annotations."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return _alternatives(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        return _flattened(typing.get_args(kind))
    return (kind,)


def _flattened(kinds: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(one for kind in kinds for one in _alternatives(kind))


def _mapping_types(kinds: Iterable[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The types of keys and of values."""
    arguments = [typing.get_args(kind) for kind in _flattened(kinds) if typing.get_origin(kind) in (dict, Mapping)]
    return tuple(key for key, _ in arguments), tuple(value for _, value in arguments)


def _item_types(kinds: Iterable[Any], index: int) -> tuple[Any, ...]:
    """The types of one entry of a list."""
    found: list[Any] = []
    for kind in _flattened(kinds):
        arguments = typing.get_args(kind)
        by_place = typing.get_origin(kind) is tuple and ... not in arguments
        found += arguments[index : index + 1] if by_place else arguments[:1]
    return tuple(found)


@functools.cache
def _fields(struct: Any) -> dict[str, tuple[Any, ...]]:
    """Field, by its name in the file -> its type. msgspec compiles the struct's annotations for that."""
    return {field.encode_name: (field.type,) for field in msgspec.structs.fields(struct)}


@functools.cache
def _look_up_fields(kind: Any) -> None:
    """Looks up the fields of every struct within a type, once: to refuse a value compiles nothing."""
    for alternative in _alternatives(kind):
        if isinstance(alternative, type) and issubclass(alternative, msgspec.Struct):
            inner = [kind for (kind,) in _fields(alternative).values()]
        else:
            inner = list(typing.get_args(alternative))
        for part in inner:
            _look_up_fields(part)


def _field_types(place: _Place) -> dict[str, tuple[Any, ...]]:
    """The types of the fields of the expected struct, by their names in the file; of several, of the one that a tag names."""
    structs = [kind for kind in _flattened(place.kinds) if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
    fields = place.value if isinstance(place.value, dict) else {}
    tagged = [s for s in structs if fields.get(s.__struct_config__.tag_field) == s.__struct_config__.tag]
    found: dict[str, tuple[Any, ...]] = {}
    for struct in tagged or structs:
        if struct.__struct_config__.tag_field:
            found[struct.__struct_config__.tag_field] = tuple(Literal[s.__struct_config__.tag] for s in structs)
        found |= _fields(struct)
    return found


def _choices(kind: Any) -> list[str]:
    """The values of a Literal or an Enum."""
    if typing.get_origin(kind) is Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    return [str(member.value) for member in kind] if isinstance(kind, enum.EnumType) else []  # type: ignore[var-annotated]


def _fits(value: Any, kinds: Iterable[Any]) -> bool:
    """Is the value of one of the types?"""
    for kind in kinds:
        try:
            msgspec.convert(value, kind, strict=True)
        except msgspec.ValidationError:
            continue
        return True
    return False


def _shown(value: Any) -> str:
    """A scalar as JSON spells it, on one line and short; of lists and objects only what they are."""
    if isinstance(value, dict | list):
        return _WORDS["object" if isinstance(value, dict) else "array"]
    try:
        text = json.dumps(value, default=str)
    except ValueError:  # a whole number of more digits than Python writes
        return _WORDS["int"]
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 3] + "..."
