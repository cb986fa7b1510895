"""Meta's own Llama 4 code on one CPU process, and checkpoints written the way Meta publishes them.

The truth of these tests comes from outside: the model is `llama_models.llama4.model.Transformer`, which part of a
tensor a rank holds is read off Meta's module types (fairscale's column and row parallel layers, `Experts`), and widths
are whatever Meta's constructor made of params.json. Nothing here knows the converter, its tables or Transformers.

    params = GEOMETRIES["scout"]
    model = build(params, seed=0)                         # parameters hold bf16 values, in fp32
    write_checkpoint(model, params, directory, ranks=8)   # consolidated.00.pth ... params.json tokenizer.model
    expected = logits(model, text_tokens(model, 40))      # [batch, tokens, vocabulary] fp32
"""

from __future__ import annotations

import atexit
import base64
import io
import json
import random
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import fairscale.nn.model_parallel.initialize as fs_init
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from llama_models.llama4.args import ModelArgs
from llama_models.llama4.datatypes import MaskedEmbedding, TransformerInput
from llama_models.llama4.model import Transformer
from llama_models.llama4.moe import Experts, MoE
from llama_models.llama4.tokenizer import BASIC_SPECIAL_TOKENS, LLAMA4_SPECIAL_TOKENS, Tokenizer
from torch import Tensor, nn

Spelling = Literal["published", "module", "mixed"]
Layout = Literal["plain", "views", "one_storage", "parameters"]

# 256 bytes and 8 merges, then Meta's 2048 special tokens: 2312 rows, which 8 ranks can share.
NUM_BASE_TOKENS = 264
VOCAB_SIZE = NUM_BASE_TOKENS + Tokenizer.num_reserved_special_tokens
PATCH_TOKEN = NUM_BASE_TOKENS + (BASIC_SPECIAL_TOKENS + LLAMA4_SPECIAL_TOKENS).index("<|patch|>")

MAX_BATCH = 2
MAX_TOKENS = 64

_VISION: dict[str, Any] = {
    "image_size": {"height": 56, "width": 56},
    "patch_size": {"height": 14, "width": 14},
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "mlp_ratio": 4.0,
    "output_dim": 48,
    "pixel_shuffle_ratio": 0.5,
}

_SCOUT: dict[str, Any] = {
    "dim": 128,
    "n_layers": 5,
    "n_heads": 16,
    "n_kv_heads": 8,
    "head_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "multiple_of": 8,
    "ffn_dim_multiplier": 1.2,
    "ffn_exp": 2.0,  # not 4: dense layers ignore it, so a width taken from the wrong formula shows
    "norm_eps": 1e-5,
    "attention_chunk_size": 8,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "nope_layer_interval": 4,
    "use_qk_norm": True,
    "moe_args": {
        "num_experts": 4,
        "capacity_factor": 1.0,
        "auto_scale_F": True,
        "top_k": 1,
        "interleave_moe_layer_step": 1,
    },
    "vision_args": _VISION,
}


def _vary(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**base, **changes}


def _moe(**changes: Any) -> dict[str, Any]:
    return {**_SCOUT["moe_args"], **changes}


