"""What `inspect` returns: the keys of its `--json`, in its order, each with what it says."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from llama4_convert.checkpoints.manifest import DroppedKey, NonFiniteTensor, QuantizationErrors


class Sizes(Struct, frozen=True, kw_only=True):
    """Sizes of the model, under the names of config.json; null where they are not known."""

    hidden_size: int | None
    """width of the model"""
    num_hidden_layers: int | None
    """layers of the text model"""
    num_attention_heads: int | None
    """heads of the queries"""
    num_key_value_heads: int | None
    """heads of the keys and values"""
    vocab_size: int | None
    """tokens of the vocabulary"""
    num_local_experts: int | None
    """routed experts of a layer that has any"""
    num_experts_per_tok: int | None
    """routed experts that a token meets in such a layer"""
    moe_layers: int | None
    """layers that have experts"""
    intermediate_size: int | None
    """width of an expert; of a model without experts that of its MLPs"""
    intermediate_size_mlp: int | None
    """width of the MLPs of layers without experts"""
    attention_chunk_size: int | None
    """tokens of an attention chunk"""
    no_rope_layer_interval: int | None
    """one in so many layers has no RoPE"""
    use_qk_norm: bool | None
    """whether queries and keys are normalized"""
    vision_layers: int | None
    """layers of the vision tower; null without one"""


class Share(Struct, kw_only=True):
    """What a family of tensors takes."""

    kind: str
    """the family: embeddings, attention, routed_experts ..."""
    tensors: int = 0
    """how many; in Meta's layout those of one rank"""
    parameters: int = 0
    """numbers of the model, each once, whatever they are stored as"""
    bytes: int = 0
    """what is stored; in Meta's layout by all ranks"""


class DtypeShare(Struct, kw_only=True):
    """What is stored in a dtype."""

    tensors: int = 0
    """how many"""
    bytes: int = 0
    """of all of them"""


class FamilySpelling(Struct, frozen=True, kw_only=True):
    """How Meta's layout spells the keys of a family that has several spellings."""

    kind: str
    """the family"""
    spelling: str
    """`published`, `module names` or `mixed`"""
    keys: list[str]
    """the keys that are used, `*` for the layer"""


class Spelling(Struct, frozen=True, kw_only=True):
    """Which of its spellings Meta's layout uses."""

    spelling: str
    """`published`: the keys of the published files; `module names`: those of Meta's modules; `mixed`: some of each"""
    kinds: list[FamilySpelling]
    """by family, for those that have several spellings"""


class QuantizedGroup(Struct, kw_only=True):
    """All matrices that are quantized alike."""

    scheme: str
    """`int4`, `fp8` or `nf4`; in Meta's layout the kind of its codes"""
    group_size: int | UnsetType = UNSET
    """int4: inputs that share a scale"""
    granularity: str | UnsetType = UNSET
    """fp8, and Meta's codes: what shares a scale"""
    block_size: int | UnsetType = UNSET
    """nf4: numbers that share a scale"""
    double_quant: bool | UnsetType = UNSET
    """nf4: whether the scales are quantized, too"""
    matrices: int = 0
    """how many"""
    parameters: int = 0
    """the numbers that they stand for"""
    bytes: int = 0
    """codes, scales and tables"""
    bits_per_weight: float = 0.0
    """8 x bytes / parameters"""
    kinds: dict[str, int]
    """family -> matrices"""


class StoredQuantization(Struct, frozen=True, kw_only=True):
    """What is quantized, and how."""

    method: str | None
    """`quant_method` of config.json; `meta` in Meta's layout"""
    format: str | None
    """the format or the type of code that config.json names"""
    groups: list[QuantizedGroup]
    """the matrices that are quantized alike"""
    ignored: list[str]
    """config.json's patterns of modules that are not quantized"""


class TensorEntry(Struct, frozen=True, kw_only=True):
    """A stored tensor."""

    name: str
    """its key"""
    dtype: str
    """as safetensors spells it"""
    shape: list[int]
    """in Meta's layout one rank's"""


class ManifestSummary(Struct, frozen=True, kw_only=True):
    """What the manifest of an output says, without its digests."""

    tool: str
    """what wrote the output"""
    source: dict[str, Any]
    """layout and fingerprints of what it was made from"""
    options: dict[str, Any]
    """those that decide bytes"""
    recipe: dict[str, Any] | None
    """the recipe; null without one"""
    files: int
    """files that the manifest lists"""
    complete: bool
    """whether the output is finished"""
    errors: QuantizationErrors | None
    """what quantizing cost; null where nothing was quantized"""


class TensorStatistics(Struct, frozen=True, kw_only=True):
    """What the numbers of a tensor are like, in Meta's layout over all ranks. A quantized matrix as the weight it stands for."""

    tensor: str
    """its key"""
    min: float | None
    """least finite number; null, as the next three, without one"""
    max: float | None
    """largest finite number"""
    mean: float | None
    """of the finite numbers"""
    std: float | None
    """standard deviation of the finite numbers"""
    zeros: int
    """how many"""
    nan: int
    """how many"""
    inf: int
    """how many"""
    histogram: list[tuple[int, int]]
    """[exponent e of 2, how many numbers have 2^e <= |x| < 2^(e + 1)], ascending"""


class Inspection(Struct, kw_only=True):
    """What a checkpoint in either layout holds."""

    path: str
    """PATH"""
    layout: Literal["meta", "transformers"]
    """whose files they are"""
    ranks: int | UnsetType = UNSET
    """rank files (Meta's layout)"""
    files: int | UnsetType = UNSET
    """weight files (Transformers' layout)"""
    geometry: Sizes
    """sizes, under the names of config.json"""
    parameters: int
    """numbers of the model, dequantized; in Meta's layout those that a conversion keeps"""
    active_parameters: int | None
    """those that a token of text meets; null where the numbers of experts are not known"""
    bytes: int
    """of all tensors"""
    by_kind: list[Share]
    """by family; of Meta's layout tensors of one rank, bytes of all"""
    dtypes: dict[str, DtypeShare]
    """by dtype, the one with most bytes first"""
    spelling: Spelling | None
    """which of its names Meta's layout uses; null in Transformers'"""
    quantization: StoredQuantization | None
    """what is quantized, and how; null where nothing is"""
    quantized: dict[str, int] | UnsetType = UNSET
    """matrices by scheme (Transformers' layout)"""
    tensors: list[TensorEntry]
    """every stored tensor"""
    dropped: list[DroppedKey] | UnsetType = UNSET
    """what `convert` would leave out (Meta's layout)"""
    nonfinite: list[NonFiniteTensor] | None = None
    """the tensors with NaN or infinities; null where nobody has counted"""
    manifest: ManifestSummary | None = None
    """of an output; else null"""
    stats: list[TensorStatistics] | UnsetType = UNSET
    """with --stats: what the numbers of each tensor are like"""
    warnings: list[str]
    """what a user should know of the files that were read"""
