"""Generation: Transformers' greedy tokens, and sampling that does what temperature and top-p say."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4.generate import generate, sample
from llama4_convert import convert, load_reference
from llama4_convert.validation.parity.transformers_runner import load_transformers
from tests.support import meta_model

GEOMETRIES = sorted(meta_model.GEOMETRIES)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_greedy_text_is_transformers(geometry: str, meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """Prompts shorter and longer than a chunk (7 or 8 tokens), over several chunk borders."""
    source = meta_checkpoint(geometry, ranks=2)
    convert(source.src, tmp_path / "out")
    theirs = load_transformers(tmp_path / "out", torch.float32)
    theirs.generation_config.eos_token_id = None
    ours = load_reference(source.src, dtype=torch.float32)
    for length in (3, 8, 21):
        tokens = meta_model.text_tokens(source.model, length)
        options: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "do_sample": False}
        expected = theirs.generate(tokens, max_new_tokens=24, **options)
        assert torch.equal(ours.generate(tokens, max_new_tokens=24), expected)


@pytest.mark.parametrize("geometry", ["scout", "guard", "odd"])
def test_greedy_text_about_an_image_is_transformers(
    geometry: str, meta_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    source = meta_checkpoint(geometry, ranks=2)
    convert(source.src, tmp_path / "out")
    theirs = load_transformers(tmp_path / "out", torch.float32)
    theirs.generation_config.eos_token_id = None
    tokens, pixels = meta_model.image_inputs(source.model)
    expected = theirs.generate(
        tokens, pixel_values=pixels, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=16
    )
    ours = load_reference(source.src, dtype=torch.float32)
    assert torch.equal(ours.generate(tokens, pixels, max_new_tokens=16), expected)


class Counting:
    """A model whose likeliest next token is the last one plus 1."""

    def hidden_states(self, tokens: Any, pixel_values: Any = None, cache: Any = None) -> torch.Tensor:
        return tokens[..., None].float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(hidden[..., 0].long() + 1, 50).float()


def count(prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return [step.tolist() for step in generate(Counting(), torch.tensor(prompts), **options)]


def test_a_stop_token_is_yielded_and_ends_it() -> None:
    assert count([[1]], stop=[4]) == [[2], [3], [4]]


def test_a_row_that_has_ended_waits_for_the_others() -> None:
    assert count([[2], [1]], stop=[4]) == [[3, 2], [4, 3], [4, 4]]


def test_no_more_than_asked_for() -> None:
    assert count([[1]], max_new_tokens=2) == [[2], [3]]
    assert count([[1]], max_new_tokens=0) == []


def test_generate_returns_the_prompt_with_what_follows(meta_checkpoint: Callable[..., Any]) -> None:
    model = load_reference(meta_checkpoint("text_only", ranks=2).src)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=0).tolist() == [[5, 6]]
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape == (1, 5)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"max_new_tokens": -1}])
def test_numbers_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        count([[1]], **options)


def test_an_empty_prompt() -> None:
    with pytest.raises(ValueError, match="empty"):
        count([[]])


class TestSampling:
    LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def share(self, temperature: float, top_p: float) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        drawn = sample(self.LOGITS.expand(20000, -1), temperature, top_p, generator)
        return (drawn.bincount(minlength=4) / 20000).tolist()

    def test_at_temperature_1_tokens_come_as_often_as_likely(self) -> None:
        assert self.share(1.0, 1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)

    def test_temperature_sharpens(self) -> None:
        expected = (self.LOGITS[0] / 0.5).softmax(-1).tolist()
        assert self.share(0.5, 1.0) == pytest.approx(expected, abs=0.015)

    @pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.96, 4)])
    def test_top_p_keeps_the_smallest_set_that_exceeds_it(self, top_p: float, kept: int) -> None:
        weights = [0.5, 0.3, 0.15, 0.05][:kept]
        expected = [w / sum(weights) for w in weights] + [0.0] * (4 - kept)
        assert self.share(1.0, top_p) == pytest.approx(expected, abs=0.015)

    def test_a_seed_repeats_the_text(self, meta_checkpoint: Callable[..., Any]) -> None:
        model = load_reference(meta_checkpoint("text_only", ranks=2).src)
        tokens = torch.tensor([[5, 6, 7]])
        first, again, other = (model.generate(tokens, temperature=1.0, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_meta_samples_from_the_same_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Against Meta's `sample_top_p`, token by token of what may be drawn."""
        # Its module imports a package that colours the terminal and is not installed with it.
        monkeypatch.setitem(sys.modules, "termcolor", types.SimpleNamespace(cprint=print))
        from llama_models.llama4.generation import sample_top_p

        torch.manual_seed(0)
        for _ in range(20):
            logits = torch.randn(1, 30) * 3
            probabilities = logits.softmax(-1).expand(4000, -1)
            theirs = set(sample_top_p(probabilities.clone(), 0.8).flatten().tolist())
            ours = set(sample(logits.expand(4000, -1), 1.0, 0.8, torch.Generator().manual_seed(0)).tolist())
            rare = logits.softmax(-1)[0] < 0.004
            assert {t for t in theirs if not rare[t]} == {t for t in ours if not rare[t]}
