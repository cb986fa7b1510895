"""The runtimes that serve a Llama 4: what each loads, what it takes of a GPU, and how much context that leaves.

What a GPU has is its memory; of that an allowance goes to CUDA and the runtime, and the rest to weights, activations and KV
cache. vLLM and SGLang split tensors over several GPUs, Transformers whole layers. A chunked layer needs no token of an earlier
chunk, so a runtime that knows this keeps few; a full layer keeps all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llama4.geometry import Geometry
from llama4_convert.fitting.gpus import Gpu, allowances
from llama4_convert.fitting.memory import (
    BF16,
    BLOCK,
    KVCache,
    Weights,
    all_experts_bytes,
    chunked_layers,
    grouped_layers,
    kv_bytes,
    prefill_bytes,
    repeated_kv_bytes,
)

Runtime = Literal["vllm", "vllm-no-hybrid-cache", "sglang", "transformers"]
RUNTIMES: tuple[Runtime, ...] = ("vllm", "vllm-no-hybrid-cache", "sglang", "transformers")
FORMATS = ("compressed-tensors-int4", "compressed-tensors-fp8", "compressed-tensors-mixed", "bitsandbytes-nf4")
# Where nobody asks for a context, this much must be possible for a model to fit.
LEAST_CONTEXT = 8192

# Tokens of a prompt at a time. The commands say so, since both runtimes choose by the GPU otherwise.
_VLLM_PIECE = 2048
# Two are under way where scheduling is asynchronous, as it is by default (`max_in_flight_tokens` in vLLM's config/vllm.py).
_VLLM_PIECES_AT_A_TIME = 2
SGLANG_PIECE = 8192
# A server takes so many requests at a time at least. Left alone vLLM makes room for the logits of 1,024 on 70 GiB and more.
_LEAST_BATCH = 16


@dataclass(frozen=True)
class Case:
    """What is asked: these weights, in this format, of this model, on these GPUs, with these sequences at a time."""

    geometry: Geometry
    weights: Weights
    format: str | None  # None: bf16; else one of FORMATS
    gpu: Gpu
    n_gpus: int = 1
    context: int | None = None
    sequences: int = 1
    fp8_kv: bool = False
    group: int | None = None  # inputs that share a scale, where tensor parallelism must not part them
    max_context: int = 1
    directory: str = "DIR"

    @property
    def needed(self) -> int:
        """Tokens without which the verdict is no."""
        return min(LEAST_CONTEXT, self.max_context) if self.context is None else self.context

    @property
    def usable(self) -> int:
        """Bytes of one GPU for weights, activations and KV cache."""
        return self.gpu.nbytes - allowances().overhead


@dataclass(frozen=True)
class Memory:
    """What the case takes of one GPU in one runtime."""

    weights: int
    cache: KVCache
    activations: int  # whatever the context
    activations_per_token: int  # of context, in all sequences
    spare: int  # of `activations`, what such tokens may fill before more is taken

    def activation_bytes(self, context: int) -> int:
        return self.activations + max(0, self.activations_per_token * context - self.spare)

    def nbytes(self, context: int, sequences: int) -> int:
        return self.weights + self.activation_bytes(context) + self.cache.nbytes(context, sequences)


def memory(case: Case, runtime: Runtime) -> Memory:
    """Weights, KV cache and activations of one GPU."""
    g, n, least = case.geometry, case.n_gpus, allowances().activations
    chunked = chunked_layers(g)
    full = g.n_layers - chunked
    token = kv_bytes(g, 1 if runtime == "transformers" else n, 1 if has_fp8_kv(case, runtime) else BF16)
    chunk = g.chunk_size or 0
    if runtime == "transformers":
        weights = case.weights
        if case.format is not None and case.format.startswith("compressed-tensors"):
            bf16 = Weights.of_geometry(g)
            weights = bf16 if bf16.total > weights.total else weights
        if n > 1:  # consecutive layers, of which at most so many are full, and at most one more than an even share
            layers = min(g.n_layers, -(-g.n_layers // n) + 1)
            interval = g.nope_interval or g.n_layers + 1
            full = min(full, -(-layers // interval)) if chunked else layers
            chunked = min(chunked, layers - layers // interval)
        piece = transformers_piece(g, case.sequences)
        taken = case.sequences * piece * all_experts_bytes(g)
        return Memory(
            weights=weights.of_whole_layers(n, g),
            cache=KVCache(token, full, chunked, chunk, 0),
            activations=max(least, taken),
            activations_per_token=case.sequences * repeated_kv_bytes(g),
            spare=max(0, least - taken),
        )
    cache = KVCache(token, full, chunked, chunk, 0)
    if not holds_chunks(g, runtime):
        cache = KVCache(token, g.n_layers, 0, 0, 0)
    elif runtime == "vllm":
        cache = KVCache(token, *grouped_layers(full, chunked), chunk, 0)
    elif runtime == "sglang":
        cache = KVCache(token, full, chunked, chunk, SGLANG_PIECE)
    # vLLM keeps the chunk and the pieces that are being read: what it writes of them into chunked layers counts here.
    piece = SGLANG_PIECE if runtime == "sglang" else vllm_piece(case)
    written = token * cache.chunked_layers * piece * _VLLM_PIECES_AT_A_TIME if runtime == "vllm" else 0
    taken = prefill_bytes(g, piece, batch(case), n) + written
    return Memory(case.weights.of_tensor_parallel(n, g.n_kv_heads), cache, max(least, taken), 0, 0)


def batch(case: Case) -> int:
    """Requests at a time that the commands allow."""
    return max(_LEAST_BATCH, case.sequences)


def vllm_piece(case: Case) -> int:
    return max(_VLLM_PIECE, batch(case))  # vLLM asks for a token a request at least


def has_fp8_kv(case: Case, runtime: Runtime) -> bool:
    return case.fp8_kv and case.gpu.fp8 and runtime != "transformers"


def holds_chunks(geometry: Geometry, runtime: Runtime) -> bool:
    """Whether the runtime keeps no more than a chunk of the layers that need no more."""
    if not chunked_layers(geometry) or runtime == "vllm-no-hybrid-cache":
        return False
    if runtime == "sglang":
        # It knows by the architecture's name which layers are chunked: those of the published models, with a vision tower.
        return geometry.vision is not None and geometry.nope_interval == 4
    return True


def transformers_piece(geometry: Geometry, sequences: int = 1) -> int:
    """Tokens of each prompt at a time that half the allowance can take: Transformers runs every expert on every token."""
    piece = max(1, allowances().activations // 2 // (sequences * all_experts_bytes(geometry)))
    return min(4096, 1 << piece.bit_length() - 1)


def largest_context(case: Case, of: Memory) -> int:
    """Tokens a sequence, in whole blocks; at most the model's own. 0 where not even a block has room."""
    last = -(-case.max_context // BLOCK)

    def fits(blocks: int) -> bool:
        return of.nbytes(min(blocks * BLOCK, case.max_context), case.sequences) <= case.usable

    low, high = 0, last
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return min(low * BLOCK, case.max_context)


def refusal(case: Case, runtime: Runtime) -> str:
    """Why the runtime does not load this at all, or an empty text."""
    if runtime == "transformers":
        return ""  # every format, and GPUs share out layers, not heads
    if case.format == "bitsandbytes-nf4":
        return "does not load bitsandbytes experts; recipe int4 is for it"
    if case.format == "compressed-tensors-mixed" and runtime == "sglang":
        return "not known to load two schemes in one checkpoint; recipe int4 is for it"
    return _split_refusal(case.geometry, case.n_gpus, case.format, case.group)


def _split_refusal(g: Geometry, n: int, format: str | None, group: int | None) -> str:
    """Why `n` GPUs cannot split the tensors: each runtime asserts these when it builds its layers."""
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
            kind = "FP8 blocks" if format == "compressed-tensors-fp8" else "int4 groups"
            return f"{kind} of {group} do not divide the {width // n:,} of {what}'s width {width:,} that each of {n} GPUs has"
    return ""
