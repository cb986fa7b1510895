"""What the candidate says: of a configuration that is wrong `validate` names the field, and the layer that strays by it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama4_convert import convert, validate
from llama4_convert.validation.results import Validation
from quant.typed import decode
from tests.support import commands
from tests.support.candidates import (
    METRICS,
    change_config,
    change_tensors,
    fields,
    written,
)

RUNS = [
    # geometry, changes, fields named, (layer, module) that strays
    ("scout", {"rms_norm_eps": 0.5}, {"rms_norm_eps"}, (0, "attention_norm")),
    ("scout", {"rope_theta": 100.0}, {"rope_theta"}, (0, "attention")),
    ("custom_rope", {"rope_scaling__high_freq_factor": 1000.0}, {"rope_scaling.high_freq_factor"}, (0, "attention")),
    ("custom_rope", {"rope_scaling__original_max_position_embeddings": 64},
     {"rope_scaling.original_max_position_embeddings"}, (0, "attention")),
    ("scout", {"use_qk_norm": False}, {"use_qk_norm"}, (0, "attention")),
    ("scout", {"num_experts_per_tok": 2}, {"num_experts_per_tok"}, (0, "feed_forward")),
    ("top2", {"num_experts_per_tok": 1}, {"num_experts_per_tok"}, (0, "feed_forward")),
    ("scout", {"attention_chunk_size": 4}, {"attention_chunk_size"}, (0, "attention")),
    ("scout", {"no_rope_layers": [1] * 5}, {"no_rope_layers"}, (3, "attention")),
    ("scout", {"no_rope_layers": [1, 1, 1, 0, 0]}, {"no_rope_layers"}, (4, "attention")),
    ("scout", {"layer_types": ["chunked_attention"] * 5}, {"layer_types"}, (3, "attention")),
    ("nope_without_chunks", {"attention_chunk_size": 8, "layer_types": None},
     {"attention_chunk_size", "layer_types"}, (0, "attention")),
    ("scout", {"attn_temperature_tuning": True, "floor_scale": 4, "attn_scale": 0.5},
     {"attn_temperature_tuning", "floor_scale", "attn_scale"}, (3, "attention")),
    ("temperature", {"attn_temperature_tuning": False}, {"attn_temperature_tuning"}, (1, "attention")),
    ("temperature", {"floor_scale": 8}, {"floor_scale"}, (1, "attention")),
    ("temperature", {"attn_scale": 0.1}, {"attn_scale"}, (1, "attention")),
    ("scout", {"vision_config__rope_theta": 10.0}, {"vision_config.rope_theta"}, (None, "vision.layers.0")),
    ("scout", {"vision_config__num_attention_heads": 4}, {"vision_config.num_attention_heads"}, (None, "vision.layers.0")),
]  # fmt: skip


def in_one_order(value: object) -> str:
    """The name of a parameter: workers must name tests alike, and a set is printed in the order of its hashes."""
    return str(sorted(value) if isinstance(value, set) else value)


@pytest.mark.parametrize(("geometry", "changes", "named", "strays"), RUNS, ids=in_one_order)
def test_a_wrong_field_is_named_and_logits_tell_where_it_matters(
    geometry: str,
    changes: dict[str, Any],
    named: set[str],
    strays: tuple[int | None, str],
    source: Callable[..., Path],
    copy: Callable[..., Path],
) -> None:
    path = copy(geometry)
    change_config(path, **changes)
    result = validate(path, reference=source(geometry), tokens=40)
    assert not result.passed
    assert fields(result) == named
    assert result.tensors_different == []
    assert result.candidate_failure is None
    first = result.first_divergence
    assert (first.layer, first.module, first.tensor) == (*strays, None)
    assert all(field in first.cause for field in named)
    # The logits tell it alone.
    assert {"kl_mean", "nmse"} <= set(result.gates_failed)
    assert result.kl_mean > 1e-5
    if strays[0] is not None:
        clean = result.layers[: strays[0]]
        assert all(layer.nmse_local < 1e-9 > layer.nmse_propagated for layer in clean)
        assert result.layers[strays[0]].nmse_local > 1e-9


SILENT = [
    ("scout", {"rope_scaling": None}, "rope_scaling"),
    ("custom_rope", {"rope_scaling__factor": 100.0}, "rope_scaling.factor"),
    ("scout", {"rope_scaling__factor": 8.0}, "rope_scaling.factor"),
    (
        "scout",
        {"rope_scaling__original_max_position_embeddings": 4096},
        "rope_scaling.original_max_position_embeddings",
    ),
    ("scout", {"floor_scale": 4096}, "floor_scale"),
    ("scout", {"attn_scale": 0.2}, "attn_scale"),
    ("scout", {"no_rope_layer_interval": 3}, "no_rope_layer_interval"),
    ("scout", {"interleave_moe_layer_step": 2}, "interleave_moe_layer_step"),
    ("scout", {"hidden_act": "relu"}, "hidden_act"),
    ("scout", {"attention_bias": True}, "attention_bias"),
    ("scout", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("scout", {"boi_token_index": 3}, "boi_token_index"),
    ("scout", {"eoi_token_index": 3}, "eoi_token_index"),
    ("scout", {"vision_config__norm_eps": 1e-6}, "vision_config.norm_eps"),
    ("scout", {"bos_token_id": 5}, "bos_token_id"),
    ("scout", {"bos_token_id": ...}, "bos_token_id"),
    ("scout", {"text_config__pad_token_id": None, "pad_token_id": None}, "pad_token_id"),
    ("scout", {"pad_token_id": 5}, "pad_token_id"),
]


@pytest.mark.parametrize(("geometry", "changes", "named"), SILENT, ids=str)
def test_a_wrong_field_that_40_tokens_do_not_show_is_named_all_the_same(
    geometry: str, changes: dict[str, Any], named: str, source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy(geometry)
    change_config(path, **changes)
    result = validate(path, reference=source(geometry), tokens=40)
    assert not result.passed
    assert fields(result) == {named}


@pytest.mark.parametrize("stops", [5, [], None, [265, 5], ...], ids=str)
def test_a_generation_that_would_not_end_is_a_wrong_field(
    stops: Any, source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy()
    change_config(path, "generation_config.json", eos_token_id=stops)
    result = validate(path, reference=source(), tokens=2)
    assert not result.passed
    assert fields(result) == {"eos_token_id"}


def test_what_has_a_chat_template_must_stop_at_the_end_of_a_turn(
    source: Callable[..., Path], converted: Callable[..., Path], tmp_path: Path
) -> None:
    path = commands.copy(converted(variant="instruct"), tmp_path / "copy")
    change_config(path, "generation_config.json", eos_token_id=[265])
    assert fields(validate(path, reference=source(), tokens=2)) == {"eos_token_id"}


def test_a_base_model_that_transformers_saved_again_is_still_one(
    source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    """Transformers puts a chat template of its own beside every Llama 4 that has none."""
    from transformers.models.llama4.processing_llama4 import chat_template

    path = copy()
    assert not (path / "chat_template.jinja").exists()
    (path / "chat_template.jinja").write_text(chat_template)
    assert validate(path, reference=source(), tokens=2).passed
    (path / "chat_template.jinja").write_text(chat_template + "{# somebody's own #}")
    assert fields(validate(path, reference=source(), tokens=2)) == {"eos_token_id"}


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("generation_config.json", {"bos_token_id": 1}, "bos_token_id"),
        ("generation_config.json", {"pad_token_id": 1}, "pad_token_id"),
        ("preprocessor_config.json", {"image_mean": [0.48, 0.46, 0.41]}, "image_mean"),
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor"),
        ("preprocessor_config.json", {"size": {"height": 336, "width": 336}}, "size"),
        ("processor_config.json", {"patch_size": 28}, "patch_size"),
    ],
    ids=str,
)
def test_a_wrong_field_of_another_file_is_named(
    file: str, changes: dict[str, Any], named: str, source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy()
    change_config(path, file, **changes)
    result = validate(path, reference=source(), tokens=2)
    assert not result.passed
    assert fields(result) == {f"{file}: {named}"}
    assert not result.config_differences[0].matters


def test_a_vocabulary_of_other_ids_is_a_wrong_file(source: Callable[..., Path], copy: Callable[..., Path]) -> None:
    path = copy()
    body = json.loads((path / "tokenizer.json").read_text())
    vocabulary = body["model"]["vocab"]
    vocabulary["X"], vocabulary["Y"] = vocabulary["Y"], vocabulary["X"]
    (path / "tokenizer.json").write_text(json.dumps(body))
    [difference] = validate(path, reference=source(), tokens=2).config_differences
    assert (difference.field, difference.expected, difference.found) == (
        "tokenizer.json", f"token {ord('X')}: 'X'", "Y",
    )  # fmt: skip


def test_a_chunk_size_that_no_layer_uses_changes_no_logit(
    source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy("guard")
    change_config(path, attention_chunk_size=8)
    result = validate(path, reference=source("guard"), tokens=20)
    [difference] = result.config_differences
    assert (difference.field, difference.matters_from) == ("attention_chunk_size", None)
    assert result.gates_failed == []


def test_readers_that_count_moe_layers_must_find_none_in_a_dense_model(
    source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy("guard")
    change_config(path, interleave_moe_layer_step=1)
    assert fields(validate(path, reference=source("guard"), tokens=2)) == {"interleave_moe_layer_step"}


@pytest.mark.parametrize(
    ("geometry", "changes", "named"),
    [
        ("scout", {"num_attention_heads": 12}, "num_attention_heads"),
        ("scout", {"num_attention_heads": 32, "head_dim": 4}, "num_attention_heads"),
        ("scout", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("scout", {"head_dim": 16}, "head_dim"),
        ("scout", {"hidden_size": 64}, "hidden_size"),
        ("scout", {"intermediate_size": 96}, "intermediate_size"),
        ("maverick", {"intermediate_size_mlp": 96}, "intermediate_size_mlp"),
        ("scout", {"vocab_size": 2000}, "vocab_size"),
        ("scout", {"num_local_experts": 5}, "num_local_experts"),
        ("scout", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("scout", {"moe_layers": [1, 2]}, "moe_layers"),
        ("scout", {"num_hidden_layers": 4}, "num_hidden_layers"),
        ("scout", {"vision_config__num_attention_heads": 7}, "vision_config.num_attention_heads"),
        ("scout", {"vision_config__hidden_size": 32}, "vision_config.hidden_size"),
        ("scout", {"vision_config__intermediate_size": 300}, "vision_config.intermediate_size"),
        ("scout", {"vision_config__num_hidden_layers": 3}, "vision_config.num_hidden_layers"),
        ("scout", {"vision_config__image_size": 28}, "vision_config.image_size"),
        ("scout", {"vision_config__patch_size": 100}, "vision_config.patch_size"),
        ("scout", {"vision_config__pixel_shuffle_ratio": 0.25}, "vision_config.pixel_shuffle_ratio"),
        ("scout", {"vision_config": None}, "vision_config"),
        ("scout", {"image_token_index": 5}, "image_token_index"),
        ("scout", {"image_token_index": -1}, "image_token_index"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_run_is_a_failed_check_in_words(
    geometry: str,
    changes: dict[str, Any],
    named: str,
    source: Callable[..., Path],
    copy: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = copy(geometry)
    change_config(path, **changes)
    outcome = commands.run(capsys, "validate", path, "--reference", source(geometry), "--tokens", 20, "--json")
    assert outcome.code == 5
    assert named in outcome.error
    result = decode(outcome.json, Validation, "the JSON")
    assert named in fields(result)
    assert result.candidate_failure
    assert "Traceback" not in result.candidate_failure + outcome.err
    assert result.tokens == 0
    assert all(getattr(result, name) is None for name in METRICS)


@pytest.mark.parametrize("changes", [{"num_attention_heads": 12}, {"hidden_size": 64}], ids=str)
def test_what_transformers_refuses_is_a_failed_check_too(
    changes: dict[str, Any], source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy("text_only")
    change_config(path, **changes)
    result = validate(path, reference=source("text_only"), tokens=2, runner="transformers")
    assert not result.passed
    assert "Transformers" in result.candidate_failure


def test_a_wrong_field_shows_in_transformers_too(source: Callable[..., Path], copy: Callable[..., Path]) -> None:
    path = copy("text_only")
    change_config(path, rms_norm_eps=0.5)
    result = validate(path, reference=source("text_only"), tokens=20, runner="transformers")
    assert not result.passed
    assert "nmse" in result.gates_failed
    assert fields(result) == {"rms_norm_eps"}


def test_a_nan_in_the_candidate_is_no_number_anywhere_in_the_result(
    source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy("text_only")
    change_tensors(path, lambda tensors: tensors["model.layers.0.input_layernorm.weight"].fill_(math.nan))
    result = validate(path, reference=source("text_only"), tokens=5)
    assert not result.passed
    assert result.gates_failed == sorted(result.gates)
    assert result.top1_agreement is result.kl_mean is result.perplexity_candidate is None
    assert result.perplexity_reference > 0
    assert {layer.nmse_propagated for layer in result.layers} == {None}


WORDS = [
    ("model_type", "llama", "model_type"),
    ("text_config.model_type", "llama", "text_config.model_type"),
    ("architectures", ["LlamaForCausalLM"], "architectures"),
    ("torch_dtype", "float16", "torch_dtype"),
    ("vision_config.num_channels", 1, "vision_config.num_channels"),
    ("text_config.num_hidden_layers", 3, "num_hidden_layers"),
]


@pytest.mark.parametrize(("path", "value", "field"), WORDS, ids=lambda x: str(x))
def test_words_that_readers_choose_their_code_by(
    path: str, value: Any, field: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("words")
    written(folder / "meta")
    convert(folder / "meta", folder / "out")
    body = json.loads((folder / "out" / "config.json").read_bytes())
    *above, last = path.split(".")
    part = body
    for name in above:
        part = part[name]
    part[last] = value
    (folder / "out" / "config.json").write_text(json.dumps(body))
    result = validate(folder / "out", reference=folder / "meta", tokens=4)
    assert not result.passed
    assert field in {difference.field for difference in result.config_differences}
