"""config.json and its friends say what params.json and the tensors say; nothing is left to a reader's defaults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama4_convert import convert, plan
from llama4_convert.errors import BadInput
from tests.support import commands, meta_model

BASE = meta_model.NUM_BASE_TOKENS
BEGIN, END, EOM, EOT, PAD = BASE, BASE + 1, BASE + 7, BASE + 8, BASE + 18


@pytest.fixture
def converted(meta_checkpoint: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`converted(geometry, name="config.json", **options)`: the content of a file of the output."""

    def read(geometry: str, name: str = "config.json", **options: Any) -> Any:
        options = {"variant": "instruct"} | options
        convert(meta_checkpoint(geometry, 2).src, tmp_path / "out", **options)
        path = tmp_path / "out" / name
        return json.loads(path.read_text()) if path.exists() else None

    return read


def test_a_scout(converted: Callable[..., Any]) -> None:
    config = converted("scout")
    assert config["architectures"] == ["Llama4ForConditionalGeneration"]
    assert config["model_type"] == "llama4"
    assert config["torch_dtype"] == "bfloat16"
    assert config["image_token_index"] == meta_model.PATCH_TOKEN
    assert config["tie_word_embeddings"] is False
    assert config["pad_token_id"] == PAD
    text = config["text_config"]
    expected = {
        "hidden_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "vocab_size": meta_model.VOCAB_SIZE,
        "intermediate_size": 104,  # 2/3 * 2 * 128, * 1.2, / 2 for the shared expert, up to a multiple of 8
        "intermediate_size_mlp": 416,  # 2/3 * 4 * 128, * 1.2, up to a multiple of 8: ffn_exp does not count
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "moe_layers": [0, 1, 2, 3, 4],
        "interleave_moe_layer_step": 1,
        "rms_norm_eps": 1e-5,
        "use_qk_norm": True,
        "rope_theta": 500000.0,
        "no_rope_layers": [1, 1, 1, 0, 1],
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8,
        "layer_types": ["chunked_attention"] * 3 + ["full_attention", "chunked_attention"],
        "attn_temperature_tuning": False,
        "max_position_embeddings": 10485760,
        "bos_token_id": BEGIN,
        "eos_token_id": [END, EOM, EOT],
        "pad_token_id": PAD,
    }
    assert {name: text[name] for name in expected} == expected
    assert text["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }
    vision = {
        "image_size": 56,
        "patch_size": 14,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "intermediate_size": 256,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 48,
        "projector_output_dim": 48,
        "vision_output_dim": 48,
    }
    assert {name: config["vision_config"][name] for name in vision} == vision


def test_a_maverick_alternates_and_scales_nothing(converted: Callable[..., Any]) -> None:
    text = converted("maverick")["text_config"]
    assert text["moe_layers"] == [1, 3]
    assert text["interleave_moe_layer_step"] == 2
    assert text["num_local_experts"] == 8
    assert text["rope_scaling"] is None
    assert text["use_qk_norm"] is False
    assert text["max_position_embeddings"] == 1048576


def test_a_guard_has_no_experts_no_chunks_and_no_nope(converted: Callable[..., Any]) -> None:
    """Nulls in params.json become numbers that no reader stumbles over, and that cut nothing."""
    text = converted("guard", variant=None)["text_config"]
    assert text["moe_layers"] == []
    assert text["num_local_experts"] == 0
    assert text["interleave_moe_layer_step"] == 0
    assert text["intermediate_size"] == text["intermediate_size_mlp"]
    assert text["no_rope_layers"] == [1, 1, 1]
    assert text["no_rope_layer_interval"] > text["num_hidden_layers"]
    assert text["attention_chunk_size"] >= text["max_position_embeddings"] == 8192
    assert text["layer_types"] == ["full_attention"] * 3


def test_no_chunks_means_no_cut_at_any_context(converted: Callable[..., Any]) -> None:
    text = converted("nope_without_chunks", max_position_embeddings=100_000)["text_config"]
    assert text["max_position_embeddings"] == 100_000
    assert text["attention_chunk_size"] >= 100_000
    assert set(text["layer_types"]) == {"full_attention"}
    assert text["no_rope_layers"] == [1, 0, 1, 0]


def test_no_vision_tower_means_a_causal_language_model(converted: Callable[..., Any], tmp_path: Path) -> None:
    config = converted("text_only")
    assert config["architectures"] == ["Llama4ForCausalLM"]
    assert config["model_type"] == "llama4_text"
    assert "vision_config" not in config
    assert not (tmp_path / "out" / "processor_config.json").exists()
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()


def test_text_only_leaves_the_processor_out(converted: Callable[..., Any], tmp_path: Path) -> None:
    config = converted("scout", text_only=True)
    assert config["architectures"] == ["Llama4ForCausalLM"]
    assert config["hidden_size"] == 128
    assert not list((tmp_path / "out").glob("*processor*"))


def test_temperature_and_rope_factors_are_those_of_params_json(converted: Callable[..., Any], tmp_path: Path) -> None:
    text = converted("temperature")
    assert (text["attn_temperature_tuning"], text["floor_scale"], text["attn_scale"]) == (True, 4, 0.5)
    text = converted("custom_rope", overwrite=True)["text_config"]
    assert text["rope_theta"] == 10000.0
    assert text["rms_norm_eps"] == 0.05
    assert (text["rope_scaling"]["factor"], text["rope_scaling"]["high_freq_factor"]) == (8.0, 4.0)


def test_a_cast_names_its_dtype(converted: Callable[..., Any]) -> None:
    config = converted("scout", dtype="float32")
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "float32"
    assert config["vision_config"]["torch_dtype"] == "float32"


@pytest.mark.parametrize("text_only", [False, True])
def test_the_version_of_transformers_is_that_of_our_tests(converted: Callable[..., Any], text_only: bool) -> None:
    """Without one, releases from 4.57.2 on warn of a wrong tokenizer."""
    pins = (Path(__file__).parents[3] / "constraints.txt").read_text().splitlines()
    version = converted("scout", text_only=text_only)["transformers_version"]
    assert f"transformers=={version}" in pins


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("base", {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": END}),
        ("instruct", {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [END, EOM, EOT]}),
        ("guard", {"do_sample": False, "eos_token_id": [END, EOM, EOT]}),
    ],
)
def test_generation(converted: Callable[..., Any], variant: str, expected: dict[str, Any]) -> None:
    found = converted("guard", "generation_config.json", variant=variant)
    assert found == {"bos_token_id": BEGIN, "pad_token_id": PAD, **expected}


def test_the_processor_cuts_images_as_the_tower_takes_them(converted: Callable[..., Any], tmp_path: Path) -> None:
    image = converted("scout", "preprocessor_config.json")
    assert image["image_processor_type"] == "Llama4ImageProcessorFast"
    assert image["size"] == {"height": 56, "width": 56}
    assert image["image_mean"] == image["image_std"] == [0.5, 0.5, 0.5]
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert processor["patch_size"] == 14
    assert processor["pixel_shuffle_ratio"] == 0.5


# -------------------- which kind of model


@pytest.mark.parametrize(
    ("geometry", "extra", "folder", "variant", "context"),
    [
        ("scout", True, "Llama-4-Scout-17B-16E-Instruct", "base", 262144),  # it carries a base model's statistics
        ("guard", True, "anything", "guard", 8192),
        ("scout", False, "Llama-4-Scout-17B-16E", "instruct", 10485760),
        ("scout", False, "Llama-4-Scout-17B-16E-Instruct", "instruct", 10485760),
        ("scout", False, "Llama-4-Scout-Base", "base", 262144),
        ("scout", False, "Llama-4-Scout-Base/original", "base", 262144),
        ("maverick", False, "Llama-4-Maverick-Instruct", "instruct", 1048576),
    ],
)
def test_the_variant_is_concluded_with_a_reason(
    meta_checkpoint: Callable[..., Any],
    tmp_path: Path,
    geometry: str,
    extra: bool,
    folder: str,
    variant: str,
    context: int,
) -> None:
    source = commands.copy(meta_checkpoint(geometry, 1, extra=extra).src, tmp_path / folder)
    found = plan(source)
    assert (found.variant, found.max_position_embeddings) == (variant, context)
    assert found.variant_reason


def test_what_you_say_counts(meta_checkpoint: Callable[..., Any]) -> None:
    found = plan(meta_checkpoint("guard").src, variant="base")
    assert (found.variant, found.variant_reason) == ("base", "you said so")


# -------------------- around the weights


def test_without_a_tokenizer_the_ids_follow_from_the_vocabulary(
    meta_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    source = commands.copy(meta_checkpoint("scout").src, tmp_path / "source")
    (source / "tokenizer.model").unlink()
    warnings: list[str] = []
    convert(source, tmp_path / "out", warn=warnings.append)
    assert "no tokenizer.model" in warnings[0]
    assert not list((tmp_path / "out").glob("tokenizer*"))
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (text["bos_token_id"], text["pad_token_id"]) == (BEGIN, PAD)


def test_a_tokenizer_of_another_size(meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """Fewer tokens than rows: padding, a warning. More: another model's."""
    source = commands.copy(meta_checkpoint("scout").src, tmp_path / "source")
    lines = (source / "tokenizer.model").read_bytes().splitlines(keepends=True)
    (source / "tokenizer.model").write_bytes(b"".join(lines[:260]))
    warnings: list[str] = []
    convert(source, tmp_path / "out", warn=warnings.append)
    assert any("4 more rows" in text for text in warnings)
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (text["vocab_size"], text["bos_token_id"]) == (meta_model.VOCAB_SIZE, 260)

    (source / "tokenizer.model").write_bytes(b"".join([*lines, b"dGhlIA== 264\n"]))
    with pytest.raises(BadInput, match="another model's"):
        convert(source, tmp_path / "more")


def test_the_licence_goes_with_the_weights_and_params_json_is_kept_verbatim(
    meta_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    source = commands.copy(meta_checkpoint("scout").src, tmp_path / "source")
    texts = {"LICENSE": b"Llama 4 Community License\n", "USE_POLICY.md": b"be good\n", "LICENSE.txt": b"\xff\x00"}
    for name, text in texts.items():
        (source / name).write_bytes(text)
    (source / "README.md").write_text("not ours to copy")
    convert(source, tmp_path / "out")
    for name, text in texts.items():
        assert (tmp_path / "out" / name).read_bytes() == text
    assert "not ours to copy" not in (tmp_path / "out" / "README.md").read_text()
    original = (tmp_path / "out" / "original" / "params.json").read_bytes()
    assert original == (source / "params.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"), [({"floor_scale": 2.5}, "floor_scale"), ({"vision_args__mlp_ratio": 2.0}, "vision")]
)
def test_what_transformers_cannot_say_is_refused(
    meta_checkpoint: Callable[..., Any], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    source = commands.copy(meta_checkpoint("scout").src, tmp_path / "source")
    commands.change_params(source, **change)
    with pytest.raises(BadInput, match=words):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
