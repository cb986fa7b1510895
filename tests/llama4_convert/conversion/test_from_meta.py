"""Acceptance: `convert` writes the oracle's tensors bit for bit, and Transformers computes Meta's logits from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

from llama4_convert import convert
from tests.support import meta_model, oracle

TOLERANCE = 1e-4  # fp32; a wrong config or tensor moves logits by 1e-2 and more (test_harness.py), rounding by 5e-6
PROMPT = 40  # five chunks, ten steps of the temperature

# Each geometry, every rank count, every spelling; not every combination.
CASES = [
    ("scout", 8, "published"),
    ("scout", 4, "mixed"),
    ("scout", 1, "module"),
    ("maverick", 8, "published"),
    ("maverick", 2, "mixed"),
    ("maverick", 1, "published"),
    ("guard", 8, "published"),
    ("guard", 4, "mixed"),
    ("guard", 1, "module"),
    ("dense_chunks", 2, "mixed"),
    ("nope_without_chunks", 2, "published"),
    ("text_only", 8, "mixed"),
    ("odd", 2, "published"),
    ("odd", 1, "mixed"),
    ("top2", 4, "module"),
    ("temperature", 2, "published"),
    ("nested", 2, "mixed"),
    ("absent", 4, "published"),
    ("absent_moe", 2, "mixed"),
    ("nulls", 8, "published"),
    ("custom_rope", 1, "published"),
]


@dataclass
class Converted:
    """A checkpoint and what `convert` made of it; the Transformers model is loaded when a test first asks."""

    src: Path
    dst: Path
    meta: Any
    vision: bool

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.dst / "config.json").read_text())

    @cached_property
    def loaded(self) -> tuple[Any, dict[str, Any]]:
        cls = Llama4ForConditionalGeneration if self.vision else Llama4ForCausalLM
        model, info = cls.from_pretrained(self.dst, dtype=torch.float32, output_loading_info=True)
        return model.eval(), info

    def assert_tensors_are(self, expected: dict[str, Tensor]) -> None:
        found = oracle.read_safetensors_dir(self.dst)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert found[name].shape == tensor.shape, name
            # As bytes: torch.equal would take -0.0 for 0.0.
            assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name

    def assert_loads_whole(self) -> None:
        _, info = self.loaded
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]

    def assert_logits_are_metas(self, tokens: Tensor, pixel_values: Tensor | None = None) -> None:
        model, _ = self.loaded
        inputs = {"input_ids": tokens} if pixel_values is None else {"input_ids": tokens, "pixel_values": pixel_values}
        with torch.no_grad():
            found = model(**inputs, use_cache=False).logits
        assert (found - meta_model.logits(self.meta, tokens, pixel_values)).abs().max() < TOLERANCE


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def converted(
    request: pytest.FixtureRequest, meta_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    geometry, ranks, spelling = request.param
    checkpoint = meta_checkpoint(geometry, ranks, spelling)
    dst = tmp_path_factory.mktemp("converted") / "out"
    convert(checkpoint.src, dst)
    return Converted(checkpoint.src, dst, checkpoint.model, vision=bool(checkpoint.model.args.vision_args))


def test_every_tensor_is_the_oracles(converted: Converted) -> None:
    converted.assert_tensors_are(oracle.slow_convert(converted.src))


def test_transformers_finds_every_tensor_and_no_other(converted: Converted) -> None:
    cls = Llama4ForConditionalGeneration if converted.vision else Llama4ForCausalLM
    assert converted.config["architectures"] == [cls.__name__]
    converted.assert_loads_whole()


def test_text_logits_are_metas(converted: Converted) -> None:
    converted.assert_logits_are_metas(meta_model.text_tokens(converted.meta, PROMPT))


def test_image_logits_are_metas(converted: Converted) -> None:
    if not converted.vision:
        assert "vision_config" not in converted.config
        return
    assert converted.config["image_token_index"] == meta_model.PATCH_TOKEN
    converted.assert_logits_are_metas(*meta_model.image_inputs(converted.meta))


def test_rope_frequencies_are_metas(converted: Converted) -> None:
    """Logits of a short prompt hide a wrong scaling factor: 8 for 16 moves them by 2e-5."""
    model, _ = converted.loaded
    text = model.language_model if converted.vision else model
    expected = meta_model.rope_frequencies(converted.meta)
    torch.testing.assert_close(text.model.rotary_emb.inv_freq, expected, rtol=1e-5, atol=0)


def test_the_config_says_what_short_prompts_hide(converted: Converted) -> None:
    """Temperature steps of 8192 tokens, a tiny epsilon, chunks of 8192 in place of none: no short prompt shows them."""
    model, _ = converted.loaded
    config, args = model.config.get_text_config(), converted.meta.args
    assert config.rms_norm_eps == args.norm_eps
    assert config.attn_temperature_tuning == args.attn_temperature_tuning
    assert config.floor_scale == args.floor_scale
    assert config.attn_scale == args.attn_scale
    assert config.layer_types == [
        "chunked_attention" if layer.attention.use_rope and args.attention_chunk_size else "full_attention"
        for layer in converted.meta.layers
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_dtype_of_the_checkpoint_is_kept(
    meta_checkpoint: Callable[..., Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    checkpoint = meta_checkpoint("maverick", 2, "published", dtype)
    result = Converted(checkpoint.src, tmp_path / "out", checkpoint.model, vision=True)
    convert(result.src, result.dst)
    expected = oracle.slow_convert(result.src)
    assert {tensor.dtype for tensor in expected.values()} == {dtype}
    result.assert_tensors_are(expected)
    named = result.config.get("dtype", result.config.get("torch_dtype"))
    assert named == str(dtype).removeprefix("torch.")
    result.assert_logits_are_metas(meta_model.text_tokens(result.meta, PROMPT))


@pytest.mark.parametrize("layout", ["views", "one_storage", "parameters"])
@pytest.mark.parametrize(("geometry", "ranks", "spelling"), [("scout", 8, "published"), ("odd", 2, "mixed")])
def test_tensors_stored_in_unusual_ways(
    meta_checkpoint: Callable[..., Any], tmp_path: Path, geometry: str, ranks: int, spelling: str, layout: str
) -> None:
    """Strides, offsets, a storage shared by many tensors, nn.Parameter in an OrderedDict with metadata."""
    checkpoint = meta_checkpoint(geometry, ranks, spelling, layout=layout)
    result = Converted(checkpoint.src, tmp_path / "out", checkpoint.model, vision=True)
    convert(result.src, result.dst)
    result.assert_tensors_are(oracle.slow_convert(result.src))


@pytest.mark.parametrize(("geometry", "ranks"), [("scout", 8), ("maverick", 2), ("guard", 4)])
def test_text_only_leaves_a_plain_language_model(
    meta_checkpoint: Callable[..., Any], tmp_path: Path, geometry: str, ranks: int
) -> None:
    checkpoint = meta_checkpoint(geometry, ranks)
    result = Converted(checkpoint.src, tmp_path / "out", checkpoint.model, vision=False)
    convert(result.src, result.dst, text_only=True)
    result.assert_tensors_are(oracle.slow_convert(result.src, text_only=True))
    assert result.config["architectures"] == ["Llama4ForCausalLM"]
    assert "vision_config" not in result.config
    result.assert_loads_whole()
    result.assert_logits_are_metas(meta_model.text_tokens(result.meta, PROMPT))


@pytest.mark.parametrize("geometry", ["maverick", "odd"])
def test_small_shards_hold_the_same_tensors(meta_checkpoint: Callable[..., Any], tmp_path: Path, geometry: str) -> None:
    checkpoint = meta_checkpoint(geometry, 2, "mixed")
    result = Converted(checkpoint.src, tmp_path / "out", checkpoint.model, vision=True)
    convert(result.src, result.dst, shard_size=300_000)
    assert len(list(result.dst.glob("*.safetensors"))) > 3
    result.assert_tensors_are(oracle.slow_convert(result.src))
    result.assert_loads_whole()


@pytest.mark.parametrize(
    ("source", "target"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str
)
def test_another_dtype_on_request(
    meta_checkpoint: Callable[..., Any], tmp_path: Path, source: torch.dtype, target: torch.dtype
) -> None:
    checkpoint = meta_checkpoint("absent_moe", 2, "published", source)
    result = Converted(checkpoint.src, tmp_path / "out", checkpoint.model, vision=True)
    convert(result.src, result.dst, dtype=str(target).removeprefix("torch."))
    result.assert_tensors_are({name: t.to(target) for name, t in oracle.slow_convert(result.src).items()})
