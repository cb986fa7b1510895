"""Where two checkpoints say different things of themselves: fields of config.json, token ids, the chat template.

Neither is taken as right. What one of them does not say (Meta's layout has no chat template, a directory no tokenizer) is no
difference.
"""

from __future__ import annotations

from collections.abc import Iterator

from llama4.config_differences import Difference, differences
from llama4_convert.errors import one_line
from llama4_convert.reference.checkpoint import Checkpoint
from llama4_convert.validation import config_check
from llama4_convert.validation.chat_template import DIALOGS, rendered
from llama4_convert.validation.results import FieldDifference

_TOKEN_FIELDS = ("image_token_index", "boi_token_index", "eoi_token_index")
_SHOWN_CHARACTERS = 40  # of a text, from where it differs


def config_differences(a: Checkpoint, b: Checkpoint) -> list[FieldDifference]:
    """The fields of which both say something, and not the same. Raises BadInput."""
    found = [d for d in differences(a.config, b.config) if d.field not in _TOKEN_FIELDS or d.found is not None]
    for name, one, other in (("bos_token_id", a.bos_id, b.bos_id), ("pad_token_id", a.pad_id, b.pad_id)):
        if one is not None is not other and one != other:
            found.append(Difference(name, one, other))
    found += [*_stated_fields(a, b), *_stop_ids(a, b), *_chat_template(a, b)]
    return [FieldDifference(field=field, a=one, b=other) for field, one, other in found]


def _stated_fields(a: Checkpoint, b: Checkpoint) -> Iterator[Difference]:
    """Fields that follow from the tensors (the dtype, the kind of model): different where one of the two says them wrongly."""
    for name in dict.fromkeys([*a.stated_fields, *b.stated_fields]):
        one, other = a.stated_fields.get(name), b.stated_fields.get(name)  # each: what it should be, what it is
        is_wrong = any(field and field[0] != field[1] for field in (one, other))
        is_a, is_b = (
            mine[1] if mine else theirs[0] if theirs else None for mine, theirs in ((one, other), (other, one))
        )
        if is_wrong and is_a != is_b:
            yield Difference(name, is_a, is_b)


def _stop_ids(a: Checkpoint, b: Checkpoint) -> Iterator[Difference]:
    """Meta's tokenizer has every token that may end a generation, a directory those of its variant."""
    one, other = set(a.stop_ids), set(b.stop_ids)
    if a.layout == b.layout:
        alike = one == other
    else:
        meta, variant = (one, other) if a.layout == "meta" else (other, one)
        alike = not meta or (bool(variant) and variant <= meta)
    if not alike and (a.layout != "meta" or b.layout != "meta" or (one and other)):
        yield Difference("eos_token_id", list(a.stop_ids), list(b.stop_ids))


def _chat_template(a: Checkpoint, b: Checkpoint) -> Iterator[Difference]:
    if a.layout != b.layout:
        meta, directory = (a, b) if a.layout == "meta" else (b, a)
        for found in config_check.chat_template(meta, directory):
            yield found if a is meta else found._replace(expected=found.found, found=found.expected)
        return
    one, other = config_check.template_of(a), config_check.template_of(b)
    if one == other:
        return
    if one is None or other is None:
        yield Difference("chat_template", *(None if text is None else "present" for text in (one, other)))
        return
    for texts in zip(_rendered(one), _rendered(other), strict=True):
        if texts[0] != texts[1]:
            at = next((i for i, (x, y) in enumerate(zip(*texts, strict=False)) if x != y), min(map(len, texts)))
            yield Difference("chat_template", *(text[at : at + _SHOWN_CHARACTERS] for text in texts))
            return


def _rendered(template: str) -> list[str]:
    """The dialogs, or what is wrong with the template in the place of each."""
    try:
        return rendered(template)
    except ValueError as error:
        return [one_line(error, 120)] * len(DIALOGS)
