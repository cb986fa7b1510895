"""Does it fit: whether a GPU holds the weights, how much context is left, which command serves it, and if not, what would fit.

All for one sequence with a bf16 KV cache. What a GPU has for weights and KV cache is its memory less what CUDA and the runtime
take beside them, less a workspace for activations; both sizes are those of an H100. A chunked layer needs no token
of an earlier chunk, so runtimes that know this keep few; a full layer keeps all.
"""

from __future__ import annotations

import difflib
import json
import math
import shlex
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

from llama4.geometry import Geometry
from llama4_convert.errors import UsageError

FORMATS = ("compressed-tensors-int4", "compressed-tensors-fp8", "compressed-tensors-mixed", "bitsandbytes-nf4")

# Of the 81,559 MiB of an H100, 74 GiB are left once CUDA, its graphs and the runtime have theirs.
CONTEXT_BYTES = (81559 << 20) - (74 << 30)
WORKSPACE_BYTES = 2 << 30
# The longest context of any published Llama 4 (Scout, instruct).
LONGEST_CONTEXT = 10_485_760
# Where nobody asks for a context, this much must be possible for a model to fit, and this much is what a recipe should reach.
LEAST_CONTEXT = 8192
GOOD_CONTEXT = 131_072

_BF16_SIZE = 2
_BLOCK = 16  # tokens; vLLM reserves whole blocks
_VLLM_PIECE = 2048  # tokens of a prompt at a time, whose activations, keys and values pass through the workspace

Runtime = Literal["vllm", "vllm-no-hybrid-cache", "sglang", "transformers"]
RUNTIMES: tuple[Runtime, ...] = ("vllm", "vllm-no-hybrid-cache", "sglang", "transformers")

# The built-in recipes, least error first: name, format, bits of a weight of (routed experts, shared experts, dense MLPs).
# int4 in groups of 128 with a bf16 scale; FP8 with a scale a row, which is next to nothing; NF4 with double quantization.
_RECIPES: tuple[tuple[str, str | None, tuple[float, float, float]], ...] = (
    ("bf16", None, (16, 16, 16)),
    ("fp8", "compressed-tensors-fp8", (8.003, 8.003, 8.003)),
    ("int4-experts", "compressed-tensors-int4", (4.125, 16, 16)),
    ("mixed", "compressed-tensors-mixed", (4.125, 8.003, 8.003)),
    ("int4", "compressed-tensors-int4", (4.125, 4.125, 4.125)),
    ("nf4", "bitsandbytes-nf4", (4.127, 4.127, 4.127)),
)


