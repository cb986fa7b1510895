"""What a checkpoint is made of: numbers and bytes by kind, how Meta's keys are spelled, what is quantized and how."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from llama4_convert.checkpoints.tensor_kinds import KINDS, kind_of
from mappings import Binding

if TYPE_CHECKING:
    from llama4_convert.checkpoints.quantized import QuantizedReader


PUBLISHED, MODULE_NAMES, MIXED = "published", "module names", "mixed"


def spelling(binding: Binding, keys: Iterable[str], kinds: Mapping[str, str]) -> dict[str, Any]:
    """Which of its spellings Meta's layout uses: {spelling, kinds: [{kind, spelling, keys}]}, for kinds that have several.

    "published": the keys of the published files, "module names": those of Meta's modules, "mixed": some of each. `keys` are
    those used, `kinds` says of which kind each is; in the answer `*` stands for the layer.
    """
    used: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for key in sorted(keys):
        choices = binding.spellings(next(iter(binding.meta[key].tensors.values())))
        if len(choices) > 1:
            template = re.sub(r"(?<=layers\.)\d+", "*", key, count=1)
            # The table lists the published spelling first, and the modules' last.
            used[kinds[key]][template] = MODULE_NAMES if key == choices[-1] else PUBLISHED

    def summed(found: Iterable[str]) -> str:
        several = set(found)
        return several.pop() if len(several) == 1 else MIXED

    told = [
        {"kind": kind, "spelling": summed(used[kind].values()), "keys": list(used[kind])}
        for kind in KINDS
        if kind in used
    ]
    return {"spelling": summed(how for found in used.values() for how in found.values()), "kinds": told}


def quantization(reader: QuantizedReader) -> dict[str, Any]:
    """What config.json and the tensors say of it: {method, format, groups, ignored}.

    groups: [{scheme, its settings, matrices, parameters, bytes, bits_per_weight, kinds: {kind: matrices}}], a group for all
    matrices that are quantized alike. `bytes` are those of codes, scales and tables; `ignored` are config.json's patterns.
    """
    said = reader.checkpoint.config["quantization_config"]
    said = said if isinstance(said, dict) else {}
    groups: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
    stored: Counter[str] = Counter()
    for key, tensor in reader.checkpoint.tensors.items():
        stored[key.rpartition(".weight")[0]] += tensor.nbytes
    for key, matrix in reader.quantized.items():
        told = {"scheme": matrix.kind, **matrix.settings}
        group = groups.setdefault(
            tuple(told.items()),
            {**told, "matrices": 0, "parameters": 0, "bytes": 0, "bits_per_weight": 0.0, "kinds": {}},
        )
        group["matrices"] += 1
        group["parameters"] += matrix.n * matrix.k
        module = key.removesuffix(".weight")
        group["bytes"] += stored[module]
        kind = kind_of(key)
        group["kinds"][kind] = group["kinds"].get(kind, 0) + 1
    for group in groups.values():
        group["bits_per_weight"] = 8 * group["bytes"] / max(1, group["parameters"])
    return {
        "method": said.get("quant_method"),
        "format": said.get("format") or said.get("bnb_4bit_quant_type"),
        "groups": list(groups.values()),
        "ignored": said.get("ignore") or said.get("llm_int8_skip_modules") or [],
    }
