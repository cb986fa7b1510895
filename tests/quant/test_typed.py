"""Parsed values as typed structs: what fits is taken as it is, what does not is one line that says where and what to write."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta, Struct

from quant.typed import Finite, InvalidField, decode


class Rule(Struct, forbid_unknown_fields=True, frozen=True):
    scheme: Literal["int4", "fp8"]
    bits: Annotated[int, Meta(ge=1)] = 4
    layers: tuple[int, ...] | None = None
    error: Finite = 0.0

    def __post_init__(self) -> None:
        if self.scheme == "int4" and self.bits == 8:
            raise ValueError("int4 has 4 bits: write 4 - at `$.bits`")


class Scale(Struct, forbid_unknown_fields=True, tag="scale", tag_field="kind"):
    factor: float


class Shift(Struct, forbid_unknown_fields=True, tag="shift", tag_field="kind"):
    offset: float


class File(Struct, forbid_unknown_fields=True):
    rule: Annotated[list[Rule], Meta(min_length=1)]
    sizes: dict[str, dict[str, int]] = {}
    by_name: dict[str, Rule] = {}
    errors: dict[str, Finite] = {}
    pair: tuple[int, str] = (0, "")
    change: Scale | Shift | None = None


def file(**fields: Any) -> dict[str, Any]:
    return {"rule": [{"scheme": "int4"}], **fields}


def test_what_fits_is_taken_as_it_is() -> None:
    found = decode(file(sizes={"a": {"b": 3}}, change={"kind": "shift", "offset": 3}), File, "f.json")
    assert found == File([Rule("int4")], {"a": {"b": 3}}, change=Shift(3.0))
    assert decode([1, 2], list[int], "f.json") == [1, 2]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, " must be an object, not 3"),
        ({}, ": rule is missing"),
        ({"rule": 3}, ": rule must be a list, not 3"),
        ({"rule": []}, ": rule must be a list of length >= 1, not of length 0"),
        ({"rule": [3]}, ": rule, entry 1 must be an object, not 3"),
        ({"rule": [{"scheme": "int4"}, {"sheme": 4}]}, ': rule 2: unknown field "sheme": did you mean "scheme"?'),
        ({"rules": []}, ': unknown field "rules": did you mean "rule"?'),
        ({"rule": [{}]}, ": rule 1: scheme is missing"),
        ({"rule": [{"scheme": "int5"}]}, ': rule 1: scheme is "int5": did you mean "int4"?'),
        ({"rule": [{"scheme": 4}]}, ": rule 1: scheme is 4: choose one of int4, fp8"),
        ({"rule": [{"scheme": "fp8", "bits": 8.0}]}, ": rule 1: bits must be a whole number, not 8.0"),
        ({"rule": [{"scheme": "fp8", "bits": True}]}, ": rule 1: bits must be a whole number, not true"),
        ({"rule": [{"scheme": "fp8", "bits": "8"}]}, ': rule 1: bits must be a whole number, not "8"'),
        ({"rule": [{"scheme": "fp8", "bits": 0}]}, ": rule 1: bits must be a whole number >= 1, not 0"),
        ({"rule": [{"scheme": "fp8", "bits": -(1 << 20000)}]}, ": rule 1: bits must be a whole number >= 1, not a whole number"),
        ({"rule": [{"scheme": "fp8", "layers": [0, 1.5]}]}, ": rule 1: layers, entry 2 must be a whole number, not 1.5"),
        ({"rule": [{"scheme": "fp8", "layers": "all"}]}, ': rule 1: layers must be a list or null, not "all"'),
        ({"rule": [{"scheme": "fp8", "error": math.nan}]}, ": rule 1: error must be a number, not NaN"),
        ({"rule": [{"scheme": "int4", "bits": 8}]}, ": rule 1: int4 has 4 bits: write 4 - at `$.bits`"),
        (file(sizes={"a": {"b": 1, "c": "2"}}), ': sizes["a"]["c"] must be a whole number, not "2"'),
        (file(by_name={"a": {"scheme": "fp8"}, "b": {"bits": 4}}), ': by_name["b"]: scheme is missing'),
        (file(by_name={"a": {"scheme": "fp8"}, "b": {"scheme": 4}}), ': by_name["b"].scheme is 4: choose one of int4, fp8'),
        (file(errors={"a": 1, "b": math.inf}), ': errors["b"] must be a number, not Infinity'),
        (file(pair=[1, 2]), ": pair, entry 2 must be text, not 2"),
        (file(pair=[1]), ": pair must be a list of length 2, not of length 1"),
        (file(change={"factor": 2}), ": change: kind is missing"),
        (file(change={"kind": "scales"}), ': change.kind is "scales": did you mean "scale"?'),
        (file(change={"kind": "shift", "factor": 2}), ': change: unknown field "factor": choose one of kind, offset'),
        (file(change="x" * 99), f': change must be an object or null, not "{"x" * 36}...'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(value: Any, message: str) -> None:
    with pytest.raises(InvalidField) as caught:
        decode(value, File, "f.json")
    assert str(caught.value) == f"f.json{message}"


@pytest.mark.parametrize("name", ["a` - at `$.rule[7]", "a` - at `$.rule[0]", "\n", "\x1b[31m", "\ud800", "a" * 9000])
def test_a_field_of_any_name_is_refused_in_one_printable_line(name: str) -> None:
    for value in (file(**{name: 1}), {"rule": [{name: 1, "scheme": "int4"}]}, {"rule": [{"scheme": name}]}):
        with pytest.raises(InvalidField) as caught:
            decode(value, File, "f.json")
        assert str(caught.value).isprintable()
        assert json.dumps(name)[:30] in str(caught.value)
        assert len(str(caught.value)) < 150
