"""The model card: README.md of an output, as the Hub reads it. What it is, from where, by which recipe, what was measured.

A function of the manifest and of config.json, so that `convert` and `card_file` write the same: no times, paths or machines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import to_builtins

from llama4_convert.checkpoints.families import in_words
from llama4_convert.checkpoints.manifest import NAME, Manifest, describe_errors
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
_METRICS = {
    "tokens": "tokens compared",
    "kl_mean": "KL divergence, nats a token",
    "kl_p999": "KL divergence, 99.9 % of the tokens below",
    "top1_agreement": "top-1 agreement",
    "nmse": "normalized squared error of the logits",
    "max_abs_diff": "largest difference of a logit",
    "perplexity_reference": "perplexity of the reference",
    "perplexity_candidate": "perplexity of this model",
}


@dataclass(frozen=True)
class Facts:
    """What a card tells. `validation` is what `validate --json` printed, `base_model` the Hub's id of what this was made of."""

    manifest: Manifest
    config: Mapping[str, Any]  # config.json
    parameters: int
    active_parameters: int | None
    validation: Mapping[str, Any] | None = None
    base_model: str | None = None

    @property
    def text(self) -> Mapping[str, Any]:
        text = self.config.get("text_config") or self.config
        return text if isinstance(text, dict) else {}

    @property
    def has_vision(self) -> bool:
        return isinstance(self.config.get("vision_config"), dict)

    @property
    def published_as(self) -> str | None:
        """The published model of this size, with its variant if that is known; None if there is none."""
        moe = self.text.get("moe_layers")
        moe_layers = len(moe) if isinstance(moe, list) else 0
        experts = self.text.get("num_local_experts") if moe_layers else 0
        layers, width, dense = (self.text.get(f) for f in ("num_hidden_layers", "hidden_size", "intermediate_size_mlp"))
        sizes = (layers, width, experts, moe_layers, dense)
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
    sections = (
        _front_matter(facts),
        _what(facts),
        _model(facts),
        _use(facts),
        _quantization(facts),
        _validation(facts),
        _source(facts),
        _check(),
        _licence(facts),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _front_matter(facts: Facts) -> list[str]:
    tags = ["llama", "llama-4", *([facts.method] if facts.method else []), *facts.schemes, "llama4-convert"]
    base = [f"base_model: {facts.base}"] if facts.base else []
    # Unsaid, the Hub takes what has a base model for a fine-tune of it.
    relation = ["base_model_relation: quantized"] if facts.base and facts.schemes else []
    return [
        "---",
        "license: other",
        "license_name: llama4",
        f"license_link: {'LICENSE' if 'LICENSE' in facts.manifest.files else _LICENCE}",
        *base,
        *relation,
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if facts.has_vision else 'text-generation'}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
        "---",
    ]


def _what(facts: Facts) -> list[str]:
    options, source = facts.manifest.options, facts.manifest.source
    name = facts.published_as or "Llama 4"
    kinds = f", {' and '.join(facts.schemes)}" if facts.schemes else ""
    if source.get("layout") == "meta":
        of = f"the checkpoint in Meta's original format ({source.get('ranks')} rank files)"
    else:
        of = "a Transformers directory"
    if facts.schemes:
        done = f"Feed-forward weights are quantized by the recipe {_code(facts.recipe)}; "
    else:
        done = ""
    rest = (
        f"tensors are cast to {_code(options['dtype'])}"
        if options.get("dtype")
        else "tensors are the source's, bit by bit"
    )
    lines = [
        f"# {name}{kinds}",
        "",
        "Built with Llama.",
        "",
        f"Weights in the layout of Hugging Face Transformers, made of {of} by {_code(facts.manifest.tool)}.",
        f"{done}{'all other' if done else 'All'} {rest}.",
    ]
    if options.get("text_only"):
        lines.append("The vision tower was left out: this is the language model alone.")
    if facts.manifest.dropped:
        lines.append(
            "What the source carries beside the weights (RoPE angles, training state) was dropped; the manifest lists it."
        )
    if SOURCE_CARD in facts.manifest.files:
        lines.append(f"The source's own card is [{SOURCE_CARD}]({SOURCE_CARD}).")
    return lines


def _model(facts: Facts) -> list[str]:
    text, vision = facts.text, facts.config.get("vision_config")
    moe = text.get("moe_layers")
    layers = len(moe) if isinstance(moe, list) else 0
    active = facts.active_parameters
    rows = [
        ("parameters", parameters(facts.parameters).removesuffix(" parameters")),
        *([("active for a token of text", parameters(active).removesuffix(" parameters"))] if active else []),
        ("layers", _number(text.get("num_hidden_layers"))),
        ("width", _number(text.get("hidden_size"))),
        (
            "attention heads, KV heads",
            f"{_number(text.get('num_attention_heads'))}, {_number(text.get('num_key_value_heads'))}",
        ),
    ]
    if layers:
        chosen, experts = _number(text.get("num_experts_per_tok")), _number(text.get("num_local_experts"))
        rows.append(("experts", f"{experts} in each of {layers} layers, {chosen} chosen a token, and a shared one"))
    rows.append(("vocabulary", _number(text.get("vocab_size"))))
    rows.append(("context, tokens", _number(text.get("max_position_embeddings"))))
    if isinstance(vision, dict):
        rows.append(("vision tower", f"{_number(vision.get('num_hidden_layers'))} layers"))
    if variant := facts.manifest.options.get("variant"):
        rows.append(("variant", _code(variant)))
    return ["## Model", "", *_table(("", ""), rows)]


