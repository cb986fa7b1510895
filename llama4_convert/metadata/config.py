"""config.json, generation_config.json and the processor's: every value from params.json and the tensors, no reader's defaults.

The dialect is the one of Transformers 4.x (`rope_theta` and `rope_scaling`, `torch_dtype`), which vLLM, SGLang, mlx-lm and
llama.cpp read and Transformers 5 still accepts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from llama4.geometry import Geometry, VisionGeometry
from llama4_convert.checkpoints.tensors import TORCH_NAMES
from llama4_convert.errors import BadInput
from llama4_convert.metadata.tokenizer import TokenIds

# Meta's code has these as constants (LayerNorm's default, `get_rope_freqs` in vision/encoder.py).
_VISION_NORM_EPS = 1e-5
_VISION_ROPE_THETA = 10000.0
# What our tests run. Releases from 4.57.2 on take a directory that names none for one with a tokenizer that needs a repair.
TRANSFORMERS_VERSION = "5.23.0"


def model_config(
    g: Geometry, ids: TokenIds | None, *, variant: str, dtype: str, max_position_embeddings: int
) -> dict[str, Any]:
    """The content of config.json: `Llama4ForConditionalGeneration` with a vision tower, else `Llama4ForCausalLM`.

    `ids` None: the vocabulary is too small to hold Meta's special tokens. Raises BadInput for what Transformers cannot express.
    """
    text = text_config(g, ids, variant=variant, dtype=dtype, max_position_embeddings=max_position_embeddings)
    if g.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text, "transformers_version": TRANSFORMERS_VERSION}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "torch_dtype": TORCH_NAMES[dtype],
        "boi_token_index": ids.boi if ids else -1,
        "eoi_token_index": ids.eoi if ids else -1,
        "image_token_index": ids.patch if ids else -1,
        "pad_token_id": text["pad_token_id"],  # Transformers 5.0.0 looks for it here alone
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision_config(g.vision, dtype),
        "transformers_version": TRANSFORMERS_VERSION,
    }


def text_config(
    g: Geometry, ids: TokenIds | None, *, variant: str, dtype: str, max_position_embeddings: int
) -> dict[str, Any]:
    if g.floor_scale != int(g.floor_scale):
        raise BadInput(f"params.json: floor_scale is {g.floor_scale}: Transformers knows whole numbers of tokens only")
    layers = range(g.n_layers)
    uncut = max(8192, max_position_embeddings)
    scaling = g.rope_scaling
    if scaling and scaling.high_freq_factor < scaling.low_freq_factor:
        raise BadInput(
            f"params.json: rope_high_freq_factor is {scaling.high_freq_factor:g}: below {scaling.low_freq_factor:g}"
            " Transformers scales RoPE in another way than Meta's code"
        )
    return {
        "model_type": "llama4_text",
        "torch_dtype": TORCH_NAMES[dtype],
        "vocab_size": g.vocab_size,
        "hidden_size": g.dim,
        "num_hidden_layers": g.n_layers,
        "num_attention_heads": g.n_heads,
        "num_key_value_heads": g.n_kv_heads,
        "head_dim": g.head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": g.norm_eps,
        "use_qk_norm": g.use_qk_norm,
        "intermediate_size": g.dense_dim if g.is_dense else g.expert_dim,
        "intermediate_size_mlp": g.dense_dim,
        "num_local_experts": g.n_experts,
        "num_experts_per_tok": g.top_k,
        # vLLM and llama.cpp count for themselves, and take 0 as "no layer is MoE". mlx-lm divides by it and stops: it would leave
        # RoPE out of every fourth layer, of a model that has it everywhere.
        "interleave_moe_layer_step": 0 if g.is_dense else g.moe_step,
        "moe_layers": g.moe_layers,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "rope_theta": g.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "high_freq_factor": scaling.high_freq_factor,
            "low_freq_factor": scaling.low_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
        "no_rope_layers": [int(g.uses_rope(layer)) for layer in layers],
        # Readers that count for themselves must find no NoPE layer where there is none: null is refused by Transformers 5.
        "no_rope_layer_interval": g.nope_interval or g.n_layers + 1,
        # Readers that look at this number alone must never cut a context that has no chunks: null makes Transformers 5 crash.
        "attention_chunk_size": g.chunk_size if any(g.is_chunked(layer) for layer in layers) else uncut,
        "layer_types": ["chunked_attention" if g.is_chunked(layer) else "full_attention" for layer in layers],
        "attn_temperature_tuning": g.attn_temperature_tuning,
        "floor_scale": int(g.floor_scale),
        "attn_scale": g.attn_scale,
        "max_position_embeddings": max_position_embeddings,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": ids.bos if ids else None,
        "eos_token_id": _eos(ids, variant),
        "pad_token_id": ids.pad if ids else None,
    }


def vision_config(v: VisionGeometry, dtype: str) -> dict[str, Any]:
    if v.mlp_dim != v.shuffled_dim:
        raise BadInput(
            f"params.json: vision_args: the MLP is {v.mlp_dim} wide and pixel shuffle makes {v.shuffled_dim} channels:"
            " Transformers has one number (intermediate_size) for both"
        )
    return {
        "model_type": "llama4_vision_model",
        "torch_dtype": TORCH_NAMES[dtype],
        "image_size": v.image_size,
        "patch_size": v.patch_size,
        "num_channels": 3,
        "hidden_size": v.dim,
        "hidden_act": "gelu",
        "num_hidden_layers": v.n_layers,
        "num_attention_heads": v.n_heads,
        "intermediate_size": v.mlp_dim,
        "norm_eps": _VISION_NORM_EPS,
        "rope_theta": _VISION_ROPE_THETA,
        "pixel_shuffle_ratio": v.pixel_shuffle_ratio,
        "projector_input_dim": v.output_dim,
        "projector_output_dim": v.output_dim,
        "vision_output_dim": v.output_dim,
        "multi_modal_projector_bias": False,
        "projector_dropout": 0.0,
        "attention_dropout": 0.0,
        "vision_feature_select_strategy": "default",
        "initializer_range": 0.02,
    }


def generation_config(ids: TokenIds | None, variant: str) -> dict[str, Any]:
    """The content of generation_config.json. Guard's verdict is a classification: it is decoded greedily."""
    sampling = {"do_sample": False} if variant == "guard" else {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    return {
        **sampling,
        "bos_token_id": ids.bos if ids else None,
        "eos_token_id": _eos(ids, variant),
        "pad_token_id": ids.pad if ids else None,
    }


class _Pictures(Protocol):
    """The sizes of a vision tower that a processor needs."""

    @property
    def image_size(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def pixel_shuffle_ratio(self) -> float: ...


def processor_configs(v: _Pictures) -> dict[str, dict[str, Any]]:
    """preprocessor_config.json and processor_config.json."""
    return {
        "preprocessor_config.json": {
            # Transformers 4 has no other; 5 took the last word off, and knows both names.
            "image_processor_type": "Llama4ImageProcessorFast",
            "processor_class": "Llama4Processor",
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "rescale_factor": 1 / 255,
            "resample": 2,
            "size": {"height": v.image_size, "width": v.image_size},
            "max_patches": 16,
            "resize_to_max_canvas": False,
        },
        "processor_config.json": {
            "processor_class": "Llama4Processor",
            "patch_size": v.patch_size,
            "pixel_shuffle_ratio": v.pixel_shuffle_ratio,
            "fake_image_token": "<|image|>",
            "image_token": "<|image|>",
            "start_of_image_token": "<|image_start|>",
            "end_of_image_token": "<|image_end|>",
            "patch_token": "<|patch|>",
            "tile_x_separator_token": "<|tile_x_separator|>",
            "tile_y_separator_token": "<|tile_y_separator|>",
        },
    }


def to_json(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=2) + "\n").encode()


def _eos(ids: TokenIds | None, variant: str) -> int | list[int] | None:
    if ids is None:
        return None
    stop = ids.stop_ids(variant)
    return stop[0] if len(stop) == 1 else list(stop)
