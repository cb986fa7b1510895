"""tokenizer_files against Meta's own tokenizer, on the tokenizer.model that Meta publishes."""

from __future__ import annotations

import base64
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.llama4 import tokenizer as meta_tokenizer
from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llama4_convert.errors import BadInput, UsageError
from llama4_convert.metadata.tokenizer import (
    MAX_MODEL_BYTES,
    MAX_TOKEN_BYTES,
    N_SPECIAL,
    SPECIAL_TOKENS,
    WORD_PATTERN,
    TokenIds,
    read_bpe,
    tokenizer_files,
)

MODEL = Path(meta_tokenizer.__file__).parent / "tokenizer.model"
META = MetaTokenizer.get_instance()
N_BASE = 200_000


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return tokenizer_files(MODEL.read_bytes(), variant="instruct", vision=True, max_length=1_048_576)


@pytest.fixture(scope="module")
def plain(files: dict[str, bytes]) -> Tokenizer:
    """Ours, with text that spells a special token kept as text: what Meta's encode does unless told otherwise."""
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    tokenizer.encode_special_tokens = True
    return tokenizer


def assert_same(ours: Tokenizer, texts: list[str]) -> None:
    encodings = ours.encode_batch(texts)
    different = [t for t, e in zip(texts, encodings, strict=True) if e.ids != META.encode(t, bos=True, eos=False)]
    assert different == []


# --- the same ids as Meta's encode ---


def code_points() -> list[str]:
    return [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]


@pytest.mark.parametrize("between", ["a", "A ", "'", "1", " "])
def test_every_code_point_of_unicode(plain: Tokenizer, between: str) -> None:
    every = code_points()
    step = 1 if between == "a" else 13  # all of them once, then a sample
    every = every[::step]
    assert_same(plain, [between.join(every[i : i + 256]) for i in range(0, len(every), 256)])


def test_every_token_of_the_vocabulary(plain: Tokenizer) -> None:
    for token, rank in read_bpe(MODEL.read_bytes()).items():
        try:
            text = token.decode()
        except UnicodeDecodeError:  # a part of a character
            assert plain.decode([rank]) == META.decode([rank])
            continue
        assert plain.decode([rank]) == text
        assert plain.encode(text).ids == META.encode(text, bos=True, eos=False)


ALPHABETS = [
    *("ab", "aA", "a ", "a\n", " \n\r\t", "ha ", "\r\n/", "x/\n!", "- ", "=-_*#/", "01a", "0\u0661²½"),  # runs
    *(
        "'s",
        "'\u2019ve re",
        "'sS\u017ftTdD",
        "'lLkK\u212a",
        "ß\u017fs'ﬆ",
        "aǅʰª中́A",
    ),  # contractions, and letters that fold to ASCII
    *("é\u0301e\u0300", "\u00a0 \u3000\u2028\u0085\u200b", "\x00\x01a", "\U0001f469\u200d\U0001f680\ufe0f"),
    *(
        "ああア",
        "한국어 가나",
        "नमस्ते ",
        "สวัสดีครับ",
        "שלום ",
        "مرحبا ",
        "Привет, мир",
        "𝒜𝔸𞤀𐐀",
        "\ud7ff\ue000\uffff\U0010ffff",
    ),
]


def random_texts(seed: int, count: int) -> Iterator[str]:
    rng = random.Random(seed)
    tokens = list(read_bpe(MODEL.read_bytes()))
    for _ in range(count):
        length = rng.choice([1, 2, 3, 5, 8, 20, 60])
        match rng.randrange(4):
            case 0:
                alphabet = rng.choice(ALPHABETS)
                yield "".join(rng.choice(alphabet) * rng.choice([1, 1, 1, 2, 3, 7, 20]) for _ in range(length))
            case 1:
                yield "".join(rng.choice("".join(ALPHABETS)) for _ in range(length))
            case 2:
                yield b"".join(rng.choice(tokens) for _ in range(length)).decode("utf-8", "ignore")
            case _:
                start = rng.randrange(0x20, 0x1FB00)  # characters of one neighbourhood, with spaces and signs
                codes = [start + rng.randrange(100) for _ in range(length)]
                yield "".join(rng.choice([chr(c), chr(c), " ", "'", "\n"]) for c in codes if not 0xD800 <= c < 0xE000)


def test_twenty_thousand_random_texts(plain: Tokenizer) -> None:
    assert_same(plain, list(random_texts(seed=0, count=20_000)))


@settings(deadline=None, max_examples=300)
@given(text=st.text())
def test_any_text(plain: Tokenizer, text: str) -> None:
    assert_same(plain, [text])


