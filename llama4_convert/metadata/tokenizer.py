"""Meta's tokenizer.model to the tokenizer files of a Transformers directory, with the chat template.

The result agrees with Meta's `Tokenizer.encode` (llama-models, `llama4/tokenizer.py`), id for id, on any text below
the two limits at which Meta's code cuts the text before it encodes: 400,000 characters, and runs of 25,000 characters
that are all whitespace or all not. At such a cut Meta's tokens may differ from ours, because no merge crosses it.
Text that spells a special token becomes that token, as with Meta's `allowed_special="all"`.

How tiktoken's merge rule becomes a list of merges. tiktoken keeps no list: of all neighbours whose concatenation is a
token it merges those of lowest rank, leftmost first. The other form wants pairs in order of priority, and most
tokens can be cut into two tokens in several places. Yet only one cut a token is ever used: until a span of text
becomes one token nothing has merged across its ends, so what happened inside is what happens to the token's bytes
alone, and that ends in one certain pair. So `_merges` gives each token that pair, in rank order; ties do not arise.

Which code points are letters, digits or spaces is decided by the reader's regular expression engine. For tokenizers
0.23 and tiktoken 0.14 all of Unicode is classed alike; an engine of another age may disagree on code points that
were assigned in between.

What the chat template cannot do, since it writes text where Meta's `ChatFormat` writes ids piece by piece:
- Content that begins with line breaks merges with the two that end a header.
- Neighbouring pieces (the texts of a content list, a message's text and tool calls) are encoded as one text, so
  that characters on both sides of a joint may share a token.
- Content that spells a special token (`<|eot|>`) becomes that token: keep such text out of untrusted content.
- A built-in tool's call takes `arguments` as a dictionary; other calls take a JSON string too and repeat it verbatim.
- An assistant message ends in `<|eom|>` if it calls tools, else in `<|eot|>`: messages carry no stop reason.
"""

from __future__ import annotations

import binascii
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Final

from llama4_convert.errors import BadInput, UsageError

# Meta's O200K_PATTERN: how text is cut into the words that merges stay inside of.
WORD_PATTERN: Final = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

N_SPECIAL: Final = 2048

