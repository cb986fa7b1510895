"""What a checkpoint is made of: numbers and bytes by kind, how Meta's keys are spelled, what is quantized and how."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mappings import Binding

if TYPE_CHECKING:
    from llama4_convert.checkpoints.quantized import QuantizedReader

_LAYER = r"(language_model\.)?model\.layers\.\d+\."
# Kind -> the Transformers keys of it; the first that fits decides. The feed-forward kinds are called as recipes call them.
_KINDS = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "quantization_scales": r".+\.(weight_(?!packed).+|weight\..+|(input|output)_scale)",
        "embeddings": r"(language_model\.)?model\.embed_tokens\.weight",
        "attention": _LAYER + r"self_attn\..+",
        "router": _LAYER + r"feed_forward\.router\..+",
        "routed_experts": _LAYER + r"feed_forward\.experts\..+",
        "shared_expert": _LAYER + r"feed_forward\.shared_expert\..+",
        "dense_mlp": _LAYER + r"feed_forward\.(gate|up|down)_proj\..+",
        "norms": rf"({_LAYER}.+_layernorm|(language_model\.)?model\.norm)\.weight",
        "output_head": r"(language_model\.)?lm_head\..+",
        "projector": r"vision_model\.vision_adapter\..+|multi_modal_projector\..+",
        "vision": r"vision_model\..+",
    }.items()
}
# In the order in which they are listed. What `convert` leaves behind is dropped, what no Llama 4 has is other.
KINDS = (*(kind for kind in _KINDS if kind != "quantization_scales"), "quantization_scales", "dropped", "other")


def kind_of(key: str) -> str:
    """The kind of a tensor, by its key in Transformers' layout."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.fullmatch(key)), "other")


def words(kind: str) -> str:
    """A kind for people."""
    return kind.replace("_", " ").replace("mlp", "MLP")


@dataclass
class Share:
    """`parameters`: numbers of the model, each once, whatever they are stored as. `bytes`: what is stored, of all ranks."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0

    def add(self, tensors: int, parameters: int, nbytes: int) -> None:
        self.tensors += tensors
        self.parameters += parameters
        self.bytes += nbytes


def listed(shares: Mapping[str, Share]) -> list[dict[str, Any]]:
    """[{kind, tensors, parameters, bytes}] of the kinds that there are."""
    return [{"kind": kind, **asdict(shares[kind])} for kind in KINDS if kind in shares]


def active_parameters(parameters: Mapping[str, int], experts: object, top_k: object) -> int | None:
    """How many numbers a token of text meets, of so many by kind: of the routed experts `top_k`, and nothing of vision.

    Embeddings count whole, as in the published figures. None if the numbers of experts are not known.
    """
    total = sum(n for kind, n in parameters.items() if kind not in ("vision", "projector"))
    routed = parameters.get("routed_experts", 0)
    if not routed:
        return total
    if not (isinstance(experts, int) and isinstance(top_k, int) and 0 < top_k <= experts):
        return None
    return total - routed + routed * top_k // experts


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