@dataclass(frozen=True)
class Gpu:
    key: str
    name: str
    nbytes: int  # of one, as its driver reports it
    fp8: bool  # multiplies in FP8


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has, by what recipes tell apart."""

    routed_experts: int
    shared_expert: int
    dense_mlp: int
    other: int

    @property
    def total(self) -> int:
        return self.routed_experts + self.shared_expert + self.dense_mlp + self.other


@dataclass(frozen=True)
class _Case:
    """What is asked: this many bytes of weights in this format, of this model, on these GPUs."""

    geometry: Geometry
    weight_bytes: int
    format: str | None
    gpu: Gpu
    n_gpus: int
    context: int | None
    max_context: int
    directory: str

    @property
    def needed(self) -> int:
        """Tokens without which the verdict is no."""
        return min(LEAST_CONTEXT, self.max_context) if self.context is None else self.context


@cache
def gpus() -> dict[str, Gpu]:
    """The GPUs of gpus.toml by key."""
    table = tomllib.loads(resources.files("llama4_convert").joinpath("gpus.toml").read_text(encoding="utf-8"))
    return {key: Gpu(key, row["name"], row["mib"] << 20, row["fp8"]) for key, row in table.items()}


def find_gpu(name: str) -> Gpu:
    """A GPU by its key ("h100-80gb"); case does not matter. Raises UsageError with the nearest known key."""
    known, wanted = gpus(), name.strip().lower()
    if wanted in known:
        return known[wanted]
    models = [key for key in known if key.split("-")[0] == wanted.split("-")[0]]
    near = models or difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
    raise UsageError(f"no GPU {name!r:.40} is known: {hint}")


def parameters(geometry: Geometry) -> Parameters:
    """Counts from the geometry alone, which must be complete. Raises ValueError where a size is still open."""
    g = geometry
    if g.vocab_size is None or g.n_experts is None or g.expert_dim is None or g.dense_dim is None:
        raise ValueError("the geometry is incomplete: fill it in from the tensors first")
    n_moe = len(g.moe_layers)
    attention = 2 * g.dim * (g.n_heads + g.n_kv_heads) * g.head_dim
    other = 2 * g.vocab_size * g.dim + g.dim + g.n_layers * (attention + 2 * g.dim) + n_moe * g.dim * g.n_experts
    if (v := g.vision) is not None:
        block = 4 * (v.dim * v.dim + v.dim) + 2 * v.dim * v.mlp_dim + v.mlp_dim + v.dim + 4 * v.dim
        embeddings = (v.patch_dim + 1 + v.n_patches + 1) * v.dim
        adapter = (v.shuffled_dim + v.output_dim) * v.output_dim
        other += embeddings + 4 * v.dim + v.n_layers * block + adapter + v.output_dim * g.dim
    expert = 3 * g.dim * g.expert_dim
    return Parameters(
        n_moe * g.n_experts * expert, n_moe * expert, (g.n_layers - n_moe) * 3 * g.dim * g.dense_dim, other
    )


def recipe_bytes(geometry: Geometry) -> dict[str, int]:
    """About how many bytes of weights each built-in recipe leaves (to 0.1 %), and "bf16" without one."""
    counts = parameters(geometry)
    quantized = (counts.routed_experts, counts.shared_expert, counts.dense_mlp)
    return {
        name: round(counts.other * 2 + sum(n * bits / 8 for n, bits in zip(quantized, widths, strict=True)))
        for name, _, widths in _RECIPES
    }


def fit(
    geometry: Geometry,
    weight_bytes: int,
    *,
    gpu: str,
    context: int | None,
    format: str | None,
    n_gpus: int = 1,
    max_context: int = LONGEST_CONTEXT,
    directory: str = "DIR",
) -> dict[str, Any]:
    """The verdict on a model whose weights take `weight_bytes` on disk, for one sequence of `context` tokens.

    `format` is how the weights are stored: None (bf16), or one of FORMATS, the first of which also stands for int4 of any
    group size, method and coverage. `context` None asks for LEAST_CONTEXT tokens at least. `max_context` is the model's
    max_position_embeddings, `directory` what the commands name.

    Returns the `fit` of the design's JSON. Of its `runtimes`, one a name of RUNTIMES: `fits`; `max_context`, 0 where the
    weights alone are too much; `command` for the context asked, else for the largest, and empty where there is
    nothing to serve; `note`. Bytes are those of one GPU, but for `weight_bytes`. `best_recipe` is the built-in recipe of
    the least error that vLLM and SGLang both load here with the context asked (or GOOD_CONTEXT), "bf16" for none, None if
    no recipe fits. `advice` says what fits instead; it is empty where any runtime fits.
    Raises UsageError for a GPU, a count or a context that cannot be.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be None or one of {', '.join(FORMATS)}, not {format!r}")
    if n_gpus < 1:
        raise UsageError(f"the number of GPUs must be at least 1, not {n_gpus}")
    if context is not None and context < 1:
        raise UsageError(f"the context must be at least 1 token, not {context}")
    case = _Case(geometry, weight_bytes, format, find_gpu(gpu), n_gpus, context, max_context, directory)
    runtimes = [_verdict(case, runtime) for runtime in RUNTIMES]
    fits = any(r["fits"] for r in runtimes)
    candidates = _recipes_that_fit(case)
    shard = _kv_bytes_a_layer(case, tensor_parallel=True)
    chunked = _chunked_layers(geometry)
    return {
        "gpu": case.gpu.key,
        "n_gpus": n_gpus,
        "gpu_bytes": case.gpu.nbytes,
        "weight_bytes": weight_bytes,
        "format": format,
        "context": context,
        "fits": fits,
        "budget": {
            "cuda_context_bytes": CONTEXT_BYTES,
            "workspace_bytes": WORKSPACE_BYTES,
            "weight_bytes": -(-weight_bytes // n_gpus),
            "kv_cache_bytes": max(0, _room(case, weight_bytes)),
        },
        "kv_bytes_per_token_per_layer": shard,
        "kv_bytes_per_token": shard * (geometry.n_layers - chunked),
        "kv_bytes_of_chunked_layers": shard * chunked * (geometry.chunk_size or 0),
        "runtimes": runtimes,
        "best_recipe": _best(case, candidates),
        "advice": "" if fits else _advice(case, candidates),
    }


def _chunked_layers(geometry: Geometry) -> int:
    return sum(geometry.is_chunked(layer) for layer in range(geometry.n_layers))


def _kv_bytes_a_layer(case: _Case, tensor_parallel: bool) -> int:
    """Bytes that a token takes in a layer, on one GPU: keys and values of its heads, or all heads of its share of the layers."""
    g, heads = case.geometry, case.geometry.n_kv_heads
    if tensor_parallel:
        return 2 * -(-heads // case.n_gpus) * g.head_dim * _BF16_SIZE  # more GPUs than heads: each holds a copy of one
    return -(-2 * heads * g.head_dim * _BF16_SIZE // case.n_gpus)


def _room(case: _Case, weight_bytes: int) -> int:
    """Bytes of one GPU for the KV cache; negative where the weights alone are too much."""
    return case.gpu.nbytes - CONTEXT_BYTES - WORKSPACE_BYTES - -(-weight_bytes // case.n_gpus)


def _largest_context(case: _Case, room: int, kv_bytes: int, held: int | None) -> int:
    """Tokens whose keys and values take `room`, when chunked layers hold at most `held` (None: all); whole blocks."""
    n_layers, chunked = case.geometry.n_layers, _chunked_layers(case.geometry)
    tokens = max(0, room) // (kv_bytes * n_layers)
    if held is not None and tokens > held:
        full = n_layers - chunked
        tokens = (room - kv_bytes * chunked * held) // (kv_bytes * full) if full else case.max_context
    return min(tokens // _BLOCK * _BLOCK, case.max_context)


def _verdict(case: _Case, runtime: Runtime) -> dict[str, Any]:
    refusal = _refusal(case, runtime)
    if refusal:
        return {"runtime": runtime, "fits": False, "max_context": 0, "command": "", "note": refusal}
    weight_bytes, notes = case.weight_bytes, []
    if runtime == "transformers" and case.format is not None and case.format.startswith("compressed-tensors"):
        weight_bytes = max(weight_bytes, 2 * parameters(case.geometry).total)
        notes.append("decompresses to bf16 at the first forward: this format saves disk here, not memory")
        if case.format == "compressed-tensors-fp8" and case.gpu.fp8:
            notes.append(
                "CompressedTensorsConfig(use_optimized_inference=True) may keep FP8, which is not counted on here"
            )
    room = _room(case, weight_bytes)
    kv_bytes = _kv_bytes_a_layer(case, tensor_parallel=runtime != "transformers")
    held = _held(case.geometry, runtime)
    largest = _largest_context(case, room, kv_bytes, held)
    fits = largest >= case.needed
    if room <= 0:
        each = "" if case.n_gpus == 1 else " on each GPU"
        limit = case.gpu.nbytes - CONTEXT_BYTES - WORKSPACE_BYTES
        notes.insert(0, f"weights need {_gib(-(-weight_bytes // case.n_gpus))}{each}, there are {_gib(limit)}")
    elif not fits and case.needed > case.max_context:
        notes.append(f"the model itself ends at {case.max_context:,} tokens")
    elif not fits:
        notes.append(f"{case.needed:,} tokens are more than the {_gib(room)} left for the KV cache hold")
    if largest:
        notes += _serving_notes(case, runtime)
    served = case.context if fits and case.context is not None else largest
    return {
        "runtime": runtime,
        "fits": fits,
        "max_context": largest,
        "command": _command(case, runtime, served, held) if largest else "",
        "note": "; ".join(notes),
    }


def _held(geometry: Geometry, runtime: Runtime) -> int | None:
    """Tokens that the runtime keeps of a chunked layer; None: all."""
    if geometry.chunk_size is None or runtime == "vllm-no-hybrid-cache":
        return None
    if runtime == "sglang":
        # It knows by the architecture's name which layers are chunked: those of the published models, with a vision tower.
        # A chunk, and the piece of a prompt behind it, which is as long by default.
        return 2 * geometry.chunk_size if geometry.vision is not None and geometry.nope_interval == 4 else None
    return geometry.chunk_size


def _refusal(case: _Case, runtime: Runtime) -> str:
    """Why the runtime does not load this at all, or an empty text."""
    if runtime == "transformers":
        return ""  # every format, and GPUs share out layers, not heads
    if case.format == "bitsandbytes-nf4":
        return "does not load bitsandbytes experts; recipe int4 is for it"
    if case.format == "compressed-tensors-mixed" and runtime == "sglang":
        return "not known to load two schemes in one checkpoint; recipe int4 is for it"
    heads, kv_heads, n = case.geometry.n_heads, case.geometry.n_kv_heads, case.n_gpus
    if heads % n or (kv_heads % n and n % kv_heads):
        return f"{n} GPUs cannot share {heads} heads with {kv_heads} KV heads evenly"
    return ""


def _serving_notes(case: _Case, runtime: Runtime) -> list[str]:
    notes = []
    if case.format == "compressed-tensors-fp8" and not case.gpu.fp8 and runtime != "transformers":
        notes.append("this GPU has no FP8 units: weights are widened as they are used")
    if case.geometry.chunk_size is not None and _chunked_layers(case.geometry):
        if runtime == "vllm":
            notes.append("hybrid KV cache: chunked layers hold one chunk")
        elif runtime == "vllm-no-hybrid-cache":
            notes.append("every layer holds every token")
        elif runtime == "sglang":
            hybrid = _held(case.geometry, runtime) is not None
            notes.append("chunked layers hold two chunks" if hybrid else "every layer holds every token")
    if runtime == "transformers":
        piece = _transformers_piece(case.geometry)
        notes.append(f"call generate with prefill_chunk_size={piece}: it runs every expert on every token")
    return notes


def _transformers_piece(geometry: Geometry) -> int:
    """Tokens of a prompt at a time that half the workspace can take: Transformers runs every expert on every token."""
    g = geometry
    # Of each expert: input, scaled input and output; gate, up and their product.
    width = max(1, g.n_experts or 0) * 3 * (g.dim + (g.expert_dim or g.dense_dim or 0))
    piece = max(1, WORKSPACE_BYTES // 2 // (width * _BF16_SIZE))
    return min(4096, 1 << piece.bit_length() - 1)


def _command(case: _Case, runtime: Runtime, context: int, held: int | None) -> str:
    where, n = shlex.quote(case.directory), case.n_gpus
    if runtime == "transformers":
        name = "AutoModelForCausalLM" if case.geometry.vision is None else "AutoModelForImageTextToText"
        device = "cuda" if n == 1 else "auto"
        load = f'm = {name}.from_pretrained({json.dumps(case.directory)}, dtype="auto", device_map="{device}")'
        return f"python -i -c {shlex.quote(f'from transformers import {name}; {load}')}"
    usable = case.gpu.nbytes - CONTEXT_BYTES
    if runtime == "sglang":
        parts = [f"python -m sglang.launch_server --model-path {where} --context-length {context}"]
        # Rounded down here and up below: the runtime must not take more than was counted, nor hold less.
        parts.append(f"--mem-fraction-static {_floor3((usable - WORKSPACE_BYTES) / case.gpu.nbytes)}")
        if held is not None and _chunked_layers(case.geometry):
            parts.append(f"--swa-full-tokens-ratio {min(1.0, math.ceil(held / context * 1e4) / 1e4):g}")
        return " ".join([*parts, *([f"--tp {n}"] if n > 1 else [])])
    parts = [f"vllm serve {where} --max-model-len {context}"]
    if n > 1:
        parts.append(f"--tensor-parallel-size {n}")
    parts.append(f"--gpu-memory-utilization {_floor3(usable / case.gpu.nbytes)} --max-num-batched-tokens {_VLLM_PIECE}")
    if runtime == "vllm-no-hybrid-cache":
        parts.append("--disable-hybrid-kv-cache-manager")
    elif held is not None:
        # Off by default for chunked attention in some versions.
        parts.insert(0, "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE=1")
    return " ".join(parts)


def _floor3(fraction: float) -> str:
    return f"{math.floor(fraction * 1000) / 1000:g}"


def _recipes_that_fit(case: _Case) -> dict[str, int]:
    """Each recipe, and "bf16", that fits the GPUs of `case` with the context asked: the most tokens of any runtime."""
    sizes, found = recipe_bytes(case.geometry), {}
    for name, format, _ in _RECIPES:
        other = replace(case, weight_bytes=sizes[name], format=format)
        tokens = [v["max_context"] for v in (_verdict(other, runtime) for runtime in RUNTIMES) if v["fits"]]
        if tokens:
            found[name] = max(tokens)
    return found


def _best(case: _Case, candidates: dict[str, int]) -> str | None:
    # `mixed` is for vLLM alone and `nf4` for Transformers alone.
    everywhere = {name: tokens for name, tokens in candidates.items() if name not in ("mixed", "nf4")}
    goal = min(GOOD_CONTEXT, case.max_context) if case.context is None else case.context
    for name, tokens in everywhere.items():
        if tokens >= goal:
            return name
    return max(everywhere, key=lambda name: everywhere[name], default=None)


def _advice(case: _Case, candidates: dict[str, int]) -> str:
    if case.needed > case.max_context:
        return f"ask for {case.max_context:,} tokens or fewer: the model itself ends there"
    ways = []
    here = case.gpu.key if case.n_gpus == 1 else f"{case.n_gpus} x {case.gpu.key}"
    if candidates:
        best = _best(case, candidates)
        ordered = sorted(candidates, key=lambda name: name != best)
        only = {"mixed": ", vLLM", "nf4": ", Transformers"}
        names = [f"{name} ({candidates[name]:,} tokens{only.get(name, '')})" for name in ordered]
        ways.append(f"{here} with {'' if ordered[0] == 'bf16' else 'recipe '}{', or '.join(names)}")
    for n in (2, 4, 8):
        if n > case.n_gpus and _fits(case, n_gpus=n):
            ways.append(f"this format on {n} x {case.gpu.key}")
            break
    larger = sorted((g for g in gpus().values() if g.nbytes > case.gpu.nbytes), key=lambda g: g.nbytes)
    for gpu in larger:
        if _fits(case, gpu=gpu):
            ways.append(f"this format on {f'{case.n_gpus} x ' if case.n_gpus > 1 else ''}{gpu.key}")
            break
    return "; or ".join(ways) if ways else f"nothing here fits {case.needed:,} tokens: more or larger GPUs are needed"


def _fits(case: _Case, **changes: Any) -> bool:
    return any(_verdict(replace(case, **changes), runtime)["fits"] for runtime in RUNTIMES)


def _gib(n: int) -> str:
    return f"{n / (1 << 30):.1f} GiB"


def fit_summary(fit: dict[str, Any]) -> str:
    """The verdict for people: a line on the memory, one or two a runtime, and what would fit where nothing does."""
    budget = fit["budget"]
    several = f"{fit['n_gpus']} x " if fit["n_gpus"] > 1 else ""
    asked = f", {fit['context']:,} tokens asked" if fit["context"] is not None else ""
    each = " each" if several else ""
    lines = [
        f"fit      {'yes' if fit['fits'] else 'no'}: {several}{fit['gpu']}, {_gib(fit['gpu_bytes'])}{each};"
        f" weights {_gib(fit['weight_bytes'])}, room for KV cache {_gib(budget['kv_cache_bytes'])}{each}{asked}"
    ]
    for r in fit["runtimes"]:
        verdict = f"{'yes' if r['fits'] else 'no ':3}  {r['max_context']:>10,} tokens" if r["max_context"] else "no"
        lines.append(f"         {r['runtime']:20}  {verdict}{'  ' if r['note'] else ''}{r['note']}")
        if r["fits"]:
            lines.append(f"         {'':20}  $ {r['command']}")
    if fit["advice"]:
        lines.append(f"         fits instead: {fit['advice']}")
    return "\n".join(lines)
