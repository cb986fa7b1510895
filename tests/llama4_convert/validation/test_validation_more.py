"""Clean conversions that validation once called wrong, and faults that it once passed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_convert import convert, export, generate, plan, validate
from llama4_convert.errors import BadInput
from tests.support import commands, meta_model

SCOUT = meta_model.GEOMETRIES["scout"]


def written(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    params = {**SCOUT, "n_layers": 2, **changes}
    return meta_model.write_checkpoint(meta_model.build(params, 0, dtype), params, folder, ranks=2, dtype=dtype)


@pytest.mark.parametrize(
    ("source", "target"), [("float32", "bfloat16"), ("float16", "bfloat16"), ("float32", "float16")]
)
def test_a_dtype_that_loses_bits_is_no_fault(source: str, target: str, tmp_path: Path) -> None:
    """The reference is rounded as the conversion rounds."""
    written(tmp_path / "meta", getattr(torch, source))
    convert(tmp_path / "meta", tmp_path / "out", dtype=target)
    assert validate(tmp_path / "out", reference=tmp_path / "meta", tokens=24).passed


def test_the_way_back_of_a_base_model_stops_where_it_did(tmp_path: Path) -> None:
    """Meta's layout does not say which of the three tokens end a generation of this variant."""
    written(tmp_path / "meta", vision_args=None)
    convert(tmp_path / "meta", tmp_path / "out", variant="base")
    export(tmp_path / "out", tmp_path / "back")
    assert validate(tmp_path / "back", reference=tmp_path / "out", tokens=8).passed


def test_chunks_where_every_layer_is_nope(tmp_path: Path) -> None:
    """Then nothing is chunked, and config.json must say so to readers that look at the size alone."""
    written(tmp_path / "meta", nope_layer_interval=1, attention_chunk_size=8)
    convert(tmp_path / "meta", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["text_config"]["attention_chunk_size"] >= 8192
    assert validate(tmp_path / "out", reference=tmp_path / "meta", tokens=24).passed


def test_a_seventh_of_the_patches(tmp_path: Path) -> None:
    """1/7 is no binary fraction: a tile has (7 / 7)^2 tokens, not 0.99."""
    vision = {**SCOUT["vision_args"], "image_size": {"height": 98, "width": 98}, "pixel_shuffle_ratio": 1 / 7}
    written(tmp_path / "meta", vision_args={**vision, "dim": 16, "n_heads": 2, "mlp_ratio": 49.0})
    convert(tmp_path / "meta", tmp_path / "out")
    assert validate(tmp_path / "out", reference=tmp_path / "meta", tokens=8).passed


def test_a_vocabulary_of_special_tokens_only(tmp_path: Path) -> None:
    """As many rows as there are special tokens, and no tokenizer.model: neither side then knows an id."""
    written(tmp_path / "meta", vocab_size=2048, vision_args=None)
    (tmp_path / "meta" / "tokenizer.model").unlink()
    convert(tmp_path / "meta", tmp_path / "out")
    assert validate(tmp_path / "out", reference=tmp_path / "meta", tokens=8).passed


def test_experts_that_no_layer_has(tmp_path: Path) -> None:
    """An interval beyond the last layer: a dense model, whatever moe_args says of experts."""
    written(tmp_path / "meta", moe_args={**SCOUT["moe_args"], "interleave_moe_layer_step": 9}, ffn_exp=None)
    convert(tmp_path / "meta", tmp_path / "out")
    assert validate(tmp_path / "out", reference=tmp_path / "meta", tokens=24).passed


def test_a_rope_that_transformers_scales_in_another_way_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "meta", rope_high_freq_factor=0.25)
    with pytest.raises(BadInput, match=r"rope_high_freq_factor is 0\.25"):
        convert(tmp_path / "meta", tmp_path / "out")
    assert plan(tmp_path / "meta").files


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


class TestGenerate:
    @pytest.fixture
    def output(self, meta_checkpoint: Callable[..., Any], tmp_path: Path) -> Path:
        convert(meta_checkpoint("text_only", ranks=2).src, tmp_path / "out")
        return tmp_path / "out"

    @pytest.mark.parametrize("temperature", ["1e-45", "1e-300"])
    def test_the_smallest_temperature_is_greedy(self, temperature: str, output: Path) -> None:
        options: dict[str, Any] = {"max_new_tokens": 6, "dtype": "float32"}
        greedy = generate(output, "Hello", **options)
        assert generate(output, "Hello", temperature=float(temperature), seed=1, **options).tokens == greedy.tokens

    def test_a_temperature_that_is_no_number(self, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
        outcome = commands.run(capsys, "generate", output, "--prompt", "x", "--temperature", "nan")
        assert outcome.code == 2

    @pytest.mark.parametrize("temperature", ["0", "1"])
    def test_weights_that_are_no_numbers(
        self, temperature: str, meta_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(meta_checkpoint("text_only", ranks=1).src, tmp_path / "nan")
        content = torch.load(tmp_path / "nan" / "consolidated.00.pth", weights_only=False)
        content["norm.weight"][0] = float("nan")
        torch.save(content, tmp_path / "nan" / "consolidated.00.pth")
        outcome = commands.run(capsys, "generate", tmp_path / "nan", "--prompt", "x", "--temperature", temperature)
        assert outcome.code == 3
        assert "NaN or infinite" in outcome.error

    @pytest.mark.parametrize(
        ("field", "value"),
        [("num_experts_per_tok", 99), ("head_dim", 1), ("hidden_act", "relu"), ("attention_bias", True)],
    )
    def test_a_configuration_that_contradicts_itself(
        self, field: str, value: Any, output: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        body = json.loads((output / "config.json").read_bytes())
        body[field] = value
        (output / "config.json").write_text(json.dumps(body))
        outcome = commands.run(capsys, "generate", output, "--prompt", "x")
        assert outcome.code == 3
        assert field in outcome.error
