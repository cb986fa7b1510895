"""The result type of each command, and the docstrings of its fields, for the manual and the schema."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

_JSON_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}


def result_types() -> dict[str, type[msgspec.Struct]]:
    """By command: the type of its result, which `--json` prints."""
    from llama4_convert.commands.results import Completion, Recipes
    from llama4_convert.conversion.explanation import Explanation
    from llama4_convert.conversion.results import Conversion, Export, PlanSummary
    from llama4_convert.fitting.results import Fit
    from llama4_convert.inspection.results import Inspection
    from llama4_convert.inspection.verify import Verification
    from llama4_convert.publishing import Card, Push
    from llama4_convert.reference.generation import Generation
    from llama4_convert.samples.demo import Demonstration
    from llama4_convert.samples.synthetic.synth import Synthesis
    from llama4_convert.validation.results import Diff, Validation

    return {
        "plan": PlanSummary,
        "convert": Conversion,
        "export": Export,
        "recipes": Recipes,
        "fit": Fit,
        "inspect": Inspection,
        "explain": Explanation,
        "verify": Verification,
        "validate": Validation,
        "diff": Diff,
        "generate": Generation,
        "card": Card,
        "push": Push,
        "synth": Synthesis,
        "demo": Demonstration,
        "completion": Completion,
    }


class Field(NamedTuple):
    """A field of a result."""

    name: str
    json_type: str  # in words
    doc: str
    inner: type[msgspec.Struct] | None  # of the objects that it holds


def fields_of(struct: type[msgspec.Struct]) -> list[Field]:
    """The fields of a struct in the order of its JSON, each with its docstring."""
    docs = field_docs(struct)
    return [
        Field(
            field.encode_name, type_in_words(field.type), docs.get(field.name, ""), next(_structs([field.type]), None)
        )
        for field in msgspec.structs.fields(struct)
    ]


def field_docs(struct: type[msgspec.Struct]) -> dict[str, str]:
    """Field -> the string literal under it in the source of the class, or of the class that it inherits the field from."""
    found: dict[str, str] = {}
    for kind in reversed(struct.__mro__):
        if not issubclass(kind, msgspec.Struct) or kind is msgspec.Struct:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def type_in_words(kind: Any) -> str:
    """JSON's word for a type: "list of objects", "number or null". `UnsetType` marks a field that is not always there."""
    choices = _choices(kind)
    words = dict.fromkeys(_one_type(choice) for choice in choices if choice is not msgspec.UnsetType)
    text = " or ".join(words)
    return f"{text}, not always there" if msgspec.UnsetType in choices else text


def _choices(kind: Any) -> tuple[Any, ...]:
    """The types of a union; any other type alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _one_type(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return "any value"
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin is typing.Annotated:
        return _one_type(arguments[0])
    if origin is list or (origin is tuple and arguments[-1] is ...):
        return f"list of {_plural(type_in_words(arguments[0]))}"
    if origin is tuple:
        return f"list of {len(arguments)}: {', '.join(type_in_words(one) for one in arguments)}"
    if origin is dict:
        return f"object of {_plural(type_in_words(arguments[1]))}"
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return "object"
    return _JSON_NAMES[kind]


def _plural(words: str) -> str:
    irregular = {"true or false": "truth values", "any value": "any values"}
    first, _, rest = words.partition(" or ")
    return irregular.get(words) or f"{first}s{f' or {rest}' if rest else ''}"


def schema() -> dict[str, Any]:
    """A JSON schema of every result: `properties` has one command each, `$defs` their types with the docstrings."""
    results = result_types()
    _, components = msgspec.json.schema_components(results.values(), ref_template="#/$defs/{name}")
    for struct in set(_structs(results.values())):
        docs = field_docs(struct)
        for name, body in components[struct.__name__]["properties"].items():
            body["description"] = docs[name]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Results of llama4-convert, by command",
        "type": "object",
        "properties": {command: {"$ref": f"#/$defs/{kind.__name__}"} for command, kind in results.items()},
        "$defs": components,
    }


def _structs(kinds: Iterable[Any]) -> Iterator[type[msgspec.Struct]]:
    """The structs in types, each before those of its fields: also of the objects in a list, or in an object of objects."""
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield kind
            yield from _structs(field.type for field in msgspec.structs.fields(kind))
        else:
            yield from _structs(typing.get_args(kind))
