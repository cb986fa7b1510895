"""Work is bounded by what input becomes, not by its bytes: refused before memory is taken."""

from __future__ import annotations

import base64
import itertools
import os
import struct
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from llama4_convert import synth
from llama4_convert.checkpoints.inert_pickle import RefusedPickle, read_state_dict
from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.checkpoints.safetensors_header import read_header
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import parse_json, parse_object
from llama4_convert.metadata.tokenizer import read_bpe, tokenizer_model
from llama4_convert.reference import generation
from llama4_convert.reference.tokenization import TextTokenizer
from llama4_convert.validation.parity.prompts import prompts_of_ids


@pytest.mark.parametrize("item", ["0", "{}", "[[[1]]]", '"a"'])
def test_json_has_so_many_values(item: str) -> None:
    with pytest.raises(ValueError, match="more than 800,000 values"):
        parse_json("[" + ",".join([item] * 800_001) + "]")
    assert len(parse_json("[" + ",".join([item] * 100_000) + "]")) == 100_000


def test_json_has_so_many_bytes() -> None:
    with pytest.raises(BadInput, match=r"x.json is not valid JSON \(more than 24 MiB\)"):
        parse_object(b'{"a": "' + b"a" * (24 << 20) + b'"}', "x.json")


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_json_has_no_number_that_is_not_finite(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is no number of JSON's"):
        parse_json(f'{{"a": [1, {name}]}}')


def test_a_pickle_has_so_many_opcodes() -> None:
    with pytest.raises(RefusedPickle, match="more than 1,500,000 opcodes"):
        read_state_dict(b"\x80\x02](" + b"}" * 1_500_000 + b"e.")


def test_keys_that_all_collide_are_refused() -> None:
    key = b"\x8a\x0b" + ((2**61 - 1) * 5).to_bytes(11, "little")
    with pytest.raises(RefusedPickle, match="neither text nor a number"):
        read_state_dict(b"\x80\x02}(" + key + b"Nu.")


def test_a_zip_directory_is_not_read_before_its_size_is_known(tmp_path: Path) -> None:
    size = 1 << 30
    with open(tmp_path / "x.pth", "wb") as file:
        file.truncate(size)
        file.write(b"PK\3\4")
        file.seek(size - 1000)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1000, 1000, size - 1000 - 100, 100))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, size - 1000, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
        file.truncate()
    with pytest.raises(BadInput, match=r"its directory has [\d,]+ bytes"):
        PthIndex.read(tmp_path / "x.pth")


def test_an_archive_has_so_many_records_beside_its_tensors(tmp_path: Path) -> None:
    synth(tmp_path / "source", tiny=True, layers=1, experts=2, ranks=1)
    path = tmp_path / "source" / "consolidated.00.pth"
    with zipfile.ZipFile(path, "a") as archive:
        prefix = archive.namelist()[0].partition("/")[0]
        for number in range(101):
            archive.writestr(f"{prefix}/{number}", b"")
    with pytest.raises(BadInput, match="records beside its tensors"):
        PthIndex.read(path)


def test_a_safetensors_header_has_so_many_values(tmp_path: Path) -> None:
    entry = '":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(f'"{i}{entry}' for i in range(150_000)) + "}").encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BadInput, match="more than 800,000 values"):
        read_header(tmp_path / "x.safetensors")


def test_a_tokenizer_has_so_many_tokens() -> None:
    with pytest.raises(BadInput, match="more than 1,000,000 lines"):
        read_bpe(b"\n" * 1_000_001)
    with pytest.raises(BadInput, match="too many tokens"):
        tokenizer_model(b"[0" + b",0" * 3_000_001 + b"]")
    tokens = [bytes(pair) for pair in itertools.product(b"ab", repeat=2)]
    lines = [bytes([byte]) for byte in range(256)] + tokens
    assert len(read_bpe(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(lines)))) == 260


def test_a_picture_has_so_many_pixels_and_no_program(tmp_path: Path) -> None:
    Image.new("1", (6000, 6000)).save(tmp_path / "large.png")
    (tmp_path / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(BadInput, match="6,000 x 6,000 pixels"):
        generation.open_image(tmp_path / "large.png")
    with pytest.raises(BadInput, match="no image that can be read"):
        generation.open_image(tmp_path / "program.eps")


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(BadInput):
        TextTokenizer.open(tmp_path)
    with pytest.raises(BadInput, match="no regular file"):
        generation.open_image(tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match="no regular file"):
        prompts_of_ids(tmp_path / "tokenizer.json")
