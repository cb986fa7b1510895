"""A checkpoint on GPUs in a runtime: the memory that it takes there, and the context for which the rest has room.

A GPU's memory, less an allowance for CUDA and the runtime, is for weights, activations and KV cache. A chunked layer needs no
token of an earlier chunk, so a runtime that knows this keeps few; a full layer keeps all.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from llama4.geometry import Geometry
from llama4_convert.fitting.gpus import Gpu, allowances
from llama4_convert.fitting.memory import (
    BF16_BYTES,
    BLOCK_TOKENS,
    KVCache,
    Weights,
    all_experts_bytes,
    grouped_layers,
    kv_bytes,
    layer_counts,
    layers_on_fullest_gpu,
    prefill_bytes,
    repeated_kv_bytes,
)
from llama4_convert.fitting.runtimes import Runtime

# Where nobody asks for a context, this much must be possible for a model to fit.
LEAST_CONTEXT_TOKENS = 8192


@dataclass(frozen=True)
class Deployment:
    """These weights, in this format, of this model, on these GPUs, with these sequences at a time."""

    geometry: Geometry
    weights: Weights
    format: str | None  # one of runtimes.FORMATS; None: bf16
    gpu: Gpu
    n_gpus: int = 1
    context: int | None = None  # tokens of a sequence that must fit; None: nobody asked
    sequences: int = 1
    fp8_kv: bool = False  # an FP8 KV cache is asked
    group: int | None = None  # inputs that share a scale, where tensor parallelism must not part them
    max_context: int = 1  # tokens that the model is made for
    directory: str = "DIR"
    unquantized: Weights | None = None  # the weights before quantization; None: as the geometry says, in bf16

    @property
    def gpus(self) -> str:
        """In words: "h100-80gb", "2 x h100-80gb"."""
        return self.gpu.key if self.n_gpus == 1 else f"{self.n_gpus} x {self.gpu.key}"

    @property
    def needed_context(self) -> int:
        """Tokens of a sequence without which the verdict is no."""
        return min(LEAST_CONTEXT_TOKENS, self.max_context) if self.context is None else self.context

    @property
    def usable_bytes(self) -> int:
        """What one GPU has for weights, activations and KV cache."""
        return self.gpu.nbytes - allowances().overhead.nbytes


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one GPU, the fullest, in a runtime."""

    weights: int
    cache: KVCache
    derived_activations: int  # what can be computed of them, whatever the context
    activations_per_token: int = 0  # of context, in all sequences

    def activations(self, context: int = 0) -> int:
        """With sequences of `context` tokens: what can be computed, and the allowance at least."""
        derived = self.derived_activations + self.activations_per_token * context
        return max(allowances().activations.nbytes, derived)

    def nbytes(self, context: int, sequences: int) -> int:
        return self.weights + self.activations(context) + self.cache.nbytes(context, sequences)


def memory_use(deployment: Deployment, runtime: Runtime) -> MemoryUse:
    """Weights, KV cache and activations of one GPU, by the formulas of docs/fit.md."""
    g = deployment.geometry
    weights = deployment.weights
    if deployment.format in runtime.decompresses:
        weights = max(weights, Weights.from_geometry(g), key=lambda w: w.total)
    full, chunked = layer_counts(g) if keeps_chunks(g, runtime) else (g.n_layers, 0)
    if runtime.splits == "tensors":
        sharers = deployment.n_gpus
        weight_bytes = weights.split_by_tensors(sharers, g.n_kv_heads)
    else:
        sharers = 1
        weight_bytes = weights.split_by_layers(deployment.n_gpus, g)
        full, chunked = layers_on_fullest_gpu(g, deployment.n_gpus, full, chunked)
    if runtime.pads_layer_groups:
        full, chunked = grouped_layers(full, chunked)
    piece = prefill_tokens(deployment, runtime)
    token = kv_bytes(g, sharers, 1 if has_fp8_kv(deployment, runtime) else BF16_BYTES)
    cache = KVCache(token, full, chunked, g.chunk_size or 0, piece * runtime.pieces_in_cache)
    if runtime.prefill_tokens is None:
        every_expert = deployment.sequences * piece * all_experts_bytes(g)
        return MemoryUse(weight_bytes, cache, every_expert, deployment.sequences * repeated_kv_bytes(g))
    in_flight = token * cache.chunked_layers * piece * runtime.pieces_in_flight
    prefill = prefill_bytes(g, piece, requests(deployment, runtime), sharers)
    return MemoryUse(weight_bytes, cache, prefill + in_flight)


