"""`generate`: greedy and sampled texts, how pictures are opened, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from llama4_convert import convert, generate
from llama4_convert.reference.generation import open_image
from tests.support import commands


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


class TestOpenImage:
    @pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
    @pytest.mark.parametrize("orientation", range(10))  # 1 to 8 have a meaning
    def test_orientations_are_those_of_transformers(self, orientation: int, suffix: str, tmp_path: Path) -> None:
        path, exif = tmp_path / f"photo.{suffix}", Image.Exif()
        exif[0x0112] = orientation
        pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path, exif=exif)
        ours, theirs = open_image(path), load_image(str(path))
        assert ours.size == theirs.size == ((5, 8) if 5 <= orientation <= 8 else (8, 5))
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))

    def test_transparency_is_left_to_the_processor(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGBA", (8, 5), (10, 20, 30, 0)).save(tmp_path / "glass.png", exif=exif)
        image = open_image(tmp_path / "glass.png")
        assert (image.mode, image.size) == ("RGBA", (5, 8))