# Contents of params.json. Small, and each stands for one way in which a geometry can differ.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "scout": _SCOUT,
    "maverick": _vary(
        _SCOUT,
        n_layers=4,
        use_scaled_rope=False,
        use_qk_norm=False,
        moe_args=_moe(num_experts=8, interleave_moe_layer_step=2),
    ),
    "guard": _vary(_SCOUT, n_layers=3, ffn_exp=4.0, attention_chunk_size=None, nope_layer_interval=None, moe_args=None),
    # Without use_scaled_rope Meta's code never reads the factor. No NoPE layer: every layer is chunked.
    "dense_chunks": _vary(
        _SCOUT,
        n_layers=3,
        moe_args=None,
        use_scaled_rope=False,
        rope_scaling_factor=8.0,
        nope_layer_interval=None,
        vision_args=_vary(_VISION, n_heads=4, n_layers=1),
    ),
    # Global attention everywhere, RoPE on some layers only.
    "nope_without_chunks": _vary(_SCOUT, n_layers=4, attention_chunk_size=None, nope_layer_interval=2),
    "text_only": _vary(_SCOUT, n_layers=4, vision_args=None),
    "odd": _vary(
        _SCOUT,
        dim=96,
        n_layers=6,
        n_heads=6,
        n_kv_heads=2,
        head_dim=16,
        multiple_of=24,
        ffn_dim_multiplier=1.3,
        ffn_exp=3.5,
        attention_chunk_size=7,
        nope_layer_interval=3,
        moe_args=_moe(num_experts=3, capacity_factor=2.0, interleave_moe_layer_step=3),
        vision_args=_vary(_VISION, dim=32, n_heads=2, output_dim=80),
    ),
    "top2": _vary(_SCOUT, n_layers=3, vision_args=None, moe_args=_moe(top_k=2, auto_scale_F=False)),
    "temperature": _vary(
        _SCOUT,
        n_layers=4,
        nope_layer_interval=2,
        attn_temperature_tuning=True,
        floor_scale=4.0,
        attn_scale=0.5,
        vision_args=None,
    ),
    "nested": {"model": _vary(_SCOUT, n_layers=2, vision_args=None)},
    # Only what Meta's ModelArgs cannot do without (it asserts on n_kv_heads): the rest is its defaults.
    "absent": {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4},
    "absent_moe": {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 8,
        "n_kv_heads": 4,
        "vocab_size": -1,
        "ffn_dim_multiplier": 1.0,
        "ffn_exp": 4,
        "moe_args": {"num_experts": 2},
        "vision_args": _vary(_VISION, n_layers=1),
    },
    "nulls": _vary(
        _SCOUT,
        n_layers=2,
        head_dim=None,
        ffn_dim_multiplier=None,
        ffn_exp=None,
        attention_chunk_size=None,
        rope_scaling_factor=None,
        rope_high_freq_factor=None,
        nope_layer_interval=None,
        moe_args=None,
        vision_args=None,
        quantization_args=None,
        lora_args=None,
    ),
    "custom_rope": _vary(
        _SCOUT,
        n_layers=4,
        n_heads=8,
        head_dim=16,
        norm_eps=0.05,
        rope_theta=10000.0,
        rope_scaling_factor=8.0,
        rope_high_freq_factor=4.0,
    ),
}

_group_store: tempfile.TemporaryDirectory[str] | None = None