@pytest.mark.parametrize("piece", [" ", "a", "\n", "ab", " a", "…", "A", "0", "\u3042"])
def test_runs_just_below_the_length_at_which_meta_cuts(plain: Tokenizer, piece: str) -> None:
    assert_same(plain, [piece * (meta_tokenizer.MAX_NO_WHITESPACES_CHARS // len(piece))])


@st.composite
def vocabularies(draw: st.DrawFn) -> list[bytes]:
    """The 256 bytes and words over {a, b} in any order: ranks that no training would give."""
    words = draw(st.sets(st.text("ab", min_size=2, max_size=6), min_size=1, max_size=20))
    return draw(st.permutations([bytes([b]) for b in range(256)])) + draw(st.permutations([w.encode() for w in words]))


@settings(deadline=None, max_examples=40)
@given(tokens=vocabularies(), texts=st.lists(st.text("ab", max_size=24), min_size=1, max_size=40))
def test_one_merge_a_token_is_enough_for_any_ranks(tokens: list[bytes], texts: list[str]) -> None:
    encoding = tiktoken.Encoding(
        "any", pat_str=WORD_PATTERN, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={}
    )
    files = tokenizer_files(model_file(tokens), variant="base", vision=False, max_length=1)
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in texts:
        assert ours.encode(text, add_special_tokens=False).ids == encoding.encode_ordinary(text)


# --- special tokens ---


def test_special_tokens_are_metas_in_metas_order() -> None:
    assert {token: N_BASE + i for i, token in enumerate(SPECIAL_TOKENS)} == META.special_tokens
    assert len(SPECIAL_TOKENS) == N_SPECIAL == 2048


def test_text_that_spells_special_tokens_becomes_them(files: dict[str, bytes]) -> None:
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert [ours.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(N_BASE, N_BASE + N_SPECIAL))
    for glue in ("", " ", "a", "\n", "<|"):
        for i in range(0, N_SPECIAL, 256):  # all at once would be longer than Meta encodes uncut
            text = glue.join(SPECIAL_TOKENS[i : i + 256])
            assert ours.encode(text).ids == META.encode(text, bos=True, eos=False, allowed_special="all")


def test_token_ids_are_metas() -> None:
    ids = TokenIds.from_base(N_BASE)
    assert (ids.bos, ids.eos, ids.eom, ids.eot) == (META.bos_id, META.eos_id, META.eom_id, META.eot_id)
    assert (ids.pad, ids.vocab_size) == (META.pad_id, META.n_words)
    assert (ids.boi, ids.eoi, ids.image, ids.patch) == (200_080, 200_081, 200_090, 200_092)
    assert META.decode([ids.header_start, ids.header_end]) == "<|header_start|><|header_end|>"
    assert META.decode([ids.python_start, ids.python_end]) == "<|python_start|><|python_end|>"
    assert META.decode([ids.tile_x, ids.tile_y]) == "<|tile_x_separator|><|tile_y_separator|>"
    assert ids.stop_ids("instruct") == ids.stop_ids("guard") == META.stop_tokens
    assert ids.stop_ids("base") == [META.eos_id]


# --- the files ---


@pytest.mark.parametrize("with_config", [False, True])
def test_auto_tokenizer_reads_the_directory(files: dict[str, bytes], tmp_path: Path, with_config: bool) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    if with_config:
        (tmp_path / "config.json").write_text('{"model_type": "llama4"}')
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(ours), ours.model_max_length, ours.padding_side) == (META.n_words, 1_048_576, "left")
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (META.bos_id, META.eot_id, META.pad_id)
    assert ours.chat_template == files["chat_template.jinja"].decode()
    assert set(ours("x")) == {"input_ids", "attention_mask"}
    one, two = (META.encode(text, bos=True, eos=False) for text in ("one", " two"))
    assert (ours("one").input_ids, ours("one", " two").input_ids) == (one, one + two)
    for text in random_texts(seed=1, count=500):
        ids = META.encode(text, bos=True, eos=False)
        assert ours(text).input_ids == ids
        assert ours.decode(ids, skip_special_tokens=True) == text
    spaced = "it 's , \n , n't  <|eot|> !"
    assert ours.decode(ours.encode(spaced, add_special_tokens=False)) == spaced  # no clean-up


def test_what_each_variant_gets() -> None:
    def built(variant: str, vision: bool) -> tuple[dict[str, bytes], dict[str, object]]:
        files = tokenizer_files(model_file(BYTES), variant=variant, vision=vision, max_length=8192)
        return files, json.loads(files["tokenizer_config.json"])

    always = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    for variant, vision, eos in [("base", False, "end_of_text"), ("instruct", True, "eot"), ("guard", False, "eot")]:
        files, config = built(variant, vision)
        assert set(files) == always | (set() if variant == "base" else {"chat_template.jinja"})
        assert config["eos_token"] == json.loads(files["special_tokens_map.json"])["eos_token"] == f"<|{eos}|>"
        assert config.get("processor_class") == ("Llama4Processor" if vision else None)
        assert config.get("chat_template", "").encode() == files.get("chat_template.jinja", b"")


def test_it_is_what_the_library_would_write(files: dict[str, bytes]) -> None:
    """Tokens and merges are written by us: the library reads them and writes the same bytes again."""
    assert Tokenizer.from_buffer(files["tokenizer.json"]).to_str().encode() == files["tokenizer.json"]


def test_an_unknown_variant_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="choose one of base, instruct, guard"):
        tokenizer_files(MODEL.read_bytes(), variant="chat", vision=False, max_length=1)


FRESH = """
import hashlib, re, sys, time
from llama4_convert.metadata.tokenizer import tokenizer_files

def peak():  # of this program alone: getrusage would start at the peak of the process that started it
    return int(re.search("VmHWM:\\s+([0-9]+) kB", open("/proc/self/status").read())[1]) / 1024

before, start = peak(), time.process_time()
files = tokenizer_files(open(sys.argv[1], "rb").read(), variant="instruct", vision=True, max_length=1_048_576)
seconds, megabytes = time.process_time() - start, peak() - before
digest = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
print(megabytes, seconds, digest, "torch" in sys.modules, "transformers" in sys.modules)
"""


def test_a_fresh_process_needs_little_and_writes_the_same_bytes(files: dict[str, bytes]) -> None:
    import hashlib

    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", FRESH, str(MODEL)]
    out = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split()
    assert 30 < float(out[0]) < 110  # MiB; about 80
    assert float(out[1]) < 100  # of the processor, about 3 s
    assert out[2] == hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
    assert out[3:] == ["False", "False"]


# --- a tokenizer.model that nobody vouches for ---


def model_file(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


BYTES = [bytes([b]) for b in range(256)]


def with_line(line: bytes) -> Callable[[], bytes]:
    return lambda: model_file(BYTES) + line


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: b"", "256 of 256 single bytes have no token"),
        (lambda: model_file(BYTES[:65] + BYTES[66:]), "1 of 256 single bytes have no token, 0x41 first"),
        (lambda: MODEL.read_bytes()[: 1 << 20], "line 6"),  # cut short, in the middle of a line
        (with_line(b"YWI=\n"), "line 257: not `base64 rank`"),
        (with_line(b"YWI= 256 0\n"), "line 257: not `base64 rank`"),
        (with_line(b"YWI= -1\n"), "line 257: not `base64 rank`"),
        (with_line(b"YWI= 2_5_6\n"), "line 257: not `base64 rank`"),
        (with_line("YWI= ٢٥٦\n".encode()), "line 257: not `base64 rank`"),
        (with_line(b"YWI 256\n"), "line 257: the token is not base64"),
        (with_line(b"Y*I= 256\n"), "line 257: the token is not base64"),
        (with_line("ÿÿÿÿ 256\n".encode()), "line 257: the token is not base64"),
        (with_line(b"YWI= 256\nYWI= 257\n"), "line 258: the token of rank 256 once more"),
        (with_line(b"YWI= 255\n"), "line 257: rank 255 again after line 256"),
        (with_line(b"YWI= 257\n"), "line 257: rank 257 of 257 tokens, while rank 256 is missing"),
        (with_line(b"YWI= " + b"9" * 900 + b"\n"), "while rank 256 is missing"),
        (with_line(b"YWI= " + b"9" * 9_000_000 + b"\n"), "line 257: not `base64 rank`"),
        (with_line(b"A" * 9_000_000), "line 257: not `base64 rank`"),
        (with_line(base64.b64encode(b"a" * (MAX_TOKEN_BYTES + 1)) + b" 256"), "line 257: a token of 257 bytes"),
        (with_line(base64.b64encode(b"<|eot|>") + b" 256"), r"line 257: a special token \(<\|eot\|>\)"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "line 1: not `base64 rank`"),
        (lambda: b"\x0a\x09\x0a\x05<unk>\x00" * 99, "line 3: not `base64 rank`"),  # SentencePiece's format
        (lambda: bytes(MAX_MODEL_BYTES + 1), "more than any tokenizer's"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(data: Callable[[], bytes], message: str) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        read_bpe(data())
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 2_000


def test_order_blank_lines_and_line_ends_do_not_matter() -> None:
    lines = MODEL.read_bytes().splitlines()
    assert read_bpe(b"\r\n\r\n".join(reversed(lines))) == read_bpe(MODEL.read_bytes())


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=200), cut=st.integers(0, 2600))
def test_any_bytes_are_read_or_refused(data: bytes, cut: int) -> None:
    whole = model_file(BYTES)
    for candidate in (data, whole[:cut] + data + whole[cut:]):
        try:
            rank_of = read_bpe(candidate)
        except BadInput:
            continue
        assert sorted(rank_of.values()) == list(range(len(rank_of)))


def test_long_tokens_take_bounded_time() -> None:
    """A fiftieth of the largest file, made so that every token takes as many merges as it has bytes."""
    rng = random.Random(0)
    tokens = dict.fromkeys(BYTES)
    while sum(len(token) * 4 // 3 + 8 for token in tokens) < MAX_MODEL_BYTES // 50:
        word = bytes(rng.choices(range(0x80, 0x100), k=MAX_TOKEN_BYTES))
        tokens.update(dict.fromkeys(word[:length] for length in range(2, MAX_TOKEN_BYTES + 1)))
    start = time.process_time()
    tokenizer_files(model_file(list(tokens)), variant="base", vision=False, max_length=1)
    assert time.process_time() - start < 100  # of the processor, about 1 s
