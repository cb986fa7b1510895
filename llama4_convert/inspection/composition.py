"""What a checkpoint is made of: how Meta's keys are spelled, what is quantized and how."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from llama4_convert.checkpoints.families import FAMILIES, family_of
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.meta_quantized import stored_codes
from llama4_convert.inspection.results import FamilySpelling, QuantizedGroup, Spelling, StoredQuantization
from mappings import Binding

if TYPE_CHECKING:
    from llama4_convert.checkpoints.quantized import QuantizedReader


PUBLISHED, MODULE_NAMES, MIXED = "published", "module names", "mixed"


def spelling(binding: Binding, keys: Iterable[str], families: Mapping[str, str]) -> Spelling:
    """Which of its spellings Meta's layout uses, for the families that have several.

    `keys` are those used, `families` says of which family each is.
    """
    used: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for key in sorted(keys):
        choices = binding.spellings(next(iter(binding.meta[key].tensors.values())))
        if len(choices) > 1:
            template = re.sub(r"(?<=layers\.)\d+", "*", key, count=1)
            # The table lists the published spelling first, and the modules' last.
            used[families[key]][template] = MODULE_NAMES if key == choices[-1] else PUBLISHED

    def summed(found: Iterable[str]) -> str:
        several = set(found)
        return several.pop() if len(several) == 1 else MIXED

    return Spelling(
        spelling=summed(how for found in used.values() for how in found.values()),
        kinds=[
            FamilySpelling(kind=family, spelling=summed(used[family].values()), keys=list(used[family]))
            for family in FAMILIES
            if family in used
        ],
    )


def quantization(reader: QuantizedReader) -> StoredQuantization:
    """What config.json and the tensors of a Transformers directory say about quantized matrices."""
    config = reader.checkpoint.config["quantization_config"]
    stated = config if isinstance(config, dict) else {}
    groups: dict[tuple[Any, ...], QuantizedGroup] = {}
    stored: Counter[str] = Counter()
    for key, tensor in reader.checkpoint.tensors.items():
        stored[key.rpartition(".weight")[0]] += tensor.nbytes
    for key, matrix in reader.quantized.items():
        alike = (matrix.kind, *matrix.settings.items())
        group = groups.setdefault(alike, QuantizedGroup(scheme=matrix.kind, kinds={}, **matrix.settings))  # type: ignore[arg-type]
        group.matrices += 1
        group.parameters += matrix.n * matrix.k
        group.bytes += stored[key.removesuffix(".weight")]
        family = family_of(key)
        group.kinds[family] = group.kinds.get(family, 0) + 1
    return StoredQuantization(
        method=stated.get("quant_method"),
        format=stated.get("format") or stated.get("bnb_4bit_quant_type"),
        groups=_with_bits(groups.values()),
        ignored=stated.get("ignore") or stated.get("llm_int8_skip_modules") or [],
    )


def quantization_of_meta(checkpoint: MetaCheckpoint) -> StoredQuantization | None:
    """The same for Meta's layout, where each rank's matrices are quantized by themselves; None where nothing is quantized."""
    groups: dict[str, QuantizedGroup] = {}
    for key, record in checkpoint.quantized.items():
        new = QuantizedGroup(scheme=record.kind, granularity="row of each rank", kinds={})
        group = groups.setdefault(record.kind, new)
        group.matrices += record.experts
        for index in checkpoint.ranks:
            group.parameters += index.tensors[key].numel
            group.bytes += stored_codes(index.tensors[key]).nbytes
    if not groups:
        return None
    scales = sum(tensor.nbytes for index in checkpoint.scales for tensor in index.tensors.values())
    for group in groups.values():
        group.kinds = {"routed_experts": group.matrices}
        group.bytes += scales // len(groups)
    return StoredQuantization(method="meta", format=next(iter(groups)), groups=_with_bits(groups.values()), ignored=[])


def _with_bits(groups: Iterable[QuantizedGroup]) -> list[QuantizedGroup]:
    several = list(groups)
    for group in several:
        group.bits_per_weight = 8 * group.bytes / max(1, group.parameters)
    return several
