"""The model card: README.md of an output, as the Hub reads it. What it is, from where, by which recipe, what was measured.

A function of the manifest and of config.json, so that `convert` and `card_file` write the same: no times, paths or machines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints.families import in_words
from llama4_convert.checkpoints.manifest import NAME, Manifest, QuantizationError, describe_errors
from llama4_convert.errors import printable
from llama4_convert.files import is_notice
from llama4_convert.formatting import parameters
from quant.recipe import FORMATS

CARD = "README.md"
SOURCE_CARD = "README.source.md"  # what a source calls README.md
REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_LICENCE = "https://www.llama.com/llama4/license/"
# Layers, width, experts, layers with experts, dense width: the models that Meta published, without the variant.
_PUBLISHED = {
    (48, 5120, 16, 48, 16384): "Llama-4-Scout-17B-16E",
    (48, 5120, 128, 24, 16384): "Llama-4-Maverick-17B-128E",
    (48, 5120, 0, 0, 8192): "Llama-Guard-4-12B",
}
_SCHEMES = {"pack-quantized": "int4", "float-quantized": "fp8"}
METRICS = {
    "tokens": "tokens compared",
    "kl_mean": "KL divergence, nats a token",
    "kl_p999": "KL divergence, 99.9 % of the tokens below",
    "top1_agreement": "top-1 agreement",
    "nmse": "normalized squared error of the logits",
    "max_abs_diff": "largest difference of a logit",
    "perplexity_reference": "perplexity of the reference",
    "perplexity_candidate": "perplexity of this model",
}


_SERVE = """
```
vllm serve MODEL --max-model-len 32768
```

`llama4-convert plan SOURCE --gpu NAME` counts which context fits onto which GPUs."""
_QUANTIZATION = """
## Quantization

Recipe {recipe}, format {format}. The error is that of the weights as a runtime reads them,
squared, over the squared weights; measured over every matrix in the pass that quantized it. The manifest has each.

{families}

The largest:

{worst}
"""
_PARITY = """
## Parity

`llama4-convert validate` against the source: {verdict}.
{parity.fields_different} field(s) of config.json and {parity.tensors_different} of {parity.tensors_compared:,} tensors differ; \
{parity.matrices_quantized:,} are quantized and held
against the error that their scheme can make. Logits of {runner} in {dtype}:

{metrics}
"""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What a card says of a validation; `metrics` has the values of `METRICS`, None for NaN and infinities."""

    passed: bool
    gates_failed: Sequence[str]
    fields_different: int
    tensors_different: int
    tensors_compared: int
    matrices_quantized: int
    runner: str
    dtype: str
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class Facts:
    """What a card is made of. `base_model` is the Hub's id of the model that this one was made of."""

    manifest: Manifest
    config: Mapping[str, Any]  # config.json
    parameters: int
    active_parameters: int | None
    parity: Parity | None = None
    base_model: str | None = None

    @property
    def text(self) -> Mapping[str, Any]:
        text = self.config.get("text_config") or self.config
        return text if isinstance(text, dict) else {}

    @property
    def has_vision(self) -> bool:
        return isinstance(self.config.get("vision_config"), dict)

    @property
    def moe_layers(self) -> int:
        """How many layers have experts."""
        layers = self.text.get("moe_layers")
        return len(layers) if isinstance(layers, list) else 0

    @property
    def published_as(self) -> str | None:
        """The published model of this size, with its variant if that is known; None if there is none."""
        experts = self.text.get("num_local_experts") if self.moe_layers else 0
        layers, width, dense = (self.text.get(f) for f in ("num_hidden_layers", "hidden_size", "intermediate_size_mlp"))
        sizes = (layers, width, experts, self.moe_layers, dense)
        name = next((name for known, name in _PUBLISHED.items() if sizes == known), None)
        is_instruct = self.manifest.options.get("variant") == "instruct"
        return f"{name}-Instruct" if name and is_instruct else name

    @property
    def base(self) -> str | None:
        if self.base_model is not None or not self.published_as or not self.manifest.options.get("variant"):
            return self.base_model
        return f"meta-llama/{self.published_as}"

    @property
    def recipe(self) -> str | None:
        recipe = self.manifest.options.get("recipe")
        return str(recipe["name"]) if isinstance(recipe, dict) else None

    @property
    def method(self) -> str | None:
        """The file format of what is quantized, if it is one of ours."""
        said = self.config.get("quantization_config")
        method = said.get("quant_method") if isinstance(said, dict) else None
        return method if method in FORMATS else None

    @property
    def schemes(self) -> list[str]:
        """As recipes call them."""
        if self.method != "compressed-tensors":
            return ["nf4"] if self.method else []
        groups = self.config["quantization_config"].get("config_groups")
        formats = [g.get("format") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
        return [scheme for form, scheme in _SCHEMES.items() if form in formats]


def render(facts: Facts) -> str:
    """The text of README.md."""
    manifest = facts.manifest
    template = (Path(__file__).parent / "templates" / "model_card.md.format").read_text(encoding="utf-8")
    tags = ["llama", "llama-4", *([facts.method] if facts.method else []), *facts.schemes, "llama4-convert"]
    schemes = f", {' and '.join(facts.schemes)}" if facts.schemes else ""
    text = template.format(
        license_link="LICENSE" if "LICENSE" in manifest.files else _LICENCE,
        base_model=_base_model(facts),
        pipeline_tag="image-text-to-text" if facts.has_vision else "text-generation",
        tags="\n".join(f"- {json.dumps(tag)}" for tag in tags),
        title=(facts.published_as or "Llama 4") + schemes,
        source=_source(manifest),
        tool=_code(manifest.tool),
        precision=_precision(facts),
        notes="".join(f"\n{note}" for note in _notes(manifest)),
        model=_model(facts),
        model_class="Llama4ForConditionalGeneration" if facts.has_vision else "Llama4ForCausalLM",
        runtimes=_runtimes(facts),
        quantization=_quantization(facts),
        parity=_parity(facts.parity) if facts.parity else "",
        fingerprints=_fingerprints(manifest),
        manifest=NAME,
        licence=_LICENCE,
        licence_files="\n".join(_licence_files(manifest)),
    )
    return text.rstrip("\n") + "\n"


def _base_model(facts: Facts) -> str:
    if not facts.base:
        return ""
    # Without it the Hub takes what has a base model for a fine-tune of that model.
    relation = "base_model_relation: quantized\n" if facts.schemes else ""
    return f"base_model: {facts.base}\n{relation}"


def _source(manifest: Manifest) -> str:
    if manifest.source.get("layout") == "meta":
        return f"the checkpoint in Meta's original format ({manifest.source.get('ranks')} rank files)"
    return "a Transformers directory"


def _precision(facts: Facts) -> str:
    dtype = facts.manifest.options.get("dtype")
    rest = f"tensors are cast to {_code(dtype)}." if dtype else "tensors are the source's, bit by bit."
    if facts.schemes:
        return f"Feed-forward weights are quantized by the recipe {_code(facts.recipe)}; all other {rest}"
    return f"All {rest}"


def _notes(manifest: Manifest) -> Iterator[str]:
    if manifest.options.get("text_only"):
        yield "The vision tower was left out: this is the language model alone."
    if manifest.dropped:
        yield "What the source carries beside the weights (RoPE angles, training state) was dropped; the manifest lists it."
    if SOURCE_CARD in manifest.files:
        yield f"The source's own card is [{SOURCE_CARD}]({SOURCE_CARD})."


def _model(facts: Facts) -> str:
    """The table of sizes."""

    def size(name: str, config: Mapping[str, Any] = facts.text) -> str:
        value = config.get(name)
        return f"{value:,}" if type(value) is int else "-"

    rows = [("parameters", parameters(facts.parameters).removesuffix(" parameters"))]
    if active := facts.active_parameters:
        rows.append(("active for a token of text", parameters(active).removesuffix(" parameters")))
    rows.append(("layers", size("num_hidden_layers")))
    rows.append(("width", size("hidden_size")))
    rows.append(("attention heads, KV heads", f"{size('num_attention_heads')}, {size('num_key_value_heads')}"))
    if layers := facts.moe_layers:
        chosen, experts = size("num_experts_per_tok"), size("num_local_experts")
        rows.append(("experts", f"{experts} in each of {layers} layers, {chosen} chosen a token, and a shared one"))
    rows.append(("vocabulary", size("vocab_size")))
    rows.append(("context, tokens", size("max_position_embeddings")))
    vision = facts.config.get("vision_config")
    if isinstance(vision, dict):
        rows.append(("vision tower", f"{size('num_hidden_layers', vision)} layers"))
    if variant := facts.manifest.options.get("variant"):
        rows.append(("variant", _code(variant)))
    return _table(("", ""), rows)


def _runtimes(facts: Facts) -> str:
    """What loads it."""
    if facts.method == "bitsandbytes":
        return "This format (bitsandbytes NF4) is Transformers': `pip install bitsandbytes`. vLLM does not load such experts."
    if facts.method:
        widens = " and widens int4 weights to bf16 as it loads them" if "int4" in facts.schemes else ""
        needs = f"Transformers needs `pip install {facts.method}` for this format{widens}."
    else:
        needs = "Any runtime that loads Llama 4 from a Transformers directory loads this one."
    return f"{needs}\n{_SERVE}"


def _quantization(facts: Facts) -> str:
    """The section on what quantizing cost, or nothing."""
    if not facts.manifest.errors:
        return ""
    measured = describe_errors(facts.manifest.errors)

    def row(name: str, error: QuantizationError) -> tuple[str, ...]:
        sqnr = "-" if error.sqnr_db is None else f"{error.sqnr_db:.2f}"
        return in_words(name), f"{error.matrices:,}", f"{error.relative_mse:.4g}", sqnr

    families = [row(family, error) for family, error in measured.families.items()]
    worst = [(_code(error.module), f"{error.relative_mse:.4g}") for error in measured.worst]
    return _QUANTIZATION.format(
        recipe=_code(facts.recipe),
        format=_code(facts.method),
        families=_table(
            ("weights", "matrices", "relative squared error", "SQNR, dB"), [*families, row("all", measured)]
        ),
        worst=_table(("module", "relative squared error"), worst),
    )


def _parity(parity: Parity) -> str:
    failed = ", ".join(parity.gates_failed) or "fields or tensors differ"
    return _PARITY.format(
        verdict="passed" if parity.passed else f"FAILED ({failed})",
        parity=parity,
        runner=_code(parity.runner),
        dtype=_code(parity.dtype),
        metrics=_table(("", ""), [(text, _figure(parity.metrics.get(name))) for name, text in METRICS.items()]),
    )


def _fingerprints(manifest: Manifest) -> str:
    """The section with the digests of the source's files, or nothing."""
    digests = manifest.source.get("sha256")
    if not isinstance(digests, dict):
        return ""
    if manifest.source.get("layout") == "meta":
        what = "of a `.pth` file over the names, sizes and CRCs of its records, of all others over their bytes"
    else:
        what = "of a weights file over its header and samples of each tensor, of all others over their bytes"
    rows = [(_code(name), _code(digest)) for name, digest in sorted(digests.items())]
    return f"\n## Source\n\nSHA-256 {what}:\n\n{_table(('file', 'fingerprint'), rows)}\n"


def _licence_files(manifest: Manifest) -> Iterator[str]:
    if notices := [_code(name) for name in sorted(manifest.files) if is_notice(name)]:
        yield f"Texts that came with the source: {', '.join(notices)}."
    if "LICENSE" not in manifest.files:
        yield "The source came without a LICENSE file: add it before you pass this on."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _figure(value: float | None) -> str:
    return f"{value:,}" if type(value) is int else f"{value:.4g}" if isinstance(value, float) else "not a number"


def _code(text: object) -> str:
    """Text from a file that nobody vouches for, so that it cannot end its cell or its line."""
    plain = printable(str(text), 200).translate({ord("`"): "?", ord("|"): "?"})
    return f"`{plain}`"
