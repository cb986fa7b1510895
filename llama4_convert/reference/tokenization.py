"""Text to token ids and back, from either layout: a Transformers directory or Meta's.

Ids are those of Meta's `Tokenizer` (llama-models, `llama4/tokenizer.py`) below the lengths at which Meta's code cuts a text
(`llama4_convert/metadata/tokenizer.py` says which). Decoding goes by bytes: each token stands for some, and the bytes of all
tokens together are read as UTF-8. A character may be spread over tokens, so ids that are decoded one at a time leave it
incomplete for a while; `TextTokenizer.stream` holds it back until it is whole. The library's own `DecodeStream` judges by the
text instead: it also holds back a U+FFFD that was really written, and bytes that will never make a character, for good.
"""

from __future__ import annotations

import codecs
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4_convert.checkpoints.manifest import make_again
from llama4_convert.errors import BadInput, one_line
from llama4_convert.files import read_small
from llama4_convert.metadata.tokenizer import read_bpe, tokenizer_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TRANSFORMERS_FILE = "tokenizer.json"
_META_FILE = "tokenizer.model"
_PROBES = 500  # texts that two tokenizers are tried on


class TextTokenizer:
    """A byte-level tokenizer; `open` reads one. May be shared by threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes over `tokenizer`, which must be byte-level. Raises BadInput if it is not."""
        from tokenizers import decoders

        self._byte_of = byte_of_character()
        characters = set().union(*tokenizer.get_vocab(with_added_tokens=False))
        if not isinstance(tokenizer.decoder, decoders.ByteLevel) or not characters <= self._byte_of.keys():
            raise BadInput("its tokens do not stand for bytes, as Llama 4's do; use the model's own tokenizer")
        # Some files cut or fill up what they encode, for batches in training. A prompt is taken as it is.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._added = tokenizer.get_added_tokens_decoder()
        self._special = {added.content: token_id for token_id, added in self._added.items() if added.special}

    @staticmethod
    def open(path: Path) -> TextTokenizer:
        """The tokenizer of a directory: its tokenizer.json or else its tokenizer.model, which takes some seconds more.

        Raises BadInput if it has neither or the file is damaged, EnvironmentFailed if the file cannot be read.
        """
        from tokenizers import Tokenizer

        data = _read(path / _TRANSFORMERS_FILE)
        if data is None:
            model = _read(path / _META_FILE)
            if model is None:
                raise BadInput(
                    f"{path}: neither {_TRANSFORMERS_FILE} nor {_META_FILE}; name a model's directory, of Meta's layout or "
                    "Transformers'"
                )
            try:
                data = tokenizer_json(read_bpe(model))
            except BadInput as error:
                raise BadInput(f"{path}: {error}") from None
        try:
            return TextTokenizer(Tokenizer.from_buffer(data))
        except ValueError as error:
            reason = one_line(str(error).removeprefix("Cannot instantiate Tokenizer from buffer: "), 120)
            raise BadInput(f"{path / _TRANSFORMERS_FILE}: {reason}; {make_again(path)}") from None
        except BadInput as error:
            raise BadInput(f"{path / _TRANSFORMERS_FILE}: {error}") from None

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """The ids of `text`, with nothing put in front or behind.

        Text that spells a special token becomes that token, as with Meta's `allowed_special="all"`. With `allow_special`
        off it stays text, as Meta's `encode` does by default: right for text that others wrote, which must not be able to
        end its turn and begin another. A lone surrogate, which no UTF-8 can hold, becomes U+FFFD.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with self._lock:  # the library keeps the choice as a setting, not as an argument
            self._tokenizer.encode_special_tokens = not allow_special
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Raises ValueError for an id without a token."""
        return b"".join(self._bytes(token_id, skip_special) for token_id in ids).decode("utf-8", "replace")

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder for ids that come one at a time."""
        return TextStream(self, skip_special)

    def special(self, name: str) -> int:
        """The id of a special token by its spelling, `<|image_start|>`. Raises ValueError if there is none."""
        if name not in self._special:
            raise ValueError(f"the tokenizer has no special token {name}")
        return self._special[name]

    def first_difference(self, other: TextTokenizer) -> tuple[str, Any] | None:
        """What the first token of the base vocabulary that is not `other`'s should be, and is there; or a text and its ids."""
        ours, theirs = (one._tokenizer.get_vocab(with_added_tokens=False) for one in (self, other))
        token_of = {token_id: token for token, token_id in theirs.items()}
        for token, token_id in sorted(ours.items(), key=lambda item: item[1]):
            if token_of.get(token_id) != token:
                return f"token {token_id}: {token!r}", token_of.get(token_id)
        for token in sorted(ours)[:: max(1, len(ours) // _PROBES)]:  # equal tokens may be merged in another order
            text = bytes(self._byte_of[character] for character in token).decode("utf-8", "replace")
            expected, found = self.encode(text), other.encode(text)
            if expected != found:
                return f"{text!r}: {expected}", found
        return None

    def _bytes(self, token_id: int, skip_special: bool) -> bytes:
        if added := self._added.get(token_id):
            return b"" if added.special and skip_special else added.content.encode()
        try:
            token = self._tokenizer.id_to_token(token_id)
        except OverflowError:  # negative, or beyond 32 bits
            token = None
        if token is None:
            raise ValueError(f"the tokenizer has no token {token_id}")
        return bytes(self._byte_of[character] for character in token)


class TextStream:
    """Text from ids, one at a time: what `push` and at last `finish` return is together what `decode` returns."""

    def __init__(self, tokenizer: TextTokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes: empty inside a character. Raises ValueError for an id without a token."""
        return self._utf8.decode(self._tokenizer._bytes(token_id, self._skip_special))

    def finish(self) -> str:
        """U+FFFD if the ids ended inside a character, else nothing. The stream can then be used anew."""
        return self._utf8.decode(b"", final=True)


def _read(path: Path) -> bytes | None:
    """The content of a file; None if there is none."""
    return read_small(path) if os.path.lexists(path) else None


def byte_of_character() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet stands for.

    A printable Latin-1 character is its own byte. The others, from U+0100 on, are given out in order to the bytes left.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    byte_of = {character: ord(character) for character in alphabet if ord(character) < 256}
    left = sorted(set(range(256)) - set(byte_of.values()))
    return byte_of | dict(zip(alphabet[len(byte_of) :], left, strict=True))
