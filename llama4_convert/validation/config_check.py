"""What a candidate says of itself beside what the reference says: config.json field by field, token ids, the chat template; and
for each difference the length of a prompt from which on it changes a logit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama4.config import Llama4Config, Llama4TextConfig, Llama4VisionConfig
from llama4.config_differences import Difference, differences
from llama4_convert.errors import BadInput, ConvertError, one_line
from llama4_convert.files import json_object, parse_json, read_small
from llama4_convert.metadata.config import processor_configs
from llama4_convert.reference.checkpoint import Checkpoint
from llama4_convert.validation.chat_template import DIALOGS, rendered
from llama4_convert.validation.results import FieldFault

if TYPE_CHECKING:
    from llama4_convert.reference.tokenization import TextTokenizer

# RoPE's angles must differ by so much for logits in float32 to fail their gate, measured on random weights.
_LEAST_ANGLE_RADIANS = 5e-4
# SHA-256 of the template that Transformers (4.51 to 5.23) saves beside every Llama 4 that has none, base models among them.
_DEFAULT_TEMPLATE = "95a231a15c8c976ac511e62c6fdf477ea9e3ca7a87cbb9974e0dd653eccb4563"
_TOKENS_SHOWN = 8  # of two lists of tokens, from where they differ
# Fields that change nothing that is computed: other readers choose their code by them, or a generation its end.
_CHANGE_NO_LOGIT = {"no_rope_layer_interval", "interleave_moe_layer_step", "boi_token_index", "eoi_token_index"}
# With one token there is nothing to rotate against and nobody else to attend to.
_CHANGE_FROM_TWO_TOKENS = {"use_qk_norm", "no_rope_layers"}


def compare_configs(original: Checkpoint, candidate: Checkpoint, config: Llama4Config) -> list[Difference]:
    """Where the candidate contradicts the reference, by the fields' names in config.json.

    `config`: the original's, as far as it is compared. Raises BadInput for a small file that cannot be read.
    """
    theirs = replace(candidate.config, vision_config=None) if original.is_text_only else candidate.config
    found = list(differences(config, theirs))
    for name, expected, actual in (
        ("bos_token_id", original.bos_id, candidate.bos_id),
        ("pad_token_id", original.pad_id, candidate.pad_id),
    ):
        if expected is not None and actual != expected:
            found.append(Difference(name, expected, actual))
    found += [Difference(name, should, is_) for name, (should, is_) in candidate.stated_fields.items() if should != is_]
    expected_stops, stops = original.stop_ids, candidate.stop_ids
    # Meta's tokenizer has every token that may end a generation. Which of them do depends on the variant, but there must be
    # one, and no other; and what has a chat template of its own stops at the end of a turn, the last of the three.
    meta, variant = expected_stops, stops
    if candidate.layout == "meta" != original.layout:
        meta, variant = stops, expected_stops
    chats = original.layout == "meta" and config.text_config.moe_layers and _has_own_template(candidate)
    if expected_stops and not (variant and set(variant) <= set(meta) and (not chats or meta[-1] in variant)):
        found.append(Difference("eos_token_id", list(expected_stops), list(stops)))
    if candidate.layout == "transformers":
        found += _generation(original, candidate)
        found += _processors(config.vision_config, candidate)
        found += _vocabulary(original, candidate)
    return [*found, *chat_template(original, candidate)]


def _generation(original: Checkpoint, candidate: Checkpoint) -> Iterator[Difference]:
    """Token ids of generation_config.json, which decides over config.json in Transformers."""
    body = _body(candidate, "generation_config.json")
    for name, expected in (("bos_token_id", original.bos_id), ("pad_token_id", original.pad_id)):
        if expected is not None and body.get(name) not in (None, expected):
            yield Difference(f"generation_config.json: {name}", expected, body[name])


def _processors(vision: Llama4VisionConfig | None, candidate: Checkpoint) -> Iterator[Difference]:
    """How pictures are prepared. A field that is absent has the right default, but for sizes."""
    if vision is None:
        return
    for file, expected in processor_configs(vision).items():
        body = _body(candidate, file)
        if file == "preprocessor_config.json" and not body:
            body = _body(candidate, "processor_config.json").get("image_processor") or {}  # as Transformers 5 saves it
        for name, value in expected.items() if isinstance(body, Mapping) else ():
            found = body.get(name, value)
            right = (
                isinstance(found, str) and found.startswith("Llama4ImageProcessor")
                if name == "image_processor_type"
                else found == value
                or (isinstance(value, float) and isinstance(found, float) and math.isclose(found, value))
            )
            if not right:
                yield Difference(f"{file}: {name}", value, found)


def _vocabulary(original: Checkpoint, candidate: Checkpoint) -> Iterator[Difference]:
    try:
        different = _tokenizer(original).first_difference(_tokenizer(candidate))
    except ConvertError:
        return  # no tokenizer on that side: nothing to compare with
    if different:
        yield Difference("tokenizer.json", *different)


def _body(candidate: Checkpoint, file: str) -> Mapping[str, Any]:
    path = candidate.path / file
    return json_object(path) if path.exists() else {}


def field_fault(
    difference: Difference, expected: Llama4Config, found: Llama4Config, n_tokens: int, has_picture: bool
) -> FieldFault:
    """A difference, with whether it changes a logit of a prompt of `n_tokens` tokens, or of one with a picture."""
    field = difference.field
    least = matters_from(field, expected.text_config, found.text_config)
    needs_picture = field.startswith(("vision_config", "image_token"))
    matters = None if least is None else n_tokens >= least and (has_picture or not needs_picture)
    if "processor_config" in field:
        matters = False  # both models are given the same pixels
    return FieldFault(
        field=field, expected=difference.expected, found=difference.found, matters_from=least, matters=matters
    )


def matters_from(field: str, expected: Llama4TextConfig, found: Llama4TextConfig) -> int | None:
    """Tokens from which on a different `field` changes a logit; None for what changes none at any length."""
    name = field.partition(".")[0]
    if name in ("preprocessor_config", "processor_config"):
        return 1  # of any prompt with a picture
    if name in _CHANGE_NO_LOGIT or not (hasattr(expected, name) or name in ("vision_config", "image_token_index")):
        return None
    if name in ("rope_scaling", "rope_theta"):
        return _rope_differs_from(expected, found)
    if name in ("attention_chunk_size", "layer_types"):
        chunked = [c for c in (expected, found) if "chunked_attention" in c.layer_types]
        sizes = [c.attention_chunk_size for c in chunked if c.attention_chunk_size]
        return min(sizes) + 1 if sizes else None
    if name in ("attn_temperature_tuning", "floor_scale", "attn_scale"):
        tuned = [c for c in (expected, found) if c.attn_temperature_tuning and not all(c.no_rope_layers)]
        return max(1, math.ceil(min(c.floor_scale for c in tuned))) if tuned else None
    if name == "tie_word_embeddings":
        return None  # there is an output head, or the tensor that is missing says it
    return 2 if name in _CHANGE_FROM_TWO_TOKENS else 1


def _rope_differs_from(expected: Llama4TextConfig, found: Llama4TextConfig) -> int | None:
    from llama4.text import rope_frequencies

    if expected.head_dim != found.head_dim:
        return 1
    try:
        apart = float((rope_frequencies(expected).double() - rope_frequencies(found).double()).abs().max())
    except (ArithmeticError, RuntimeError):
        return None
    least = math.ceil(_LEAST_ANGLE_RADIANS / apart) + 1 if apart > 0 else None
    # Only distances count, and in a chunked layer none is longer than the chunk.
    reach = [
        c.chunk_size(layer) for c in (expected, found) for layer, rotates in enumerate(c.no_rope_layers) if rotates
    ]
    if least is None or not reach or (None not in reach and least > max(size for size in reach if size)):
        return None
    return least


def chat_template(original: Checkpoint, candidate: Checkpoint) -> Iterator[Difference]:
    """Whether the candidate's template writes dialogs as Meta's ChatFormat does. Guard has a prompt of its own."""
    source = template_of(candidate)
    if source is None or not original.config.text_config.moe_layers:
        return
    try:
        ours, theirs = _processor(original), _tokenizer(candidate)
    except ConvertError:
        return  # no tokenizer on that side: nothing to compare with
    try:
        texts = rendered(source)
    except ValueError as error:
        yield Difference("chat_template", "a template that renders", one_line(error, 120))
        return
    for (prompted, messages), text in zip(DIALOGS, texts, strict=True):
        expected = ours.chat(messages, add_generation_prompt=prompted).tokens
        found = theirs.encode(text)
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(expected))
            yield Difference("chat_template", *(ids[at : at + _TOKENS_SHOWN] for ids in (expected, found)))
            return


def _has_own_template(checkpoint: Checkpoint) -> bool:
    template = template_of(checkpoint)
    return template is not None and hashlib.sha256(template.encode()).hexdigest() != _DEFAULT_TEMPLATE


def template_of(checkpoint: Checkpoint) -> str | None:
    """The chat template of a Transformers directory, from its own file or from tokenizer_config.json."""
    if checkpoint.layout != "transformers":
        return None
    file = checkpoint.path / "chat_template.jinja"
    if file.exists():
        return read_small(file).decode("utf-8", "replace")
    config = checkpoint.path / "tokenizer_config.json"
    try:
        body: Any = parse_json(read_small(config)) if config.exists() else {}
    except ValueError as error:
        raise BadInput(f"{config.name} is not valid JSON ({error})") from error
    template = body.get("chat_template") if isinstance(body, Mapping) else None
    if isinstance(template, list):
        template = next((t.get("template") for t in template if isinstance(t, Mapping)), None)
    return template if isinstance(template, str) else None


def _processor(checkpoint: Checkpoint) -> Any:
    from llama4.chat import Llama4Processor

    return Llama4Processor(_tokenizer(checkpoint), None)


def _tokenizer(checkpoint: Checkpoint) -> TextTokenizer:
    from llama4_convert.reference.tokenization import TextTokenizer

    return TextTokenizer.open(checkpoint.path)
