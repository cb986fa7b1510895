"""What the demo's model reads: texts that ship with Python, their byte-pair vocabulary, and batches of tokens."""

from __future__ import annotations

import ast
import html
import re
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random

from llama4_convert.metadata.tokenizer import WORD_PATTERN
from llama4_convert.reference.tokenization import TextTokenizer, byte_of_character
from llama4_convert.samples.synthetic.tokenizer import ranked

N_PLAIN = 2048  # 256 bytes and 1,792 merges
LENGTH, SEQUENCES = 512, 4  # of text, a step

# A twentieth of the 79 topics of Python 3.11: names[18::20] of the sorted names.
HELD_OUT = ("calls", "global", "sequence-types", "yield")
# A file with anyone else's copyright or a licence of its own is left out.
_NOTICE = re.compile(r"copyright|permission (?:is|to) |licen[cs]ed?\b", re.IGNORECASE)
_PSF = re.compile(r"Python Software Foundation|\bPSF\b")
_COMMENTS = re.compile(r"(?:^[ \t]*#.*\n){2,}", re.MULTILINE)
_MARK = re.compile(r"^[ \t]*# ?", re.MULTILINE)


@cache
def texts() -> tuple[list[str], list[str], list[str]]:
    """Topics to learn from, topics held out, and documents of the standard library.

    Topics quote each other: what a held-out topic says is cut from the other texts, paragraph by paragraph.
    """
    from pydoc_data.topics import topics

    held_out = [topics[name] for name in HELD_OUT]
    secret = {_squeezed(paragraph) for text in held_out for paragraph in _paragraphs(text)}

    def without(text: str) -> str:
        return "\n\n".join(p for p in _paragraphs(text) if len(_squeezed(p)) < 30 or _squeezed(p) not in secret)

    open_topics = [without(topics[name]) for name in sorted(topics) if name not in HELD_OUT]
    return open_topics, held_out, [without(text) for text in library_texts()]


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n[ \t]*\n", text)


def _squeezed(paragraph: str) -> str:
    return " ".join(paragraph.split())


def library_texts() -> Iterator[str]:
    """What reads like prose in the standard library, a document a module: docstrings, longer comments, IDLE's help."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if "site-packages" in file.parts:
            continue
        source = file.read_text("utf-8", "replace")
        if any(_NOTICE.search(line) and not _PSF.search(line) for line in source.splitlines()):
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # tests of the compiler
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        comments = [_MARK.sub("", block).strip() for block in _COMMENTS.findall(source)]
        parts = [s for s in strings if len(s) >= 80] + [c for c in comments if len(c) >= 160]
        if parts:
            yield "\n\n".join(parts) + "\n"
    page = library / "idlelib" / "help.html"
    if page.exists():
        yield html.unescape(re.sub(r"<[^>]*>", "", page.read_text("utf-8")))


def tokenizer_model(corpus: Sequence[str]) -> bytes:
    """A byte-pair vocabulary for `corpus` in the format of Meta's tokenizer.model: the bytes, then a token a merge."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=N_PLAIN, initial_alphabet=alphabet, max_token_length=16, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    byte_of = byte_of_character()
    by_rank = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merged = [bytes(byte_of[c] for c in token) for token, _ in by_rank if len(token) > 1]
    tokens = [bytes([value]) for value in range(256)] + merged
    assert len(set(tokens)) == len(tokens) == N_PLAIN
    return ranked(tokens)


class Words:
    """The tokenizer with the tokens that training puts around texts and pictures."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.special("<|begin_of_text|>"), tokenizer.special("<|end_of_text|>")
        self.patch = tokenizer.special("<|patch|>")
        # As Meta's ChatFormat spells an image of one tile.
        spelling = "<|begin_of_text|><|image_start|><|image|>" + "<|patch|>" * 4 + "<|image_end|>"
        self.picture = tokenizer.encode(spelling)

    def document(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, allow_special=False)
        if self.tokenizer.decode(ids) != text:
            raise AssertionError("a text does not survive the tokenizer")
        return [self.bos, *ids, self.eos]


def text_batches(documents: Sequence[Sequence[int]], bos: int, random: Random) -> Iterator[list[list[int]]]:
    """Sequences of bos and LENGTH tokens, without end; documents and sequences are shuffled anew each round."""
    while True:
        stream = [token for document in random.sample(documents, len(documents)) for token in document]
        starts = list(range(0, len(stream) - LENGTH, LENGTH))
        random.shuffle(starts)
        for i in range(0, len(starts) - SEQUENCES + 1, SEQUENCES):
            yield [[bos, *stream[start : start + LENGTH]] for start in starts[i : i + SEQUENCES]]
