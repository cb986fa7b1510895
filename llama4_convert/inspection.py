"""`inspect`: what a checkpoint in either layout holds, from its index alone."""

from __future__ import annotations

import os
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints import is_meta
from llama4_convert.checkpoints.meta import MetaCheckpoint
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.errors import BadInput
from llama4_convert.planning import make_plan


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Layout, geometry, parameter count, bytes and tensors of `path`. Raises UsageError, BadInput or EnvironmentFailed.

    Geometry fields have the names of config.json. In Meta's layout a tensor's shape is one rank's, and `parameters` counts
    what a conversion keeps.
    """
    path = Path(path)
    if is_meta(path):
        return _meta(MetaCheckpoint.open(path))
    return _transformers(TransformersCheckpoint.open(path))


def _meta(checkpoint: MetaCheckpoint) -> dict[str, Any]:
    plan = make_plan(checkpoint, allow_rank_mismatch=True)
    g = plan.geometry
    first = checkpoint.ranks[0]
    return {
        "path": str(checkpoint.path),
        "layout": "meta",
        "ranks": len(checkpoint.ranks),
        "geometry": {
            "hidden_size": g.dim,
            "num_hidden_layers": g.n_layers,
            "num_attention_heads": g.n_heads,
            "num_key_value_heads": g.n_kv_heads,
            "vocab_size": g.vocab_size,
            "num_local_experts": g.n_experts,
            "num_experts_per_tok": g.top_k,
            "moe_layers": len(g.moe_layers),
            "intermediate_size": g.dense_dim if g.is_dense else g.expert_dim,
            "intermediate_size_mlp": g.dense_dim,
            "attention_chunk_size": g.chunk_size,
            "no_rope_layer_interval": g.nope_interval,
            "use_qk_norm": g.use_qk_norm,
            "vision_layers": g.vision.n_layers if g.vision else None,
        },
        "parameters": plan.parameters,
        "bytes": sum(t.numel * t.itemsize for index in checkpoint.ranks for t in index.tensors.values()),
        "tensors": [{"name": k, "dtype": t.dtype, "shape": list(t.shape)} for k, t in first.tensors.items()],
        "dropped": [{"name": name, "why": why} for name, why in plan.dropped.items()],
    }


def _transformers(checkpoint: TransformersCheckpoint) -> dict[str, Any]:
    config = checkpoint.config
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise BadInput("config.json: text_config is no object: convert again, or download it again")
    vision = config.get("vision_config")
    fields = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"),
        *("num_local_experts", "num_experts_per_tok", "moe_layers", "intermediate_size", "intermediate_size_mlp"),
        *("attention_chunk_size", "no_rope_layer_interval", "use_qk_norm"),
    )
    geometry = {name: text.get(name) for name in fields}
    if isinstance(geometry["moe_layers"], list):
        geometry["moe_layers"] = len(geometry["moe_layers"])
    geometry["vision_layers"] = vision.get("num_hidden_layers") if isinstance(vision, dict) else None
    tensors = checkpoint.tensors
    parameters = sum(prod(t.shape) for t in tensors.values())
    quantized: Counter[str] = Counter()
    if "quantization_config" in config:
        # Packed words are no parameters: count what they stand for.
        from llama4_convert.checkpoints.quantized import QuantizedReader

        reader = QuantizedReader(checkpoint)
        parameters = sum(prod(reader.shape(key)) for key in reader.keys())  # noqa: SIM118
        quantized.update(matrix.kind for matrix in reader.quantized.values())
    return {
        "path": str(checkpoint.path),
        "layout": "transformers",
        "files": len(checkpoint.files),
        "geometry": geometry,
        "parameters": parameters,
        "quantized": dict(sorted(quantized.items())),
        "bytes": sum(t.nbytes for t in tensors.values()),
        "tensors": [{"name": k, "dtype": t.dtype, "shape": list(t.shape)} for k, t in tensors.items()],
    }
