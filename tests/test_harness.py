"""The harness, proved without the converter: Meta's code accepts the checkpoints, Transformers the oracle's tensors,
and their logits agree."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_models.checkpoint import convert_moe_weights, reshard_mp
from llama_models.llama4.moe import MoE
from llama_models.llama4.tokenizer import Tokenizer
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    Llama4VisionConfig,
)

from tests.support import meta_model, oracle

Checkpoint = Callable[..., Any]
GEOMETRIES = list(meta_model.GEOMETRIES)
TOLERANCE = 1e-4
PROMPT = 40  # several chunks, several steps of the temperature


def transformers_config(model: Any) -> Llama4Config | Llama4TextConfig:
    """Transformers' config for Meta's `model`, by hand: fields from Meta's ModelArgs, widths from Meta's parameters."""
    args = model.args
    feed_forwards = [layer.feed_forward for layer in model.layers]
    moe_layers = [index for index, ffn in enumerate(feed_forwards) if isinstance(ffn, MoE)]
    dense_layers = [index for index in range(args.n_layers) if index not in moe_layers]
    rope = [int(layer.attention.use_rope) for layer in model.layers]
    rope_parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.use_scaled_rope:
        rope_parameters |= {
            "rope_type": "llama3",
            "factor": float(args.rope_scaling_factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": float(args.rope_high_freq_factor),
            "original_max_position_embeddings": 8192,
        }
    fields: dict[str, Any] = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.dim // args.n_heads,
        "rms_norm_eps": args.norm_eps,
        "use_qk_norm": args.use_qk_norm,
        "no_rope_layers": rope,
        "layer_types": [
            "chunked_attention" if uses_rope and args.attention_chunk_size else "full_attention" for uses_rope in rope
        ],
        "attention_chunk_size": args.attention_chunk_size or 8192,  # null crashes, unused or not
        "attn_temperature_tuning": args.attn_temperature_tuning,
        "floor_scale": int(args.floor_scale),
        "attn_scale": args.attn_scale,
        "rope_parameters": rope_parameters,
        "moe_layers": moe_layers,
        "pad_token_id": None,
    }
    if moe_layers:
        fields["intermediate_size"] = feed_forwards[moe_layers[0]].experts.w1.shape[2]
        fields["num_local_experts"] = args.moe_args.num_experts
        fields["num_experts_per_tok"] = args.moe_args.top_k
    if dense_layers:
        fields["intermediate_size_mlp"] = feed_forwards[dense_layers[0]].w1.weight.shape[0]
    text = Llama4TextConfig(**fields)
    if not args.vision_args:
        return text
    vision = args.vision_args
    encoder = model.vision_embeddings.vision_encoder
    return Llama4Config(
        text_config=text,
        vision_config=Llama4VisionConfig(
            hidden_size=vision.dim,
            num_hidden_layers=vision.n_layers,
            num_attention_heads=vision.n_heads,
            intermediate_size=encoder.transformer.resblocks[0].mlp.c_fc.weight.shape[0],
            image_size=vision.image_size.height,
            patch_size=vision.patch_size.height,
            pixel_shuffle_ratio=vision.pixel_shuffle_ratio,
            vision_output_dim=vision.output_dim,
            projector_input_dim=vision.output_dim,
            projector_output_dim=vision.output_dim,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        image_token_index=meta_model.PATCH_TOKEN,
    )


def transformers_model(config: Any, tensors: dict[str, Tensor]) -> Any:
    """Transformers' model of `config` in fp32, strictly loaded."""
    vision = isinstance(config, Llama4Config)
    model = (Llama4ForConditionalGeneration if vision else Llama4ForCausalLM)(config).float().eval()
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    return model


