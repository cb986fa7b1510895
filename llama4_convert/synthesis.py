"""Writes a random checkpoint in the format of Meta's original files: full size, cut down, or tiny.

The tensors' names, shapes and places are those of the published checkpoints: the spelling that the load hooks of
llama-models (`llama4/model.py`, `moe.py`, `ffn.py`) undo. The tables below are written from Meta's code alone. They
share nothing with the mapping that the converter uses, so a test that converts a synthetic checkpoint compares two
readings.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llama4.geometry import Geometry, VisionGeometry
from llama4_convert.errors import EnvironmentFailed, UsageError, from_os_error
from llama4_convert.pth_writer import PthWriter
from llama4_convert.state_dict_pickle import PthBytes, PthTensor

# As in `conversion`: (bytes in all, bytes already done) once, then (bytes just written); tensor data only.
Start: TypeAlias = Callable[[int, int], None]
Progress: TypeAlias = Callable[[int], None]

# The file that says, to people and to the next run, that the directory holds random numbers and may be overwritten.
MARKER = "synthetic.json"
DTYPES = ("bfloat16", "float16", "float32")
# Special tokens of a Llama 4 tokenizer, in use or reserved: the vocabulary is the base tokens and these.
SPECIAL_TOKENS = 2048

_VISION = {
    "image_size": {"height": 336, "width": 336},
    "patch_size": {"height": 14, "width": 14},
    "dim": 1408,
    "n_layers": 34,
    "n_heads": 16,
    "mlp_ratio": 4.0,
    "output_dim": 4096,
    "pixel_shuffle_ratio": 0.5,
}
_TEXT = {
    "dim": 5120,
    "n_layers": 48,
    "n_heads": 40,
    "n_kv_heads": 8,
    "vocab_size": 202048,
    "multiple_of": 2048,
    "ffn_dim_multiplier": 1.2,
    "ffn_exp": 4.0,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}
_MOE = {"capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1}
_FAMILIES: dict[str, dict[str, Any]] = {
    "scout": {
        **_TEXT,
        "use_scaled_rope": True,
        "use_qk_norm": True,
        "nope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "moe_args": {"num_experts": 16, **_MOE, "interleave_moe_layer_step": 1},
        "vision_args": _VISION,
    },
    "maverick": {
        **_TEXT,
        "use_scaled_rope": False,
        "use_qk_norm": False,
        "nope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "moe_args": {"num_experts": 128, **_MOE, "interleave_moe_layer_step": 2},
        "vision_args": _VISION,
    },
    # Guard 4 is Scout without its routed experts: 12 B parameters, so the dense width is 8192, and 0.6 gives that
    # width.
    "guard": {
        **_TEXT,
        "ffn_dim_multiplier": 0.6,
        "use_scaled_rope": True,
        "use_qk_norm": True,
        "nope_layer_interval": None,
        "attention_chunk_size": None,
        "moe_args": None,
        "vision_args": _VISION,
    },
}
_RANKS = {"scout": 8, "maverick": 8, "guard": 1}
# Small, yet grouped-query, of unequal expert and dense widths (256, 512), with chunks that a short prompt outgrows.
_TINY_TEXT = {
    "dim": 256,
    "n_layers": 4,
    "n_heads": 16,
    "n_kv_heads": 8,
    "vocab_size": 256 + 256 + SPECIAL_TOKENS,
    "multiple_of": 128,
    "ffn_dim_multiplier": 0.6,
}
_TINY_CHUNK = 32
_TINY_EXPERTS = 4
_TINY_VISION = {
    "image_size": {"height": 56, "width": 56},
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "output_dim": 128,
}

_NORM_STD = 0.1
_BIAS_STD = 0.02


def synth(
    dst: str | os.PathLike[str],
    *,
    geometry: str = "scout",
    layers: int | None = None,
    experts: int | None = None,
    vocab: int | None = None,
    vision_layers: int | None = None,
    tiny: bool = False,
    base: bool = False,
    ranks: int | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    sparse: bool = False,
    start: Start = lambda total, done: None,
    progress: Progress = lambda n: None,
) -> dict[str, Any]:
    """Write `consolidated.NN.pth` and `params.json` into `dst`; tiny models get `tokenizer.model`, `checklist.chk` too.

    `geometry` is "scout", "maverick" or "guard"; `layers`, `experts`, `vocab`, `vision_layers` replace its numbers.
    `tiny` keeps the structure and shrinks every width: some 12 MB. At full size no tokenizer is written: use the
    published one. `base` adds the statistics of base models (`expert_activation_DE`, `{global,running}_gate_stats_3E`).
    `ranks` is the number of `.pth` files, 8 by default (Guard: 1). `dtype` is "bfloat16", "float16" or "float32".

    Values are Gaussian with a standard deviation of fan_in**-0.5 (norm weights: around 1). Each tensor and rank draws
    from its own stream, of (seed, key, rank): cutting layers changes nothing in those that stay. A tensor that ranks
    replicate is the same on all. The dtypes share the streams, so bfloat16 and float16 are the rounded float32.

    `sparse` makes all numbers zeros, as holes in the files: a model of full size that takes no space, for `plan` and `inspect`.

    `start(total, 0)` and `progress(n)` count bytes of tensor data.

    Files appear whole, `params.json` last. A `dst` that holds anything but an earlier synthetic checkpoint is refused:
    the marker `synthetic.json` tells. Returns {"files": names, "bytes": of the files, "parameters": of the model, "sparse"}.
    Raises UsageError for impossible sizes and for a `dst` not ours, EnvironmentFailed for lack of space and I/O errors.
    """
    params = synth_params(geometry, layers, experts, vocab, vision_layers, tiny)
    shape = Geometry.from_params(params)
    ranks = _RANKS[geometry] if ranks is None else ranks
    _check_ranks(shape, ranks)
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    if tiny and params["vocab_size"] < 256 + SPECIAL_TOKENS:
        raise UsageError(
            f"a vocabulary of {params['vocab_size']} has no room for 256 bytes and {SPECIAL_TOKENS} special tokens"
        )

    plan = _plan(shape, ranks, base=base)
    entries = [t.entry(dtype) for t in plan]
    total = ranks * sum(entry.nbytes for entry in entries if isinstance(entry, PthTensor))
    names = [f"consolidated.{rank:02d}.pth" for rank in range(ranks)]
    directory = Path(dst)
    try:
        _prepare(directory, (0 if sparse else total) + ranks * (len(entries) + 16) * _RECORD_OVERHEAD)
        about = {"geometry": geometry, "tiny": tiny, "base": base, "ranks": ranks, "seed": seed, "dtype": dtype}
        about |= {"sparse": True} if sparse else {}
        _write(directory / MARKER, _json({"what": "random numbers, written by synth", **about}))
        start(total, 0)
        for rank, name in enumerate(names):
            with PthWriter(directory / name, entries) as writer:
                for tensor, entry in zip(plan, entries, strict=True):
                    if not isinstance(entry, PthTensor):
                        continue
                    if sparse:
                        writer.write_zeros(entry.key)
                        progress(entry.nbytes)
                    else:
                        writer.write_tensor(entry.key, _watched(tensor.values(dtype, seed, rank), progress))
        last = _small_files(directory, names, params, seed) if tiny else {"params.json": _json(params)}
        for name, content in last.items():
            _write(directory / name, content)
        names = [MARKER, *names, *last]
        size = sum((directory / name).stat().st_size for name in names)
    except OSError as error:
        raise from_os_error(error, f"writing a checkpoint into {directory}") from error
    parameters = sum(t.parameters(ranks) for t in plan)
    return {"files": names, "bytes": size, "parameters": parameters, "sparse": sparse}


def synth_params(
    geometry: str,
    layers: int | None = None,
    experts: int | None = None,
    vocab: int | None = None,
    vision_layers: int | None = None,
    tiny: bool = False,
) -> dict[str, Any]:
    """The `params.json` of a family, with some of its numbers replaced. Raises UsageError."""
    if geometry not in _FAMILIES:
        raise UsageError(f"geometry {geometry!r} is not known: choose one of {', '.join(_FAMILIES)}")
    params = dict(_FAMILIES[geometry])
    vision = dict(params["vision_args"])
    moe = dict(params["moe_args"]) if params["moe_args"] else None
    if tiny:
        params |= _TINY_TEXT
        vision |= _TINY_VISION
        params["attention_chunk_size"] = params["attention_chunk_size"] and _TINY_CHUNK
        if moe:
            moe["num_experts"] = _TINY_EXPERTS
    if experts is not None and moe is None:
        raise UsageError(f"{geometry} is a dense model: it has no experts to count")
    for target, field, value in (
        (params, "n_layers", layers),
        (moe, "num_experts", experts),
        (params, "vocab_size", vocab),
        (vision, "n_layers", vision_layers),
    ):
        if target is not None and value is not None:
            if value < 1:
                raise UsageError(f"{field} must be at least 1, not {value}")
            target[field] = value
    return params | {"moe_args": moe, "vision_args": vision}


def tokenizer_model(base_tokens: int, seed: int) -> bytes:
    """A `tokenizer.model` in tiktoken's format, a line a token: base64, a space, the rank. Random, but valid.

    The 256 bytes come first, then words of lower-case letters, some after a space. Byte pair encoding with the earlier
    tokens splits each in exactly two, so that readers which rebuild the list of merges find one merge a token.
    """
    ranks = {bytes([value]): value for value in range(256)}
    letters = [bytes([value]) for value in b"abcdefghijklmnopqrstuvwxyz"]
    starts, ends = [b" ", *letters], list(letters)
    random = Random(f"tokenizer {seed}")
    while len(ranks) < base_tokens:
        token = random.choice(starts) + random.choice(ends)
        if token not in ranks and len(_encode(ranks, token)) == 2:
            ranks[token] = len(ranks)
            starts.append(token)
            if not token.startswith(b" "):
                ends.append(token)
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())


def _encode(ranks: dict[bytes, int], text: bytes) -> list[bytes]:
    """Byte pair encoding: join the neighbours of the lowest rank until none are left to join."""
    parts = [bytes([value]) for value in text]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not found:
            return parts
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


# -------------------- the tensors

# Transformer Engine leaves a serialized None where it has no FP8 state to keep; loaders must step over it.
_EXTRA_STATE = b"\x80\x02N."


@dataclass(frozen=True)
class _Tensor:
    """One entry of every rank's file; `shape` is one rank's, None for a `_extra_state`."""

    key: str
    shape: tuple[int, ...] | None
    std: float = 0.0
    mean: float = 0.0
    split: bool = False  # ranks hold different parts; otherwise copies
    weight: bool = True  # part of the model; otherwise loaders drop it

    @property
    def numel(self) -> int:
        return 0 if self.shape is None else math.prod(self.shape)

    def parameters(self, ranks: int) -> int:
        return self.numel * (ranks if self.split else 1) if self.weight else 0

    def entry(self, dtype: str) -> PthTensor | PthBytes:
        return PthBytes(self.key, _EXTRA_STATE) if self.shape is None else PthTensor(self.key, dtype, self.shape)

    def values(self, dtype: str, seed: int, rank: int) -> Iterator[memoryview]:
        return _gaussian(dtype, self.numel, self.mean, self.std, f"{seed} {self.key} {rank if self.split else 'all'}")


def _split(key: str, *shape: int, fan_in: int) -> _Tensor:
    return _Tensor(key, shape, fan_in**-0.5, split=True)


def _copied(key: str, *shape: int, fan_in: int) -> _Tensor:
    return _Tensor(key, shape, fan_in**-0.5)


def _norm(key: str, dim: int) -> _Tensor:
    return _Tensor(key, (dim,), _NORM_STD, mean=1.0)


def _bias(key: str, dim: int, *, split: bool) -> _Tensor:
    return _Tensor(key, (dim,), _BIAS_STD, split=split)


def _dropped(key: str, *shape: int) -> _Tensor:
    return _Tensor(key, shape, 1.0, weight=False)


def _extra_state(module: str) -> _Tensor:
    return _Tensor(f"{module}._extra_state", None)


def _plan(geometry: Geometry, ranks: int, *, base: bool) -> list[_Tensor]:
    """Every entry of a rank's file, in order; all ranks hold the same entries."""
    g, dim = geometry, geometry.dim
    assert g.vocab_size is not None
    assert g.vision is not None
    plan = [_split("tok_embeddings.weight", g.vocab_size // ranks, dim, fan_in=dim)]
    for layer in range(g.n_layers):
        plan += _attention(g, f"layers.{layer}.attention", ranks)
        if g.is_moe(layer):
            plan += _moe(g, f"layers.{layer}.feed_forward", ranks, base)
        else:
            plan += _dense(g, f"layers.{layer}.feed_forward", ranks)
    plan += [
        _norm("norm.weight", dim),
        _split("output.weight", g.vocab_size // ranks, dim, fan_in=dim),
        _dropped("rope.freqs", g.head_dim // 2),
    ]
    plan += _vision(g.vision, ranks)
    plan.append(_split("vision_projection.weight", dim // ranks, g.vision.output_dim, fan_in=g.vision.output_dim))
    return plan


def _attention(g: Geometry, prefix: str, ranks: int) -> list[_Tensor]:
    heads = g.n_heads * g.head_dim
    return [
        _norm(f"{prefix}.wqkv.layer_norm_weight", g.dim),
        # A rank's rows: its query heads, its key heads, its value heads.
        _split(f"{prefix}.wqkv.weight", (g.n_heads + 2 * g.n_kv_heads) * g.head_dim // ranks, g.dim, fan_in=g.dim),
        _extra_state(f"{prefix}.wqkv"),
        _split(f"{prefix}.wo.weight", g.dim, heads // ranks, fan_in=heads),
        _extra_state(f"{prefix}.wo"),
    ]


def _moe(g: Geometry, prefix: str, ranks: int, base: bool) -> list[_Tensor]:
    assert g.n_experts is not None
    assert g.expert_dim is not None
    dim, experts, width = g.dim, g.n_experts, g.expert_dim
    statistics = [
        _dropped(f"{prefix}.expert_activation_DE", dim, experts),
        _dropped(f"{prefix}.global_gate_stats_3E", 3, experts),
        _dropped(f"{prefix}.running_gate_stats_3E", 3, experts),
    ]
    return [
        _norm(f"{prefix}.norm.weight", dim),
        _copied(f"{prefix}.router_DE", dim, experts, fan_in=dim),
        # Three axes flattened to two: [experts, dim, width / ranks] and [experts, width / ranks, dim].
        _split(f"{prefix}.experts.moe_w_in_eD_F", experts * dim, width // ranks, fan_in=dim),
        _split(f"{prefix}.experts.moe_w_swiglu_eD_F", experts * dim, width // ranks, fan_in=dim),
        _split(f"{prefix}.experts.moe_w_out_eF_D", experts * (width // ranks), dim, fan_in=width),
        _extra_state(f"{prefix}.experts.mlp"),
        _split(f"{prefix}.w_in_shared_FD.weight", width // ranks, dim, fan_in=dim),
        _split(f"{prefix}.w_swiglu_FD.weight", width // ranks, dim, fan_in=dim),
        _split(f"{prefix}.w_out_shared_DF.weight", dim, width // ranks, fan_in=width),
        _extra_state(f"{prefix}.mlp_shared"),
        *(statistics if base else []),
    ]


def _dense(g: Geometry, prefix: str, ranks: int) -> list[_Tensor]:
    assert g.dense_dim is not None
    return [
        _norm(f"{prefix}.mlp.layer_norm_weight", g.dim),
        # A rank's rows: its part of the gate, then its part of the up projection.
        _split(f"{prefix}.mlp.fc1_weight", 2 * (g.dense_dim // ranks), g.dim, fan_in=g.dim),
        _split(f"{prefix}.mlp.fc2_weight", g.dim, g.dense_dim // ranks, fan_in=g.dense_dim),
    ]


def _vision(v: VisionGeometry, ranks: int) -> list[_Tensor]:
    dim, encoder = v.dim, "vision_embeddings.vision_encoder"
    plan = [
        _copied(f"{encoder}.class_embedding", dim, fan_in=dim),
        _copied(f"{encoder}.positional_embedding_vlm", v.n_patches + 1, dim, fan_in=dim),
        _split(f"{encoder}.conv1._linear.weight", dim // ranks, v.patch_dim, fan_in=v.patch_dim),
    ]
    for layer in range(v.n_layers):
        block = f"{encoder}.transformer.resblocks.{layer}"
        for projection in ("wq", "wk", "wv"):
            plan.append(_split(f"{block}.attn.{projection}.weight", dim // ranks, dim, fan_in=dim))
            plan.append(_bias(f"{block}.attn.{projection}.bias", dim // ranks, split=True))
        plan += [
            _split(f"{block}.attn.wo.weight", dim, dim // ranks, fan_in=dim),
            _bias(f"{block}.attn.wo.bias", dim, split=False),
            _split(f"{block}.mlp.c_fc.weight", v.mlp_dim // ranks, dim, fan_in=dim),
            _bias(f"{block}.mlp.c_fc.bias", v.mlp_dim // ranks, split=True),
            _split(f"{block}.mlp.c_proj.weight", dim, v.mlp_dim // ranks, fan_in=v.mlp_dim),
            _bias(f"{block}.mlp.c_proj.bias", dim, split=False),
        ]
        for norm in ("ln_1", "ln_2"):
            plan += [_norm(f"{block}.{norm}.weight", dim), _bias(f"{block}.{norm}.bias", dim, split=False)]
    for norm in ("ln_pre", "ln_post"):
        plan += [_norm(f"{encoder}.{norm}.weight", dim), _bias(f"{encoder}.{norm}.bias", dim, split=False)]
    adapter, out = "vision_embeddings.vision_adapter.mlp", v.output_dim
    return [
        *plan,
        _split(f"{adapter}.c_fc.weight", out // ranks, v.shuffled_dim, fan_in=v.shuffled_dim),
        _split(f"{adapter}.c_proj.weight", out, out // ranks, fan_in=out),
    ]


def _check_ranks(g: Geometry, ranks: int) -> None:
    assert g.vision is not None
    sizes: dict[str, int | None] = {
        "n_heads": g.n_heads,
        "n_kv_heads": g.n_kv_heads,
        "dim": g.dim,
        "vocab_size": g.vocab_size,
        "the expert width": g.expert_dim if g.moe_layers else None,
        "the dense width": g.dense_dim if len(g.moe_layers) < g.n_layers else None,
        "vision n_heads": g.vision.n_heads,
        "the vision MLP width": g.vision.mlp_dim,
        "vision output_dim": g.vision.output_dim,
    }
    known = {name: size for name, size in sizes.items() if size is not None}
    common = math.gcd(*known.values())
    for name, size in known.items():
        if ranks < 1 or size % ranks:
            choices = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise UsageError(f"{ranks} ranks do not divide {name} ({size}): choose one of {choices}")


# -------------------- the numbers

_LEVELS = 1 << 16
# Numbers drawn at once: the table, the draws and the result stay in a core's cache, which doubles the speed.
_DRAW = 1 << 16


def _gaussian(dtype: str, count: int, mean: float, std: float, stream: str) -> Iterator[memoryview]:
    """`count` numbers as little-endian bytes; a chunk is overwritten by the next.

    A number is one of 65,536 quantiles of the normal distribution, picked by 16 random bits: one table look-up each.
    """
    bits = np.random.SFC64(int.from_bytes(hashlib.sha256(stream.encode()).digest(), "little"))
    table = _quantiles(dtype, mean, std)
    out = np.empty(min(count, _DRAW), table.dtype)
    for start in range(0, count, _DRAW):
        n = min(_DRAW, count - start)
        levels = bits.random_raw(-(-n // 4)).view(np.uint16)[:n]
        # mode="clip" leaves out a copy that "raise" makes; no level is out of range.
        np.take(table, levels, out=out[:n], mode="clip")
        yield out[:n].data.cast("B")


@lru_cache(maxsize=8)
def _quantiles(dtype: str, mean: float, std: float) -> NDArray[np.unsignedinteger[Any]]:
    """The bit patterns of `mean + std * z` for the 65,536 quantiles z, rounded from float32 to the nearest even."""
    values = (mean + std * _standard_quantiles()).astype("<f4")
    if dtype == "float32":
        return values.view("<u4")
    if dtype == "float16":
        return values.astype("<f2").view("<u2")
    bits = values.view("<u4")
    rounded: NDArray[np.unsignedinteger[Any]] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2")


@lru_cache(maxsize=1)
def _standard_quantiles() -> NDArray[np.float64]:
    normal = NormalDist()
    return np.array([normal.inv_cdf((level + 0.5) / _LEVELS) for level in range(_LEVELS)])


# -------------------- the files

# A zip record costs a header, padding, a descriptor, a directory entry, and some 150 bytes of pickle: less than this.
_RECORD_OVERHEAD = 1024


def _watched(chunks: Iterator[memoryview], progress: Progress) -> Iterator[memoryview]:
    for chunk in chunks:
        yield chunk
        progress(chunk.nbytes)


def _prepare(directory: Path, needed: int) -> None:
    """Make `directory`, empty but for the marker of an earlier run. Raises UsageError and EnvironmentFailed."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is not a directory: choose another destination")
    old = sorted(directory.iterdir()) if directory.exists() else []
    strangers = [file for file in old if not file.is_file() or file.is_symlink() or not _is_ours(file.name)]
    if strangers or (old and not (directory / MARKER).is_file()):
        found = (strangers or old)[0].name
        raise UsageError(f"{directory} holds {found} and no earlier synthetic checkpoint: choose an empty directory")
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + sum(file.stat().st_size for file in old)
    if needed > free:
        raise EnvironmentFailed(
            f"{directory}: {needed:,} bytes are needed and {free:,} are free; free some space, or cut layers or experts"
        )
    directory.mkdir(parents=True, exist_ok=True)
    # params.json goes first and the marker stays: from here on this is an unfinished checkpoint, and still ours.
    for file in sorted(old, key=lambda file: file.name != "params.json"):
        if file.name != MARKER:
            file.unlink()


def _is_ours(name: str) -> bool:
    name = name.removesuffix(".part")
    if name.startswith("consolidated.") and name.endswith(".pth"):
        return name.removeprefix("consolidated.").removesuffix(".pth").isdecimal()
    return name in (MARKER, "params.json", "tokenizer.model", "checklist.chk")


def _small_files(directory: Path, shards: list[str], params: dict[str, Any], seed: int) -> dict[str, bytes]:
    """Tokenizer, MD5 sums and params of a tiny checkpoint: content by name, in the order to write them."""
    tokenizer, stated = tokenizer_model(params["vocab_size"] - SPECIAL_TOKENS, seed), _json(params)
    sums = {name: _md5(directory / name) for name in shards}
    sums["tokenizer.model"] = hashlib.md5(tokenizer).hexdigest()
    sums["params.json"] = hashlib.md5(stated).hexdigest()
    checklist = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    return {"tokenizer.model": tokenizer, "checklist.chk": checklist.encode(), "params.json": stated}


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