def _use(facts: Facts) -> list[str]:
    model = "Llama4ForConditionalGeneration" if facts.has_vision else "Llama4ForCausalLM"
    lines = [
        "## Use",
        "",
        "`MODEL` stands for the name of this repository, or the directory.",
        "",
        "```python",
        f"from transformers import AutoTokenizer, {model}",
        "",
        f'model = {model}.from_pretrained("MODEL", dtype="auto", device_map="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("MODEL")',
        "```",
        "",
    ]
    if facts.method == "bitsandbytes":
        return [
            *lines,
            "This format (bitsandbytes NF4) is Transformers': `pip install bitsandbytes`. vLLM does not load such experts.",
        ]
    if facts.method:
        lines.append(
            f"Transformers needs `pip install {facts.method}` for this format"
            + (" and widens int4 weights to bf16 as it loads them." if "int4" in facts.schemes else ".")
        )
    else:
        lines.append("Any runtime that loads Llama 4 from a Transformers directory loads this one.")
    lines += ["", "```", "vllm serve MODEL --max-model-len 32768", "```", ""]
    return [*lines, "`llama4-convert plan SOURCE --gpu NAME` counts which context fits onto which GPUs."]


def _quantization(facts: Facts) -> list[str]:
    if not facts.manifest.errors:
        return []
    told = to_builtins(describe_errors(facts.manifest.errors))

    def row(name: str, one: Mapping[str, Any]) -> tuple[str, ...]:
        sqnr = "-" if one["sqnr_db"] is None else f"{one['sqnr_db']:.2f}"
        return in_words(name), f"{one['matrices']:,}", f"{one['relative_mse']:.4g}", sqnr

    families = [row(family, one) for family, one in told["families"].items()]
    worst = [(_code(one["module"]), f"{one['relative_mse']:.4g}") for one in told["worst"]]
    return [
        "## Quantization",
        "",
        f"Recipe {_code(facts.recipe)}, format {_code(facts.method)}. The error is that of the weights as a runtime reads them,",
        "squared, over the squared weights; measured over every matrix in the pass that quantized it. The manifest has each.",
        "",
        *_table(("weights", "matrices", "relative squared error", "SQNR, dB"), [*families, row("all", told)]),
        "",
        "The largest:",
        "",
        *_table(("module", "relative squared error"), worst),
    ]


def _validation(facts: Facts) -> list[str]:
    told = facts.validation
    if told is None:
        return []
    verdict = (
        "passed" if told["passed"] else f"FAILED ({', '.join(told['gates_failed']) or 'fields or tensors differ'})"
    )
    quantized = sum(one["matrices"] for one in told["tensors_quantized"].values())
    rows = [(text, _figure(told.get(name))) for name, text in _METRICS.items()]
    fields, tensors, of = len(told["config_differences"]), len(told["tensors_different"]), told["tensors_compared"]
    return [
        "## Parity",
        "",
        f"`llama4-convert validate` against the source: {verdict}.",
        f"{fields} field(s) of config.json and {tensors} of {of:,} tensors differ; {quantized:,} are quantized and held",
        f"against the error that their scheme can make. Logits of {_code(told['runner'])} in {_code(told['dtype'])}:",
        "",
        *_table(("", ""), rows),
    ]


def _source(facts: Facts) -> list[str]:
    digests = facts.manifest.source.get("sha256")
    if not isinstance(digests, dict):
        return []
    if facts.manifest.source.get("layout") == "meta":
        of = "of a `.pth` file over the names, sizes and CRCs of its records, of all others over their bytes"
    else:
        of = "of a weights file over its header and samples of each tensor, of all others over their bytes"
    rows = [(_code(name), _code(digest)) for name, digest in sorted(digests.items())]
    return ["## Source", "", f"SHA-256 {of}:", "", *_table(("file", "fingerprint"), rows)]


def _check() -> list[str]:
    return [
        "## Check it",
        "",
        "```",
        "llama4-convert verify MODEL                           # every byte against the manifest's SHA-256",
        "llama4-convert validate MODEL --reference SOURCE      # fields, tensors and logits against the original",
        "```",
        "",
        f"The manifest is `{NAME}`: what this was made of, with which options, and a digest of every file.",
    ]


def _licence(facts: Facts) -> list[str]:
    files = sorted(facts.manifest.files)
    there = [_code(name) for name in files if is_notice(name)]
    lines = [
        "## Licence",
        "",
        f"Llama 4 and what derives from it are under the [Llama 4 Community License Agreement]({_LICENCE});",
        "its text decides, not this note. Among other things it asks that whoever passes the weights on",
        "",
        "- gives a copy of the agreement along, and keeps Meta's notice in a text file called Notice;",
        '- shows "Built with Llama" where the model is presented;',
        '- begins the name of a model that was made or improved with it with "Llama";',
        "",
        "and that all use follows the Acceptable Use Policy. Some grants exclude some users: see the LICENSE.",
    ]
    if there:
        lines.append(f"Texts that came with the source: {', '.join(there)}.")
    if "LICENSE" not in files:
        lines.append("The source came without a LICENSE file: add it before you pass this on.")
    return lines


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _number(value: object) -> str:
    return f"{value:,}" if type(value) is int else "-"


def _figure(value: object) -> str:
    return f"{value:,}" if type(value) is int else f"{value:.4g}" if isinstance(value, float) else "not a number"


def _code(text: object) -> str:
    """Text from a file that nobody vouches for, so that it cannot end its cell or its line."""
    plain = "".join(c if c.isprintable() and c not in "`|" else "?" for c in str(text)[:200])
    return f"`{plain}`"
