"""TextTokenizer against Meta's tokenizer, from both layouts, and its streams against its own decode."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama_models.llama4 import tokenizer as meta_tokenizer
from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer
from tokenizers import Tokenizer, decoders, models

from llama4_convert.errors import BadInput
from llama4_convert.metadata.tokenizer import SPECIAL_TOKENS, tokenizer_files
from llama4_convert.reference.tokenization import TextTokenizer
from tests.support import meta_model

MODEL = Path(meta_tokenizer.__file__).parent / "tokenizer.model"
META = MetaTokenizer.get_instance()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transformers' layout."""
    path = tmp_path_factory.mktemp("transformers")
    files = tokenizer_files(MODEL.read_bytes(), variant="instruct", vision=True, max_length=1_048_576)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture(scope="module")
def real(directory: Path) -> TextTokenizer:
    return TextTokenizer.open(directory)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Meta's layout, a vocabulary that is mostly single bytes: characters are spread over tokens."""
    path = tmp_path_factory.mktemp("small")
    meta_model.write_tokenizer(path / "tokenizer.model")
    return TextTokenizer.open(path)


TEXTS = [
    "",
    " ",
    "The quick brown fox's 12345 jumps\n\n over\t\tthe lazy dog…",
    "Zürich, \u4e2d\u6587, 😀👩\u200d👩\u200d👧, e\u0301, \ufffd, \x00, \u2028",
    "\r\n\r\n  x",
    "<|begin_of_text|><|header_start|>user<|header_end|>\n\nhi<|eot|>",
    "<|image|><|patch|> <|reserved_special_token_3|>",
    "<|no_such_token|> <|eot|",
    "it 's a | b",
]


# --- ids ---


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_metas(real: TextTokenizer, text: str) -> None:
    assert real.encode(text) == META.encode(text, bos=False, eos=False, allowed_special="all")
    assert real.encode(text, allow_special=False) == META.encode(text, bos=False, eos=False)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cn",))))  # engines may differ on what is not yet assigned
@example(text="a\ud800b \ude00\ud83d")
def test_ids_of_any_text_are_metas_lone_surrogates_included(real: TextTokenizer, text: str) -> None:
    assert real.encode(text) == META.encode(text, bos=False, eos=False, allowed_special="all")


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_the_small_tokenizer_are_metas(small: TextTokenizer, tmp_path: Path, text: str) -> None:
    meta_model.write_tokenizer(tmp_path / "tokenizer.model")
    meta = MetaTokenizer(tmp_path / "tokenizer.model")
    ids = small.encode(text)
    assert ids == meta.encode(text, bos=False, eos=False, allowed_special="all")
    assert small.decode(ids, skip_special=False) == meta.decode(ids) == text


def test_both_layouts_are_one_tokenizer(real: TextTokenizer) -> None:
    meta_layout = TextTokenizer.open(MODEL.parent)
    for text in TEXTS:
        assert meta_layout.encode(text) == real.encode(text)
        assert meta_layout.decode(real.encode(text)) == real.decode(real.encode(text))


def test_special_tokens_are_metas(real: TextTokenizer) -> None:
    assert {name: real.special(name) for name in SPECIAL_TOKENS} == META.special_tokens


@pytest.mark.parametrize("name", ["<|no_such_token|>", "eot", "a", ""])
def test_a_name_that_is_no_special_token_is_refused(real: TextTokenizer, name: str) -> None:
    with pytest.raises(ValueError, match="no special token"):
        real.special(name)


def test_a_file_that_truncates_and_pads_encodes_whole_texts(small_json: dict[str, Any], tmp_path: Path) -> None:
    small_json["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    small_json["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_json))
    assert TextTokenizer.open(tmp_path).encode("abcd") == list(b"abcd")


def test_threads_do_not_change_each_others_reading_of_special_tokens(
    small: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        """A library that lets other threads run before it looks at its setting."""

        encode_special_tokens = False

        def encode(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
            time.sleep(0.01)
            return SimpleNamespace(ids=[not self.encode_special_tokens])

    monkeypatch.setattr(small, "_tokenizer", Slow())
    asked = [True, False] * 8
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda allow: small.encode("", allow_special=allow), asked))
    assert answers == [[allow] for allow in asked]


# --- text ---


def test_decoding_is_metas_for_any_ids_even_where_they_are_no_utf8(real: TextTokenizer) -> None:
    rng = random.Random(0)
    for _ in range(2_000):
        ids = [rng.choice([rng.randrange(300), rng.randrange(META.n_words)]) for _ in range(rng.randrange(12))]
        assert real.decode(ids, skip_special=False) == META.decode(ids)
        plain = [i for i in ids if i < 200_000]
        assert real.decode(ids) == META.decode(plain)


