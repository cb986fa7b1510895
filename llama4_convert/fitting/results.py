"""What `fit` returns, and `plan` as `fit`: the keys of `--json`, in its order, each with what it says. Sizes are bytes."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType, structs


class FamilySizes(Struct, frozen=True):
    """Sizes by family of tensors. Families that runtimes split over GPUs alike are one field."""

    routed_experts: int = 0
    """all experts of all layers"""
    shared_expert: int = 0
    """the shared experts of all layers"""
    dense_mlp: int = 0
    """the feed-forward blocks of dense layers"""
    keys_values: int = 0
    """the projections of keys and values of the text model"""
    replicated: int = 0
    """what every GPU holds whole: routers, norms, embeddings of positions"""
    other: int = 0
    """everything else: embeddings, queries and outputs of attention, output head, vision"""

    @property
    def total(self) -> int:
        return sum(structs.astuple(self))


class GpuMemory(Struct, frozen=True, kw_only=True):
    """What takes memory of one GPU in a runtime, at the context of its `command`."""

    weights: int
    """on the fullest GPU"""
    kv_cache: int
    """of all sequences"""
    activations: int
    """what can be computed of them, and the allowance at least"""
    context_overhead: int
    """allowance for CUDA and the runtime"""


class RuntimeVerdict(Struct, frozen=True, kw_only=True):
    """Whether and how one runtime serves the checkpoint."""

    runtime: str
    """a name of runtimes.toml"""
    fits: bool
    """whether it holds the context that was asked; where none was, 8,192 tokens"""
    max_context: int
    """the most tokens that each sequence can have; 0 where the weights leave no room, or are not loaded"""
    max_context_fp8_kv: int | None
    """the same with an FP8 KV cache; null where there is none"""
    command: str
    """what serves the context that was asked, or where it does not fit or none was asked, the largest; empty where none fits"""
    note: str
    """what a user must know beside it, or why it does not fit"""
    memory: GpuMemory | None
    """null where the runtime does not load the checkpoint"""


class FitVerdict(Struct, frozen=True, kw_only=True):
    """Whether GPUs of a kind hold a checkpoint in one format, in which runtimes, and what would fit instead."""

    recipe: str | UnsetType | None = UNSET
    """of `fit`: the recipe that is tried; null: PATH as it is"""
    name: str | UnsetType = UNSET
    """of `fit`: the recipe or the format"""
    convert: str | UnsetType = UNSET
    """of `fit`: the command that makes it; empty for PATH as it is"""
    gpu: str
    """a key of gpus.toml"""
    n_gpus: int
    """how many of them"""
    gpu_bytes: int
    """memory of one GPU, as its driver reports it"""
    weight_bytes: int
    """of all GPUs together"""
    weight_bytes_by_kind: FamilySizes
    """the same by family of tensors"""
    format: str | None
    """as runtimes know it: `compressed-tensors-int4`; null: bf16"""
    context: int | None
    """tokens that were asked for; null: none were"""
    sequences: int
    """how many at a time, of that many tokens each"""
    fits: bool
    """whether any runtime holds it"""
    weights: int
    """of one GPU in vLLM, as the next three"""
    kv_cache: int
    """what is left for the KV cache"""
    activations: int
    """what is kept free for activations"""
    context_overhead: int
    """allowance for CUDA and the runtime"""
    kv_bytes_per_token_per_layer: int
    """of one GPU"""
    kv_bytes_per_token: int
    """in all full layers, which keep every token"""
    kv_bytes_of_chunked_layers: int
    """at most, of a sequence, where the runtime keeps no more than a chunk of them"""
    runtimes: tuple[RuntimeVerdict, ...]
    """one a runtime"""
    best_recipe: str | None
    """the built-in recipe with the least error that vLLM and SGLang both load on these GPUs with the context asked, or where none
    was asked with 131,072 tokens; else the one with the most context; `bf16`: none is needed; null: none fits"""
    elsewhere: tuple[str, ...]
    """where nothing fits: GPUs that hold this format"""
    advice: str
    """what fits instead, in words; empty where anything fits"""


class Fit(Struct, frozen=True, kw_only=True):
    """What `fit` returns: whether GPUs hold a checkpoint, in which format and runtime, with how much context."""

    path: str
    """PATH"""
    layout: str
    """`meta` or `transformers`"""
    model: str
    """what PATH is, in words"""
    max_context: int
    """tokens that the model is made for"""
    context: int | None
    """--context; null where none was asked"""
    sequences: int
    """--sequences"""
    kv_cache_dtype: str
    """--kv-cache-dtype"""
    fits: bool
    """whether anything fits"""
    fit: FitVerdict
    """the advised one of `verdicts`: the recipe with the least error that reaches the context, on the smallest GPU on which
    anything fits; where nothing fits, what comes nearest"""
    verdicts: tuple[FitVerdict, ...]
    """one a format and GPU"""
    advice: str
    """in words"""
    warnings: list[str]
    """what a user should know of the files that were read"""
