"""Known attacks on safetensors headers and on the index beside them: refused in one line, and nothing outside is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama4_convert.checkpoints.safetensors_header import read_header
from llama4_convert.errors import BadInput
from tests.support import commands

DATA = bytes(range(16))


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def written(folder: Path, header: str | bytes, data: bytes = DATA, length: int | None = None) -> Path:
    raw = header.encode() if isinstance(header, str) else header
    path = folder / "model.safetensors"
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def test_the_header_by_hand_is_a_good_one(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": entry(0, 6), "b": entry(6, 16, [5], "BF16")})
    assert {key: t.nbytes for key, t in read_header(written(tmp_path, header)).items()} == {"a": 6, "b": 10}


HEADERS: dict[str, str | bytes] = {
    "duplicate keys": f'{{"a": {json.dumps(entry(0, 8))}, "a": {json.dumps(entry(8, 16))}}}',
    "overlap": json.dumps({"a": entry(0, 10), "b": entry(6, 16)}),
    "one range twice": json.dumps({"a": entry(0, 16), "b": entry(0, 16)}),
    "hole": json.dumps({"a": entry(0, 6), "b": entry(8, 16)}),
    "hole in front": json.dumps({"a": entry(2, 16)}),
    "bytes that no tensor has": json.dumps({"a": entry(0, 8)}),
    "beyond the end": json.dumps({"a": entry(0, 1 << 20)}),
    "backwards": json.dumps({"a": entry(16, 0, [16])}),
    "negative": json.dumps({"a": entry(-8, 8, [16]), "b": entry(8, 16)}),
    "a shape that overflows": json.dumps({"a": entry(0, 16, [1 << 32, 1 << 32])}),
    "a shape that overflows to the right size": json.dumps({"a": entry(0, 16, [(1 << 64) + 16])}),
    "a negative shape": json.dumps({"a": entry(0, 16, [-4, -4])}),
    "a shape of floats": json.dumps({"a": entry(0, 16, [16.0])}),
    "a shape of true": json.dumps({"a": entry(0, 1, [True]), "b": entry(1, 16)}),
    "an unknown dtype": json.dumps({"a": entry(0, 16, dtype="X9")}),
    "a dtype that is a list": json.dumps({"a": entry(0, 16, dtype=["U8"])}),
    "offsets that are text": json.dumps({"a": {**entry(0, 16), "data_offsets": ["0", "16"]}}),
    "three offsets": json.dumps({"a": {**entry(0, 16), "data_offsets": [0, 8, 16]}}),
    "no object": "[]",
    "no JSON": "{",
    "not UTF-8": b'{"a\xff": 0}',
    "more dimensions than any reader has": json.dumps({"a": entry(0, 16, [16, *[1] * 64])}),
    "sizes that only an empty one hides": json.dumps(
        {"a": entry(0, 16), "b": entry(16, 16, [0, *[1 << 62] * 100_000])}
    ),
    "numbers as notes": json.dumps({"__metadata__": {"step": 3}, "a": entry(0, 16)}),
    "one name, one range": f'{{"a": {json.dumps(entry(0, 16))}, "a": {json.dumps(entry(0, 16))}}}',
    "deeper than any reader goes": '{"a":' * 100_000,
    "NaN": '{"a": NaN}',
}


@pytest.mark.parametrize("attack", HEADERS)
def test_headers(attack: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        read_header(written(tmp_path, HEADERS[attack]))


@pytest.mark.parametrize("length", [0, 1, 1 << 40, (1 << 64) - 1])
def test_lengths_that_lie(length: int, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no safetensors file, or it is cut off"):
        read_header(written(tmp_path, json.dumps({"a": entry(0, 16)}), length=length))


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "..", "", "x\n.safetensors", "\x00"],
)
@pytest.mark.parametrize("command", ["inspect", "quantize", "export"])
def test_an_index_that_points_outside(
    name: str, command: str, converted: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = commands.copy(converted("guard"), tmp_path / "source")
    (tmp_path / "outside.safetensors").write_bytes(next(source.glob("*.safetensors")).read_bytes())
    index = source / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    body["weight_map"] = dict.fromkeys(body["weight_map"], name)
    index.write_text(json.dumps(body))
    before = commands.times(tmp_path)
    arguments: dict[str, list[Any]] = {
        "inspect": ["inspect", source],
        "quantize": ["convert", source, tmp_path / "out", "--recipe", "nf4"],
        "export": ["export", source, tmp_path / "out"],
    }
    outcome = commands.run(capsys, *arguments[command])
    assert outcome.code == 3
    assert "names a file that is not in the directory" in outcome.error
    after = commands.times(tmp_path)
    after.pop("."), before.pop(".")  # an output directory was made, and removed again
    assert after == before