# The special tokens in Meta's order, by name; a pair stands for a run of reserved ones, ("vision", 0..1).
_SPECIAL_LAYOUT: Final[tuple[str | tuple[str, range], ...]] = (
    *("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
    *("header_start", "header_end", "eom", "eot", "step", ("text_post_train", range(6))),
    *("python_start", "python_end", "finetune_right_pad", ("text_post_train", range(8, 69))),
    *("image_start", "image_end", ("vision", range(2)), "tile_x_separator", "tile_y_separator"),
    *(("vision", range(2, 6)), "image", ("vision", range(6, 7)), "patch", ("vision", range(7, 1048))),
    *(("reasoning", range(8)), "reasoning_thinking_start", "reasoning_thinking_end"),
)


def _special_tokens() -> Iterator[str]:
    named = 0
    for entry in _SPECIAL_LAYOUT:
        names = [entry] if isinstance(entry, str) else [f"{entry[0]}_reserved_special_token_{i}" for i in entry[1]]
        named += len(names)
        yield from (f"<|{name}|>" for name in names)
    yield from (f"<|reserved_special_token_{i}|>" for i in range(N_SPECIAL - named))


SPECIAL_TOKENS: Final[tuple[str, ...]] = tuple(_special_tokens())
_SPECIAL_BYTES: Final = frozenset(token.encode() for token in SPECIAL_TOKENS)
_SPECIAL_OFFSET: Final = {token: i for i, token in enumerate(SPECIAL_TOKENS)}

BOS: Final = "<|begin_of_text|>"
PAD: Final = "<|finetune_right_pad|>"
# What ends a sequence: generation stops on it, and training data ends in it.
_EOS: Final = {"base": "<|end_of_text|>", "instruct": "<|eot|>", "guard": "<|eot|>"}
_TEMPLATE: Final = {"instruct": "chat.jinja", "guard": "guard.jinja"}

# Bounds on a file that nobody vouches for (Llama 4's has 3.6 MB and no token above 113 bytes). Finding a token's
# merge takes time quadratic in its length, so these two bound the time as well as the memory.
MAX_MODEL_BYTES: Final = 16 << 20
MAX_TOKEN_BYTES: Final = 256
_MAX_LINES: Final = 1_000_000  # Llama 4's has 200,000
_MAX_JSON_COMMAS: Final = 3_000_000  # of a tokenizer.json; Llama 4's has some 900,000
_MAX_LINE_BYTES: Final = 4 * MAX_TOKEN_BYTES

_AGAIN: Final = "download tokenizer.model again"


def read_bpe(data: bytes) -> dict[bytes, int]:
    """Token to rank, in file order, from a tokenizer.model in tiktoken's format: one `base64 rank` a line.

    Blank lines are skipped, as Meta's reader does. Raises `BadInput` for a line of another form, a token met twice or
    spelt like a special one, ranks that are not 0 to n-1, a byte without a token of its own, and files beyond
    `MAX_MODEL_BYTES`.
    """
    if len(data) > MAX_MODEL_BYTES:
        raise BadInput(
            f"tokenizer.model: {len(data):,} bytes, more than any tokenizer's; check that it is the right file"
        )
    if data.count(b"\n") > _MAX_LINES:
        raise BadInput(f"tokenizer.model: more than {_MAX_LINES:,} lines; check that it is the right file")
    rank_of: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for number, line in enumerate(io.BytesIO(data), 1):
        fields = line.split() if len(line) <= _MAX_LINE_BYTES else []
        if not fields and line.isspace():
            continue
        if len(fields) != 2 or not fields[1].isdigit():
            raise BadInput(f"tokenizer.model, line {number}: not `base64 rank`; {_AGAIN}")
        try:
            token = binascii.a2b_base64(fields[0], strict_mode=True)
        except binascii.Error:
            raise BadInput(f"tokenizer.model, line {number}: the token is not base64; {_AGAIN}") from None
        if not 1 <= len(token) <= MAX_TOKEN_BYTES:
            raise BadInput(f"tokenizer.model, line {number}: a token of {len(token)} bytes; {_AGAIN}")
        if token in _SPECIAL_BYTES:
            raise BadInput(
                f"tokenizer.model, line {number}: a special token ({token.decode()}) among the plain; {_AGAIN}"
            )
        rank = int(fields[1])
        if token in rank_of:
            raise BadInput(f"tokenizer.model, line {number}: the token of rank {rank_of[token]} once more; {_AGAIN}")
        if rank in line_of_rank:
            raise BadInput(
                f"tokenizer.model, line {number}: rank {rank} again after line {line_of_rank[rank]}; {_AGAIN}"
            )
        rank_of[token] = rank
        line_of_rank[rank] = number
    top = max(line_of_rank, default=-1)
    if top >= len(rank_of):
        missing = next(rank for rank in range(top) if rank not in line_of_rank)
        raise BadInput(
            f"tokenizer.model, line {line_of_rank[top]}: rank {top} of {len(rank_of)} tokens, while rank {missing} is "
            f"missing; {_AGAIN}"
        )
    absent = [byte for byte in range(256) if bytes([byte]) not in rank_of]
    if absent:
        raise BadInput(
            f"tokenizer.model: {len(absent)} of 256 single bytes have no token, 0x{absent[0]:02x} first; {_AGAIN}"
        )
    return rank_of


@dataclass(frozen=True)
class TokenIds:
    """The ids of the special tokens that configurations and prompts name; `n_base` is the number of plain tokens."""

    n_base: int
    bos: int
    eos: int
    header_start: int
    header_end: int
    eom: int
    eot: int
    python_start: int
    python_end: int
    pad: int
    boi: int
    eoi: int
    tile_x: int
    tile_y: int
    image: int
    patch: int

    @classmethod
    def from_base(cls, n_base: int) -> TokenIds:
        """The ids where the tokenizer.model holds `n_base` tokens: `len(read_bpe(data))`, 200,000 for Llama 4."""
        ids = {name: n_base + _SPECIAL_OFFSET[f"<|{token}|>"] for name, token in _ID_TOKENS.items()}
        return cls(n_base=n_base, **ids)

    @classmethod
    def from_tokenizer(cls, tokenizer_model: bytes | None, rows: int) -> TokenIds | None:
        """The ids behind the plain tokens of a tokenizer.model, or without one at the end of a vocabulary of `rows` tokens.

        None if the vocabulary has no room for them. Raises `BadInput` as `read_bpe` does.
        """
        n_base = rows - N_SPECIAL if tokenizer_model is None else len(read_bpe(tokenizer_model))
        return cls.from_base(n_base) if n_base > 0 else None

    @property
    def vocab_size(self) -> int:
        """Plain and special tokens together: 202,048 for Llama 4."""
        return self.n_base + N_SPECIAL

    def stop_ids(self, variant: str) -> list[int]:
        """The ids that end generation: `<|end_of_text|>` for "base", with `<|eom|>` and `<|eot|>` for the others."""
        return [self.eos] if _known(variant) == "base" else [self.eos, self.eom, self.eot]


_ID_TOKENS: Final = {
    "bos": "begin_of_text",
    "eos": "end_of_text",
    "header_start": "header_start",
    "header_end": "header_end",
    "eom": "eom",
    "eot": "eot",
    "python_start": "python_start",
    "python_end": "python_end",
    "pad": "finetune_right_pad",
    "boi": "image_start",
    "eoi": "image_end",
    "tile_x": "tile_x_separator",
    "tile_y": "tile_y_separator",
    "image": "image",
    "patch": "patch",
}


def _known(variant: str) -> str:
    if variant not in _EOS:
        raise UsageError(f"unknown variant {variant!r}; choose one of {', '.join(_EOS)}")
    return variant


def chat_template(variant: str) -> str | None:
    """The Jinja text of a variant's chat template; None for "base", which has no chat format."""
    name = _TEMPLATE.get(_known(variant))
    return name and (resources.files("llama4_convert.metadata") / "templates" / name).read_text("utf-8")


def tokenizer_files(data: bytes, *, variant: str, vision: bool, max_length: int) -> dict[str, bytes]:
    """File name to content: all that AutoTokenizer needs, the same bytes for the same arguments.

    `data` is the content of tokenizer.model; `variant` is "base", "instruct" or "guard" and decides the end token and
    the chat template; `vision` names the processor; `max_length` is the context in tokens. Raises `BadInput` as
    `read_bpe` does and `UsageError` for another variant.
    """
    template = chat_template(variant)
    rank_of = read_bpe(data)
    named = {"bos_token": BOS, "eos_token": _EOS[variant], "pad_token": PAD}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    config: dict[str, object] = {
        "added_tokens_decoder": {
            str(len(rank_of) + i): {"content": token, **flags, "special": True}
            for i, token in enumerate(SPECIAL_TOKENS)
        },
        **named,
        # Clean-up would turn "it 's" into "it's": what was decoded would no longer be what was encoded.
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        # Generation goes on from the last position, so a batch is padded on the left (Llama4Processor does the same).
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if vision:
        config["processor_class"] = "Llama4Processor"
    if template is not None:
        config["chat_template"] = template  # readers of Transformers 4 look here, later ones into the .jinja file
    files = {
        "tokenizer.json": tokenizer_json(rank_of),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(named),
    }
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    return files


def _json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()


def tokenizer_json(rank_of: dict[bytes, int]) -> bytes:
    """The tokenizers library's one-file form: words by pattern, merges, special tokens, and BOS in front.

    The library writes all but the tokens and merges. With these it would hold them three times, in 180 MiB, the peak of a
    whole conversion; written here one after the other they are the same bytes in 60.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    # A word that is a token is taken whole, merges or not: tiktoken looks words up before it merges.
    tokenizer = Tokenizer(models.BPE({}, [], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, len(rank_of) + _SPECIAL_OFFSET[BOS])],
    )
    form = json.loads(tokenizer.to_str())
    for token in form["added_tokens"]:
        token["id"] += len(rank_of)  # they were numbered behind no tokens
    model = form.pop("model")
    del model["vocab"], model["merges"]
    text = io.StringIO()
    text.write(f'{_compact(form)[:-1]},"model":{_compact(model)[:-1]},"vocab":{{')
    separator = ""
    for token in sorted(rank_of, key=rank_of.__getitem__):
        text.write(f"{separator}{_compact(_visible(token))}:{rank_of[token]}")
        separator = ","
    text.write('},"merges":[')
    separator = ""
    for left, right in _merges(rank_of):
        text.write(f"{separator}[{_compact(_visible(left))},{_compact(_visible(right))}]")
        separator = ","
    text.write("]}}")
    return text.getvalue().encode()


_compact: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_PRINTABLE: Final = frozenset((*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)))
_ALPHABET: Final = {byte: 256 + i for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)}


def _visible(token: bytes) -> str:
    """A token as the byte-level alphabet spells it: one printable character a byte (GPT-2's `bytes_to_unicode`)."""
    return token.decode("latin-1").translate(_ALPHABET)


def _merges(rank_of: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each token of two bytes or more is merged from, in rank order (see the module's docstring).

    A token that merging never reaches has none: it is met only as a whole word.
    """
    never = len(rank_of)  # above every rank
    for token in sorted(rank_of, key=rank_of.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        ranks = [rank_of.get(token[i : i + 2], never) for i in range(len(token) - 1)]  # of each part with the next
        while len(parts) > 2 and (lowest := min(ranks)) < never:
            i = ranks.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            del ranks[i]
            if i > 0:
                ranks[i - 1] = rank_of.get(parts[i - 1] + parts[i], never)
            if i < len(ranks):
                ranks[i] = rank_of.get(parts[i] + parts[i + 1], never)
        if len(parts) == 2:
            yield parts[0], parts[1]


_BYTE_OF: Final = {chr(byte) if byte in _PRINTABLE else chr(_ALPHABET[byte]): byte for byte in range(256)}


def tokenizer_model(tokenizer_json: bytes) -> bytes:
    """The way back: tokenizer.model from the content of a tokenizer.json. Raises `BadInput` if that is no Llama 4's."""
    try:
        if tokenizer_json.count(b",") > _MAX_JSON_COMMAS:
            raise ValueError("too many tokens")
        body = json.loads(tokenizer_json)
        added = {token["content"]: token["id"] for token in body["added_tokens"]}
        plain = {token: rank for token, rank in body["model"]["vocab"].items() if token not in added}
        lines = [(rank, bytes(_BYTE_OF[c] for c in token)) for token, rank in plain.items()]
        text = b"".join(b"%s %d\n" % (binascii.b2a_base64(token, newline=False), rank) for rank, token in sorted(lines))
    except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"tokenizer.json is damaged, or no Llama 4's ({error!r:.80}): no tokenizer.model can be made"
        ) from error
    n_base = len(read_bpe(text))
    expected = {token: n_base + i for i, token in enumerate(SPECIAL_TOKENS)}
    if wrong := next((token for token, at in expected.items() if added.get(token, at) != at), None):
        raise BadInput(
            f"tokenizer.json has {wrong} at {added[wrong]}, Llama 4 at {expected[wrong]}: no tokenizer.model can be made"
        )
    return text


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer.model and the options of its conversion, which is put off: it takes ten times the file's size in memory."""

    model: bytes
    variant: str
    vision: bool
    max_length: int
    first_file = "tokenizer.json"

    def files(self) -> dict[str, bytes]:
        """File name to content, as `tokenizer_files` makes them."""
        return tokenizer_files(self.model, variant=self.variant, vision=self.vision, max_length=self.max_length)