@pytest.mark.parametrize("token_id", [-1, 202_048, 2**40])
def test_an_id_without_a_token_is_refused(real: TextTokenizer, token_id: int) -> None:
    with pytest.raises(ValueError, match=f"no token {token_id}"):
        real.decode([5, token_id])
    with pytest.raises(ValueError, match=f"no token {token_id}"):
        real.stream().push(token_id)


def test_a_token_added_to_the_vocabulary_is_spelt_as_it_reads(small_json: dict[str, Any], tmp_path: Path) -> None:
    """The characters of "éé" are of the byte-level alphabet too, where they stand for bytes that are no text."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    small_json["added_tokens"] += [
        {"id": meta_model.VOCAB_SIZE + i, "content": content, **flags} for i, content in enumerate(("éé", "\u4e2d b"))
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_json))
    tokenizer = TextTokenizer.open(tmp_path)
    ids = tokenizer.encode("aéé\u4e2d b")
    assert ids == [ord("a"), meta_model.VOCAB_SIZE, meta_model.VOCAB_SIZE + 1]
    assert tokenizer.decode(ids) == "aéé\u4e2d b"
    with pytest.raises(ValueError, match="no special token éé"):
        tokenizer.special("éé")


# --- streams ---


def test_a_character_comes_when_its_last_byte_does(small: TextTokenizer) -> None:
    stream = small.stream()
    assert [stream.push(i) for i in small.encode("a😀é")] == ["a", "", "", "", "😀", "", "é"]
    assert stream.finish() == ""


def test_what_cannot_become_a_character_is_not_held_back(small: TextTokenizer) -> None:
    stream = small.stream()
    assert [stream.push(i) for i in (0xF0, 0x9F, ord("a"), 0xFF, 0xC3)] == ["", "", "\ufffda", "\ufffd", ""]
    assert stream.finish() == "\ufffd"
    assert stream.push(ord("b")) == "b"  # used anew
    assert stream.finish() == ""


def test_a_replacement_character_that_was_written_is_not_held_back(real: TextTokenizer) -> None:
    stream = real.stream()
    assert "".join(stream.push(i) for i in real.encode("x \ufffd")) == "x \ufffd"


def test_special_tokens_pass_a_stream_as_asked(real: TextTokenizer) -> None:
    ids = real.encode("a<|eot|>b")
    for skip, expected in ((True, ["a", "", "b"]), (False, ["a", "<|eot|>", "b"])):
        stream = real.stream(skip_special=skip)
        assert [stream.push(i) for i in ids] == expected


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, meta_model.VOCAB_SIZE - 1)), skip=st.booleans())
def test_a_stream_adds_up_to_decode(small: TextTokenizer, ids: list[int], skip: bool) -> None:
    stream = small.stream(skip)
    assert "".join([stream.push(i) for i in ids] + [stream.finish()]) == small.decode(ids, skip)


# --- what cannot be opened ---


@pytest.fixture
def small_json(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("json") / "tokenizer.model"
    meta_model.write_tokenizer(path)
    content = tokenizer_files(path.read_bytes(), variant="base", vision=False, max_length=1)["tokenizer.json"]
    loaded: dict[str, Any] = json.loads(content)
    return loaded


def refusal(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        TextTokenizer.open(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    assert "neither tokenizer.json nor tokenizer.model" in refusal(tmp_path)
    assert "neither tokenizer.json nor tokenizer.model" in refusal(tmp_path / "nowhere")


Damage = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"null",
        lambda data: b"\xff" + data,
        lambda data: data[: len(data) // 2],
        lambda data: b'{"version": "1.0"}',
        lambda data: data.replace(b'"merges":[', b'"merges":[["no","such"],'),
    ],
)
def test_a_damaged_tokenizer_json_is_refused(small_json: dict[str, Any], tmp_path: Path, damage: Damage) -> None:
    data = json.dumps(small_json, separators=(",", ":")).encode()
    assert damage(data) != data
    (tmp_path / "tokenizer.json").write_bytes(damage(data))
    assert "fetch it again from where it comes" in refusal(tmp_path)


def test_a_damaged_tokenizer_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(MODEL.read_bytes()[:1_000])
    assert "tokenizer.model" in refusal(tmp_path)


@pytest.mark.parametrize(("token", "decoder"), [("a", decoders.WordPiece()), ("a b", decoders.ByteLevel())])
def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path, token: str, decoder: Any) -> None:
    tokenizer = Tokenizer(models.WordLevel({token: 0}, unk_token=token))
    tokenizer.decoder = decoder
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert "do not stand for bytes" in refusal(tmp_path)


def test_a_directory_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(BadInput, match=r"tokenizer\.json is no file"):
        TextTokenizer.open(tmp_path)