def requests(deployment: Deployment, runtime: Runtime) -> int:
    """Requests at a time that the command allows."""
    return max(runtime.least_requests, deployment.sequences)


def prefill_tokens(deployment: Deployment, runtime: Runtime) -> int:
    """Tokens of a prompt at a time."""
    if runtime.prefill_tokens is None:
        half = allowances().activations.nbytes // 2
        piece = max(1, half // (deployment.sequences * all_experts_bytes(deployment.geometry)))
        return min(4096, 1 << piece.bit_length() - 1)
    least = requests(deployment, runtime) if runtime.tokens_for_every_request else 1
    return max(least, runtime.prefill_tokens)


def has_fp8_kv(deployment: Deployment, runtime: Runtime) -> bool:
    """Whether the KV cache is FP8: where that is asked, and the runtime and the GPU have it."""
    return deployment.fp8_kv and deployment.gpu.fp8 and "fp8" in runtime.kv_dtypes


def keeps_chunks(geometry: Geometry, runtime: Runtime) -> bool:
    """Whether the model has chunked layers of which the runtime keeps no more than a chunk."""
    _, chunked = layer_counts(geometry)
    is_published = geometry.vision is not None and geometry.nope_interval == 4
    return chunked > 0 and (runtime.keeps_chunks == "always" or (runtime.keeps_chunks != "never" and is_published))


def largest_context(deployment: Deployment, runtime: Runtime) -> int:
    """Tokens a sequence, in whole blocks; at most the model's own. 0 where nothing is loaded, or not even a block has room."""
    if refusal(deployment, runtime):
        return 0
    use, longest = memory_use(deployment, runtime), deployment.max_context

    def is_too_much(blocks: int) -> bool:
        tokens = min(blocks * BLOCK_TOKENS, longest)
        return use.nbytes(tokens, deployment.sequences) > deployment.usable_bytes

    blocks = bisect_left(range(1, -(-longest // BLOCK_TOKENS) + 1), True, key=is_too_much)
    return min(blocks * BLOCK_TOKENS, longest)


def refusal(deployment: Deployment, runtime: Runtime) -> str:
    """Why the runtime does not load the deployment at all, or an empty text."""
    if reason := runtime.refuses.get(deployment.format or "bf16"):
        return reason
    g = deployment.geometry
    if runtime.refuses_text_only and g.vision is None and g.moe_layers:
        return runtime.refuses_text_only
    return _split_refusal(deployment) if runtime.splits == "tensors" else ""


def _split_refusal(deployment: Deployment) -> str:
    """Why tensor parallelism cannot split the tensors: each runtime asserts these when it builds its layers."""
    g, n, group = deployment.geometry, deployment.n_gpus, deployment.group
    if n == 1:
        return ""
    if g.n_heads % n or (g.n_kv_heads % n and n % g.n_kv_heads):
        return f"{n} GPUs cannot share {g.n_heads} heads with {g.n_kv_heads} KV heads evenly"
    if g.vision is not None and g.vision.n_heads % n:
        return f"{n} GPUs cannot share the {g.vision.n_heads} heads of the vision tower evenly"
    n_moe = len(g.moe_layers)
    widths = {
        "an expert": g.expert_dim or 0 if n_moe else 0,
        "a dense MLP": g.dense_dim or 0 if n_moe < g.n_layers else 0,
    }
    for what, width in widths.items():
        if width % n:
            return f"{n} GPUs cannot share {what}'s width of {width:,} evenly"
        if group is not None and width // n % group:
            kind = "FP8 blocks" if deployment.format == "compressed-tensors-fp8" else "int4 groups"
            return f"{kind} of {group} do not divide the {width // n:,} of {what}'s width {width:,} that each of {n} GPUs has"
    return ""
