"""The runtimes of runtimes.toml: what each loads, how it uses a GPU's memory, the command that serves, and notes for users."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Literal, get_args

from msgspec import Struct, structs

from quant.typed import decode

Format = Literal[
    "compressed-tensors-int4", "compressed-tensors-fp8", "compressed-tensors-mixed", "bitsandbytes-nf4"
]  # as `quant.config.storage_format` spells them; bf16 is none of them, every runtime loads it
FORMATS: tuple[str, ...] = get_args(Format)
# What is true of a deployment in a runtime: `serving.facts`. "int4": also beside FP8. "FP8": nothing else.
Fact = Literal[
    "several GPUs", "AMD", "FP8 units", "experts", "int4", "FP8", "NF4", "FP8 KV cache", "keeps chunks"
]  # fmt: skip


class Phrase(Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a command, or a note."""

    text: str
    """with placeholders in braces, which `serving.placeholders` fills in"""
    when: tuple[Fact, ...] = ()
    """the facts that must all be true; none: it is always there"""


class Switch(Struct, frozen=True, forbid_unknown_fields=True):
    """An option under which all layers keep all tokens: it gets a verdict of its own."""

    name: str
    """of that verdict's `runtime`"""
    option: str
    """what the command ends with"""


class Runtime(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a runtime serves a Llama 4: a table of runtimes.toml."""

    loads: tuple[Format, ...]
    """formats that it computes with as they are stored, beside bf16"""
    splits: Literal["tensors", "layers"]
    """what several GPUs share out: a part of each tensor (tensor parallelism), or whole layers"""
    kv_dtypes: tuple[Literal["bf16", "fp8"], ...]
    """dtypes of the KV cache; FP8 is used on GPUs with FP8 units only"""
    keeps_chunks: Literal["always", "published models", "never"]
    """whether its KV cache holds no more than a chunk of chunked layers; "published models": those with a vision tower and a full
    layer in four"""
    command: tuple[Phrase, ...]
    """what serves, or loads, the model: a line for a shell"""
    decompresses: tuple[Format, ...] = ()
    """formats that become bf16 in memory"""
    refuses: dict[str, str] = {}
    """format that it does not load -> the note that says so"""
    refuses_text_only: str = ""
    """the note that it does not load routed experts of a model without a vision tower; empty: it does"""
    prefill_tokens: int | None = None
    """tokens of a prompt at a time. Absent: it runs every expert on every token, so few at a time that half of the allowance for
    activations holds them"""
    tokens_for_every_request: bool = False
    """whether `prefill_tokens` may not be less than the requests at a time"""
    least_requests: int = 1
    """requests at a time that the command allows at least; each has a row of logits"""
    pieces_in_flight: int = 0
    """pieces of prompts whose keys and values in chunked layers are written beside the cache; they count as activations"""
    pieces_in_cache: int = 0
    """pieces of a prompt that chunked layers keep in the cache, behind the chunk"""
    pads_layer_groups: bool = False
    """whether the KV cache stores full and chunked layers in groups of one size (`memory.grouped_layers`)"""
    script: str = ""
    """the placeholder {script} of `command`: Python, with placeholders of its own"""
    loading_notes: tuple[Phrase, ...] = ()
    """about the weights, shown also where they do not fit"""
    notes: tuple[Phrase, ...] = ()
    """shown where at least some tokens have room"""
    usage: str = ""
    """the last note: what callers must do; with placeholders"""
    without_chunks: Switch | None = None
    name: str = ""
    """the name of the table"""

    def __post_init__(self) -> None:
        """Raises ValueError if a format is missing, or stands in two of the three fields."""
        formats = sorted((*self.loads, *self.decompresses, *self.refuses))
        if formats != sorted(FORMATS):
            raise ValueError(f"loads, decompresses and refuses must share out {', '.join(sorted(FORMATS))}")


@cache
def runtimes() -> tuple[Runtime, ...]:
    """The runtimes, in the order of the file; behind one with a switch that runtime without chunks."""
    text = resources.files("llama4_convert.fitting").joinpath("runtimes.toml").read_text(encoding="utf-8")
    found: list[Runtime] = []
    for name, row in decode(tomllib.loads(text), dict[str, Runtime], "runtimes.toml").items():
        found.append(structs.replace(row, name=name))
        if switch := row.without_chunks:
            command = (*row.command, Phrase(switch.option))
            found.append(structs.replace(row, name=switch.name, command=command, keeps_chunks="never"))
    return tuple(found)