def transformers_logits(model: Any, tokens: Tensor, pixel_values: Tensor | None = None) -> Tensor:
    inputs = {"input_ids": tokens} if pixel_values is None else {"input_ids": tokens, "pixel_values": pixel_values}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def load_ranks(src: Path) -> list[dict[str, Any]]:
    with torch.serialization.safe_globals([io.BytesIO, codecs.encode]):
        return [torch.load(path, weights_only=True) for path in sorted(src.glob("*.pth"))]


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {name: (t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


# --- Meta accepts what we write


@pytest.mark.parametrize("spelling", ["published", "module"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_metas_loader_reads_one_rank(meta_checkpoint: Checkpoint, geometry: str, spelling: str) -> None:
    checkpoint = meta_checkpoint(geometry, 1, spelling)
    (state,) = load_ranks(checkpoint.src)
    model = meta_model.build(checkpoint.params, seed=1)
    result = model.load_state_dict(state, strict=False)  # as Meta's Llama4.build calls it

    assert result.missing_keys == []
    unknown_to_meta = ("_gate_stats_3E", ".expert_activation_DE", ".feed_forward.mlp._extra_state")
    assert [key for key in result.unexpected_keys if not key.endswith(unknown_to_meta)] == []
    for (name, loaded), (_, original) in zip(
        model.named_parameters(), checkpoint.model.named_parameters(), strict=True
    ):
        assert torch.equal(loaded, original), name


@pytest.mark.parametrize(
    ("geometry", "ranks"), [("scout", 8), ("maverick", 4), ("guard", 8), ("odd", 2), ("dense_chunks", 2)]
)
def test_metas_resharding_merges_the_ranks(meta_checkpoint: Checkpoint, geometry: str, ranks: int) -> None:
    """Only the published spelling, without extras: that is all that Meta's `reshard_mp` understands."""
    checkpoint = meta_checkpoint(geometry, ranks, extra=False)
    states = load_ranks(checkpoint.src)
    moe = checkpoint.model.args.moe_args
    if moe:
        states = [convert_moe_weights(state, moe.num_experts) for state in states]
    model = meta_model.build(checkpoint.params, seed=1)
    model.load_state_dict(reshard_mp(states, size=1, rank=0), strict=True)

    for (name, loaded), (_, original) in zip(
        model.named_parameters(), checkpoint.model.named_parameters(), strict=True
    ):
        assert torch.equal(loaded, original), name


def test_metas_tokenizer_reads_the_tokenizer(tmp_path: Path) -> None:
    meta_model.write_tokenizer(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.n_words == meta_model.VOCAB_SIZE
    assert tokenizer.special_tokens["<|patch|>"] == meta_model.PATCH_TOKEN
    assert tokenizer.decode(tokenizer.encode("the naïve hen", bos=False, eos=False)) == "the naïve hen"


def test_a_dtype_that_would_change_values_is_refused() -> None:
    model = meta_model.build(meta_model.GEOMETRIES["absent"], seed=0, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"does not survive torch\.bfloat16"):
        meta_model.rank_state_dicts(model, 1, dtype=torch.bfloat16)


def test_ranks_that_cannot_share_the_heads_are_refused(meta_checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="2 key-value heads"):
        meta_model.rank_state_dicts(meta_checkpoint("odd").model, 4)


def test_hard_layouts_are_hard(meta_checkpoint: Checkpoint) -> None:
    """torch.load keeps what makes them hard: strides, offsets, one storage, the Parameter type."""
    views = load_ranks(meta_checkpoint("odd", 2, layout="views", extra=False).src)[0]
    assert sum(not tensor.is_contiguous() for tensor in views.values()) > len(views) // 4
    assert sum(tensor.storage_offset() > 0 for tensor in views.values()) > len(views) // 2
    assert any(tensor.dim() == 2 and tensor.stride(0) == 1 for tensor in views.values())

    shared = load_ranks(meta_checkpoint("odd", 2, layout="one_storage", extra=False).src)[0]
    assert len({tensor.untyped_storage().data_ptr() for tensor in shared.values()}) == 1

    parameters = load_ranks(meta_checkpoint("odd", 2, layout="parameters", extra=False).src)[0]
    assert all(isinstance(tensor, torch.nn.Parameter) for tensor in parameters.values())


# --- the oracle says the same of every way to write one model


@pytest.mark.parametrize("geometry", ["scout", "maverick", "guard"])
def test_the_oracle_does_not_depend_on_ranks_or_spelling(meta_checkpoint: Checkpoint, geometry: str) -> None:
    expected = bits(oracle.slow_convert(meta_checkpoint(geometry, 1).src))
    for ranks, spelling in [
        (2, "published"),
        (8, "published"),
        (4, "module"),
        (1, "mixed"),
        (2, "mixed"),
        (8, "mixed"),
    ]:
        assert bits(oracle.slow_convert(meta_checkpoint(geometry, ranks, spelling).src)) == expected, (ranks, spelling)


@pytest.mark.parametrize("layout", ["views", "one_storage", "parameters"])
def test_the_oracle_does_not_depend_on_the_layout(meta_checkpoint: Checkpoint, layout: str) -> None:
    expected = bits(oracle.slow_convert(meta_checkpoint("odd", 2).src))
    assert bits(oracle.slow_convert(meta_checkpoint("odd", 2, layout=layout).src)) == expected


def test_the_oracle_leaves_no_key_unread(meta_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = meta_checkpoint("absent")
    (state,) = load_ranks(checkpoint.src)
    torch.save({**state, "layers.0.attention.sinks": torch.zeros(8)}, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(checkpoint.params))
    with pytest.raises(AssertionError, match="sinks"):
        oracle.slow_convert(tmp_path)


def test_the_oracle_checks_replicated_tensors(meta_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = meta_checkpoint("absent", 2)
    first, second = load_ranks(checkpoint.src)
    torch.save(first, tmp_path / "consolidated.00.pth")
    torch.save({**second, "norm.weight": second["norm.weight"] + 1}, tmp_path / "consolidated.01.pth")
    (tmp_path / "params.json").write_text(json.dumps(checkpoint.params))
    with pytest.raises(AssertionError, match=r"norm\.weight should be the same"):
        oracle.slow_convert(tmp_path)


def test_a_safetensors_directory_is_read_through_its_index(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
    for part, name in enumerate(tensors, 1):
        save_file({name: tensors[name]}, tmp_path / f"model-{part:05d}-of-00002.safetensors")
    index = {
        "metadata": {"total_size": 28},
        "weight_map": {n: f"model-0000{i}-of-00002.safetensors" for i, n in enumerate("ab", 1)},
    }
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert bits(oracle.read_safetensors_dir(tmp_path)) == bits(tensors)

    path.write_text(json.dumps(index | {"metadata": {"total_size": 27}}))
    with pytest.raises(AssertionError, match="total_size"):
        oracle.read_safetensors_dir(tmp_path)
    path.write_text(json.dumps(index | {"weight_map": dict.fromkeys("ab", "model-00001-of-00002.safetensors")}))
    with pytest.raises(AssertionError, match="different files"):
        oracle.read_safetensors_dir(tmp_path)


# --- Transformers with the oracle's tensors computes Meta's logits


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_transformers_agrees_with_meta(
    meta_checkpoint: Checkpoint, geometry: str, record_property: Callable[[str, object], None]
) -> None:
    checkpoint = meta_checkpoint(geometry, 2, "mixed")
    model = transformers_model(transformers_config(checkpoint.model), oracle.slow_convert(checkpoint.src))
    prompts = [(meta_model.text_tokens(checkpoint.model, PROMPT),)]
    if checkpoint.model.args.vision_args:
        prompts.append(meta_model.image_inputs(checkpoint.model))
    for prompt in prompts:
        expected = meta_model.logits(checkpoint.model, *prompt)
        difference = (transformers_logits(model, *prompt) - expected).abs().max().item()
        record_property("max_abs_diff", difference)
        assert difference < TOLERANCE
        assert expected.std() > 0.5  # else the tolerance would mean nothing


@pytest.mark.parametrize("geometry", ["scout", "nulls", "custom_rope", "dense_chunks"])
def test_transformers_rotates_as_meta_does(meta_checkpoint: Checkpoint, geometry: str) -> None:
    model = meta_checkpoint(geometry).model
    config = transformers_config(model)
    text = getattr(config, "text_config", config)
    rotary = Llama4ForCausalLM(text).model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, meta_model.rope_frequencies(model), rtol=1e-5, atol=0)


# --- and the prompts are long enough to notice a wrong config


@pytest.mark.parametrize(
    ("geometry", "change"),
    [
        ("scout", {"attention_chunk_size": 9}),
        ("scout", {"layer_types": ["full_attention"] * 5}),
        ("scout", {"no_rope_layers": [1] * 5}),
        ("scout", {"use_qk_norm": False}),
        ("scout", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("maverick", {"use_qk_norm": True}),
        (
            "nope_without_chunks",
            {"layer_types": ["chunked_attention", "full_attention"] * 2, "attention_chunk_size": 8},
        ),
        ("odd", {"no_rope_layers": [1, 1, 1, 0, 1, 1]}),
        ("top2", {"num_experts_per_tok": 1}),
        ("temperature", {"attn_temperature_tuning": False}),
        ("temperature", {"floor_scale": 5}),
        ("temperature", {"attn_scale": 0.1}),
        ("custom_rope", {"rms_norm_eps": 1e-5}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_wrong_text_config_shows(meta_checkpoint: Checkpoint, geometry: str, change: dict[str, Any]) -> None:
    checkpoint = meta_checkpoint(geometry)
    config = transformers_config(checkpoint.model)
    text = getattr(config, "text_config", config)
    assert all(getattr(text, field) != value for field, value in change.items())
    for field, value in change.items():
        setattr(text, field, value)
    tokens = meta_model.text_tokens(checkpoint.model, PROMPT)
    wrong = transformers_logits(transformers_model(config, oracle.slow_convert(checkpoint.src)), tokens)
    assert (wrong - meta_model.logits(checkpoint.model, tokens)).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("change", ["theta", "heads"])
def test_a_wrong_vision_config_shows(meta_checkpoint: Checkpoint, change: str) -> None:
    checkpoint = meta_checkpoint("scout")
    config = transformers_config(checkpoint.model)
    if change == "theta":
        config.vision_config.rope_parameters["rope_theta"] = 500000.0
    else:
        config.vision_config.num_attention_heads = 4
    prompt = meta_model.image_inputs(checkpoint.model)
    wrong = transformers_logits(transformers_model(config, oracle.slow_convert(checkpoint.src)), *prompt)
    assert (wrong - meta_model.logits(checkpoint.model, *prompt)).abs().max() > 10 * TOLERANCE
