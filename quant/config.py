"""`quantization_config` of a config.json: which linear layers are quantized and how, in the fields of compressed-tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from quant.recipe import FAMILIES, Recipe, Scheme


class Module(NamedTuple):
    """A linear layer of a feed-forward block, and the scheme of its weight."""

    name: str  # "language_model.model.layers.0.feed_forward.experts.3.gate_proj"
    family: str
    layer: int
    expert: int | None
    scheme: Scheme | None  # None: not quantized


# Linear layers outside the feed-forward blocks: "Linear" as a target would mean them too.
_ALWAYS_KEPT = (
    "re:.*lm_head",
    "re:.*self_attn.*",
    "re:.*feed_forward\\.router",
    "re:.*vision_model.*",
    "re:.*multi_modal_projector.*",
)
_PROJECTION = "(gate|up|down)_proj$"
_STEMS: Mapping[str, str] = {
    "routed_experts": "experts\\.{experts}\\.",
    "shared_expert": "shared_expert\\.",
    "dense_mlp": "",
}


def compressed_tensors_config(modules: Sequence[Module]) -> dict[str, Any]:
    """One group for each scheme; other layers are ignored. Targets are patterns, so that a config lists no 2,304 names.

    vLLM asks for the scheme of a layer's experts by the names of expert 0's projections: experts of a layer that differ in
    scheme are legal here, and refused there.
    """
    by_scheme: dict[Scheme | None, list[Module]] = defaultdict(list)
    for module in modules:
        by_scheme[module.scheme].append(module)
    kept = by_scheme.pop(None, [])
    groups: dict[str, Any] = {}
    for number, (scheme, members) in enumerate(by_scheme.items()):
        assert scheme is not None
        targets = ["Linear"] if len(by_scheme) == 1 else list(patterns(members, modules))
        groups[f"group_{number}"] = {"targets": targets, **_arguments(scheme)}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*_ALWAYS_KEPT, *patterns(kept, modules)],
    }


def _arguments(scheme: Scheme) -> dict[str, Any]:
    if scheme.kind == "fp8":
        from quant.schemes.fp8 import Fp8

        return {"format": "float-quantized", **Fp8(scheme.granularity).compressed_tensors_args()}
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {"format": "pack-quantized", "weights": weights, "input_activations": None}


def patterns(members: Iterable[Module], modules: Sequence[Module]) -> Iterable[str]:
    """Patterns that match `members` and no other of `modules`."""
    members = list(members)
    for family in FAMILIES:
        chosen = [m for m in members if m.family == family]
        if not chosen:
            continue
        # Layers in which the same experts were chosen share a pattern.
        experts_of: dict[int, set[int | None]] = defaultdict(set)
        for module in chosen:
            experts_of[module.layer].add(module.expert)
        layers_of: dict[frozenset[int | None], list[int]] = defaultdict(list)
        for layer, experts in experts_of.items():
            layers_of[frozenset(experts)].append(layer)
        all_layers = {m.layer for m in modules if m.family == family}
        all_experts = {m.expert for m in modules if m.family == family}
        for some, layers in layers_of.items():
            which = "\\d+" if set(layers) == all_layers else _either(layers)
            numbers = "\\d+" if some == all_experts else _either(e for e in some if e is not None)
            yield f"re:.*layers\\.{which}\\.feed_forward\\.{_STEMS[family].format(experts=numbers)}{_PROJECTION}"


def _either(numbers: Iterable[int]) -> str:
    return "(" + "|".join(str(n) for n in sorted(numbers)) + ")"


def storage_format(kinds: Collection[str]) -> str | None:
    """How runtimes know what matrices of these schemes are stored in; None where nothing is quantized."""
    if not kinds:
        return None
    if set(kinds) == {"nf4"}:
        return "bitsandbytes-nf4"
    return f"compressed-tensors-{'mixed' if len(kinds) > 1 else next(iter(kinds))}"


def parted_group(recipe: Recipe) -> int | None:
    """Inputs that share a scale and must stay on one GPU: int4's groups, FP8's blocks; None where there are none."""
    schemes = [rule.scheme for rule in recipe.rules if rule.scheme]
    groups = [s.group_size for s in schemes if s.kind == "int4"]
    groups += [128 for s in schemes if s.kind == "fp8" and s.granularity == "block"]
    return max(groups, default=None)