def init() -> None:
    """Let Meta's code run here: no CUDA, one rank, one thread. May be called any number of times."""
    global _group_store
    # Tensors are tiny here: more threads than free cores made every operation wait, 40 times slower on two busy cores.
    torch.set_num_threads(1)
    # Meta's attention puts its KV cache on the GPU without asking.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    if not dist.is_initialized():
        # A file store needs no port, so that test processes can run side by side.
        _group_store = tempfile.TemporaryDirectory(prefix="meta-model-")
        store = dist.FileStore(str(Path(_group_store.name) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        atexit.register(_leave_group)
    if not fs_init.model_parallel_is_initialized():
        fs_init.initialize_model_parallel(1)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def model_args(params: dict[str, Any]) -> ModelArgs:
    """Meta's reading of a params.json, `vocab_size` absent or -1 included."""
    args = ModelArgs(**params.get("model", params), max_batch_size=MAX_BATCH, max_seq_len=MAX_TOKENS)
    if args.vocab_size == -1:
        args.vocab_size = VOCAB_SIZE  # as Meta's Llama4.build does: the tokenizer's count
    return args


def build(params: dict[str, Any], seed: int, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """Meta's model with seeded random parameters, computing in fp32.

    Every value is one that `dtype` can hold, so that a checkpoint written in it has the same numbers as the model.
    """
    init()
    model = Transformer(model_args(params)).float().eval()  # float: Meta makes the vision encoder bf16
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, values).to(dtype).float())
    return model


def _scaled(name: str, noise: Tensor) -> Tensor:
    """`noise` at a scale that keeps activations and logits of order one."""
    family, _, leaf = name.rpartition(".")
    if name == "tok_embeddings.weight":
        return noise
    if leaf in ("w1", "w2", "w3", "router_DE"):  # stored [..., in, out]
        return noise / noise.shape[-2] ** 0.5
    if leaf == "weight" and noise.dim() == 2:
        return noise / noise.shape[1] ** 0.5
    if leaf == "weight" and noise.dim() == 1:
        return 1 + 0.2 * noise
    if leaf == "bias" or "embedding" in leaf:
        return 0.3 * noise
    raise AssertionError(f"no scale for {family}.{leaf}")


def logits(model: Transformer, tokens: Tensor, pixel_values: Tensor | None = None) -> Tensor:
    """Meta's prefill: tokens [batch, tokens] -> fp32 [batch, tokens, vocabulary].

    With pixel_values [tiles, 3, H, W], the tiles of one image or several in order, the batch is one sequence.
    """
    with torch.inference_mode():
        image = None
        if pixel_values is not None:
            assert tokens.shape[0] == 1, "the tiles of one image belong to one sequence"
            mask = (tokens == PATCH_TOKEN).unsqueeze(-1)
            embedding = model.vision_embeddings([[pixel_values]], mask, model.tok_embeddings(tokens))
            image = MaskedEmbedding(embedding=embedding, mask=mask)
        output = model(TransformerInput(tokens=tokens, tokens_position=0, image_embedding=image)).logits
    return output.clone()


def text_tokens(model: Transformer, length: int, seed: int = 0, batch: int = MAX_BATCH) -> Tensor:
    """[batch, length] token ids from the whole vocabulary, except the image patch."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.args.vocab_size - 1, (batch, length), generator=generator)
    return tokens + (tokens >= PATCH_TOKEN)


def image_inputs(model: Transformer, tiles: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A prompt with `tiles` image tiles between words: token ids [1, tokens] and pixel values [tiles, 3, H, W]."""
    vision = model.args.vision_args
    height, width = vision.image_size.height, vision.image_size.width
    patches = (height // vision.patch_size.height) * (width // vision.patch_size.width)
    per_tile = int(patches * vision.pixel_shuffle_ratio**2)
    words = text_tokens(model, 9 * (tiles + 1), seed, batch=1)[0].split(9)
    patch = torch.full((per_tile,), PATCH_TOKEN)
    tokens = torch.cat([words[0], *(part for w in words[1:] for part in (patch, w))]).unsqueeze(0)
    pixels = torch.rand((tiles, 3, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return tokens, pixels


def rope_frequencies(model: Transformer) -> Tensor:
    """Radians a token of each rotated pair [head_dim / 2], scaling included; logits of short prompts hide slow ones."""
    return torch.angle(model.freqs_cis[1])


def split_dims(model: Transformer) -> dict[str, int | None]:
    """The dimension along which ranks share each parameter (Meta's module names); None: every rank holds all of it."""
    dims: dict[str, int | None] = {name: None for name, _ in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear):  # splits its outputs, bias with them
            dims[f"{path}.weight"] = 0
            if module.bias is not None:
                dims[f"{path}.bias"] = 0
        elif isinstance(module, RowParallelLinear):  # splits its inputs; the bias is added once, after the sum
            dims[f"{path}.weight"] = 1
        elif isinstance(module, VocabParallelEmbedding):
            dims[f"{path}.weight"] = 0
        elif isinstance(module, Experts):  # w1, w3 [E, D, F] and w2 [E, F, D] share F
            dims.update({f"{path}.w1": 2, f"{path}.w3": 2, f"{path}.w2": 1})
    return dims


# Keys that checkpoints carry and Meta's loader ignores or drops. `{}` is a layer's prefix.
_EXTRA_STATE = ("{}attention.wqkv._extra_state", "{}attention.wo._extra_state")
_EXTRA_STATE_MOE = ("{}feed_forward.experts.mlp._extra_state", "{}feed_forward.mlp_shared._extra_state")
_EXTRA_STATE_DENSE = ("{}feed_forward.mlp._extra_state",)
_STATS_MOE = {
    "{}feed_forward.global_gate_stats_3E": lambda dim, experts: (3, experts),
    "{}feed_forward.running_gate_stats_3E": lambda dim, experts: (3, experts),
    "{}feed_forward.expert_activation_DE": lambda dim, experts: (dim, experts),
}


def extra_entries(model: Transformer) -> dict[str, Any]:
    """What published files hold besides parameters: TransformerEngine's states, RoPE's table, routing statistics."""
    entries: dict[str, Any] = {"rope.freqs": torch.rand(model.args.dim // model.args.n_heads // 2)}
    for index, layer in enumerate(model.layers):
        prefix = f"layers.{index}."
        moe = isinstance(layer.feed_forward, MoE)
        states = _EXTRA_STATE + (_EXTRA_STATE_MOE if moe else _EXTRA_STATE_DENSE)
        # TransformerEngine's versions wrote a pickled buffer, a byte tensor, and an empty one.
        kinds: tuple[Callable[[], Any], ...] = (
            lambda: io.BytesIO(b"\x80\x02}q\x00."),
            lambda: torch.arange(17, dtype=torch.uint8),
            lambda: torch.empty(0, dtype=torch.uint8),
        )
        for position, template in enumerate(states):
            entries[template.format(prefix)] = kinds[(index + position) % len(kinds)]()
        if moe:
            for template, shape in _STATS_MOE.items():
                entries[template.format(prefix)] = torch.rand(shape(model.args.dim, model.args.moe_args.num_experts))
    return entries


def write_checkpoint(
    model: Transformer,
    params: dict[str, Any],
    dst: Path,
    *,
    ranks: int,
    spelling: Spelling = "published",
    dtype: torch.dtype = torch.bfloat16,
    extra: bool = True,
    layout: Layout = "plain",
) -> Path:
    """Write `model` as Meta does: `ranks` rank files, params.json and tokenizer.model; returns `dst`.

    spelling: "published" names and fusions, "module" the names of Meta's modules (as PyTorch would save them), "mixed"
    a choice for each tensor, in another order in each file. Meta's loader takes the first two; of "mixed" only what
    leaves the tensors that it renames together (an expert's three, say) in one spelling.
    layout: "plain" one storage a tensor; "views" strided slices of larger storages; "one_storage" all of a file's
    tensors in one; "parameters" nn.Parameter in an OrderedDict with metadata, as `torch.save(model.state_dict())`.
    """
    dst.mkdir(parents=True, exist_ok=True)
    files = rank_state_dicts(model, ranks, spelling, dtype)
    for rank, tensors in enumerate(files):
        content: dict[str, Any] = _LAYOUTS[layout](tensors)
        if extra:
            content.update(extra_entries(model))
        torch.save(content, dst / f"consolidated.{rank:02d}.pth")
    (dst / "params.json").write_text(json.dumps(params, indent=2))
    write_tokenizer(dst / "tokenizer.model")
    return dst


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE of `NUM_BASE_TOKENS` tokens in tiktoken's format."""
    merges = [b"th", b"he", b"in", b"er", b"an", b"re", b" t", b" a"]
    tokens = [bytes([value]) for value in range(256)] + merges
    assert len(tokens) == NUM_BASE_TOKENS
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))


def rank_state_dicts(
    model: Transformer, ranks: int, spelling: Spelling = "published", dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Tensor]]:
    """Each rank's tensors under the names of `spelling`."""
    args = model.args
    if args.n_kv_heads % ranks:
        raise ValueError(f"{args.n_kv_heads} key-value heads cannot be shared by {ranks} ranks")
    parts: dict[str, list[Tensor]] = {}
    dims = split_dims(model)
    for name, parameter in model.named_parameters():
        values = parameter.detach().to(dtype)
        if not torch.allclose(values.float(), parameter, rtol=0, atol=0, equal_nan=True):
            raise ValueError(f"{name} does not survive {dtype}: build the model with this dtype")
        dim = dims[name]
        if dim is None:
            parts[name] = [values] * ranks
            continue
        if values.shape[dim] % ranks:
            raise ValueError(f"{name}: dimension {dim} of {tuple(values.shape)} cannot be shared by {ranks} ranks")
        parts[name] = list(values.chunk(ranks, dim))

    rng = random.Random(ranks)

    def published() -> bool:
        return spelling == "published" or (spelling == "mixed" and rng.random() < 0.5)

    def fuse(new: str, *old: str) -> None:
        """A rank's own blocks one above the other."""
        blocks = [parts.pop(name) for name in old]
        parts[new] = [torch.cat(rank) for rank in zip(*blocks, strict=True)]

    for index, layer in enumerate(model.layers):
        prefix = f"layers.{index}."
        attention, ffn = f"{prefix}attention.", f"{prefix}feed_forward."
        if published():
            fuse(f"{attention}wqkv.weight", *(f"{attention}w{x}.weight" for x in "qkv"))
        if published():
            parts[f"{attention}wqkv.layer_norm_weight"] = parts.pop(f"{prefix}attention_norm.weight")

        if isinstance(layer.feed_forward, MoE):
            for old, new in {"w1": "moe_w_in_eD_F", "w2": "moe_w_out_eF_D", "w3": "moe_w_swiglu_eD_F"}.items():
                if published():
                    blocks = parts.pop(f"{ffn}experts.{old}")
                    parts[f"{ffn}experts.{new}"] = [block.flatten(0, 1) for block in blocks]
            for old, new in {"w1": "w_in_shared_FD", "w2": "w_out_shared_DF", "w3": "w_swiglu_FD"}.items():
                if published():
                    parts[f"{ffn}{new}.weight"] = parts.pop(f"{ffn}shared_expert.{old}.weight")
            norm = f"{ffn}norm.weight"
        else:
            if published():
                fuse(f"{ffn}mlp.fc1_weight", f"{ffn}w1.weight", f"{ffn}w3.weight")
            if published():
                parts[f"{ffn}mlp.fc2_weight"] = parts.pop(f"{ffn}w2.weight")
            norm = f"{ffn}mlp.layer_norm_weight"
        if spelling == "mixed":  # Meta's hook takes any of the three on any layer
            norm = rng.choice([f"{ffn}norm.weight", f"{ffn}mlp.layer_norm_weight", f"{prefix}ffn_norm.weight"])
        if spelling != "module":
            parts[norm] = parts.pop(f"{prefix}ffn_norm.weight")

    names = list(parts)
    files = []
    for rank in range(ranks):
        files.append({name: parts[name][rank] for name in names})
        if spelling == "mixed":  # keys are looked up by name: their order in a file means nothing
            rng.shuffle(names)
    return files


def _plain(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _views(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """No tensor starts its storage; rows, columns and axes are strided in turn."""

    def columns(tensor: Tensor) -> Tensor:
        whole = torch.cat([torch.full_like(tensor, 7), tensor, torch.full_like(tensor, 7)], dim=-1)
        return whole[..., tensor.shape[-1] : 2 * tensor.shape[-1]]

    def rows(tensor: Tensor) -> Tensor:
        return torch.cat([torch.full_like(tensor, 7), tensor])[tensor.shape[0] :]

    def transposed(tensor: Tensor) -> Tensor:
        return columns(tensor.transpose(0, -1)).transpose(0, -1)

    def every_other(tensor: Tensor) -> Tensor:
        return torch.stack([torch.full_like(tensor, 7), tensor], dim=-1)[..., 1]

    kinds = (columns, rows, transposed, every_other)
    return {name: kinds[position % len(kinds)](tensor) for position, (name, tensor) in enumerate(tensors.items())}


def _one_storage(tensors: dict[str, Tensor]) -> dict[str, Any]:
    storage = torch.cat([tensor.flatten() for tensor in tensors.values()])
    views, start = {}, 0
    for name, tensor in tensors.items():
        views[name] = storage[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    return views


def _parameters(tensors: dict[str, Tensor]) -> dict[str, Any]:
    content = OrderedDict((name, nn.Parameter(tensor)) for name, tensor in _plain(tensors).items())
    content._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return content


_LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "plain": _plain,
    "views": _views,
    "one_storage": _one_storage,
    "parameters": _parameters,
}
