"""The reference model computes what Meta's code computes, from either layout, whole or a piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4.cache import KVCache
from llama4.config import Llama4Config
from llama4.loading import DictWeights, LazyWeights
from llama4.text import attend, mixture, rope_frequencies, rotate
from llama4.vision import pixel_shuffle, rope_angles_2d
from llama4.weights import parameter_shapes
from llama4_convert import load_reference
from llama4_convert.errors import BadInput
from llama4_convert.reference.checkpoint import Checkpoint
from tests.support import meta_model

GEOMETRIES = sorted(meta_model.GEOMETRIES)
WITH_VISION = [n for n in GEOMETRIES if meta_model.GEOMETRIES[n].get("vision_args")]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_text_logits_are_metas_from_either_layout(
    geometry: str, meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path]
) -> None:
    source = meta_checkpoint(geometry, ranks=2)
    tokens = meta_model.text_tokens(source.model, 40)
    expected = meta_model.logits(source.model, tokens)
    for path in (source.src, converted(geometry)):
        found = load_reference(path, dtype=torch.float32)(tokens)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("geometry", WITH_VISION)
def test_image_logits_are_metas_from_either_layout(
    geometry: str, meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path]
) -> None:
    source = meta_checkpoint(geometry, ranks=2)
    tokens, pixels = meta_model.image_inputs(source.model)
    expected = meta_model.logits(source.model, tokens, pixels)
    for path in (source.src, converted(geometry)):
        found = load_reference(path, dtype=torch.float32)(tokens, pixels)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("ranks", "spelling"), [(1, "module"), (4, "mixed"), (8, "published")])
def test_ranks_and_spelling_change_nothing(ranks: int, spelling: str, meta_checkpoint: Callable[..., Any]) -> None:
    source = meta_checkpoint("maverick", ranks=ranks, spelling=spelling)
    tokens = meta_model.text_tokens(source.model, 12)
    found = load_reference(source.src, dtype=torch.float32)(tokens)
    torch.testing.assert_close(found, meta_model.logits(source.model, tokens), atol=2e-5, rtol=0)


def test_the_dtype_is_the_checkpoints_unless_said(meta_checkpoint: Callable[..., Any]) -> None:
    source = meta_checkpoint("text_only", ranks=2)
    tokens = meta_model.text_tokens(source.model, 5)
    assert load_reference(source.src)(tokens).dtype == torch.bfloat16
    assert load_reference(source.src, dtype=torch.float16)(tokens).dtype == torch.float16


@pytest.mark.parametrize("geometry", ["scout", "custom_rope", "maverick"])
def test_rope_turns_as_fast_as_metas(geometry: str, meta_checkpoint: Callable[..., Any]) -> None:
    """Slow pairs, which short prompts do not show."""
    source = meta_checkpoint(geometry, ranks=2)
    found = rope_frequencies(Checkpoint.open(source.src).config.text_config)
    torch.testing.assert_close(found, meta_model.rope_frequencies(source.model), rtol=1e-6, atol=0)


def test_vision_rope_turns_as_metas(meta_checkpoint: Callable[..., Any]) -> None:
    source = meta_checkpoint("odd", ranks=2)
    config = Checkpoint.open(source.src).config.vision_config
    assert config is not None
    expected = source.model.vision_embeddings.vision_encoder.freq_cis
    angles = rope_angles_2d(config)
    torch.testing.assert_close(torch.polar(torch.ones_like(angles), angles), expected)


def test_positions_of_rotation_are_relative() -> None:
    """q at m and k at n meet as q at m - n and k at 0."""
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    frequencies = torch.rand(4)

    def product(m: int, n: int) -> torch.Tensor:
        return (rotate(q, frequencies[None] * m) * rotate(k, frequencies[None] * n)).sum()

    torch.testing.assert_close(product(7, 5), product(2, 0))


class TestAPieceAtATime:
    """A 400 B model must run in little memory: nothing may ask for more than one tensor, expert or slice."""

    def test_only_experts_that_a_token_goes_to_are_read(self, meta_checkpoint: Callable[..., Any]) -> None:
        model = load_reference(meta_checkpoint("maverick", ranks=2).src, dtype=torch.float32)
        asked = Recorder(model.weights)
        model.model.weights = asked
        model.model.layer(1, torch.randn(1, 1, 128))
        experts = {name.split(".")[4] for name in asked.names if ".experts." in name}
        assert len(experts) == 1

    def test_vocabulary_slices_are_the_logits(self, meta_checkpoint: Callable[..., Any]) -> None:
        model = load_reference(meta_checkpoint("guard", ranks=2).src, dtype=torch.float32)
        hidden = torch.randn(3, 128)
        slices = list(model.logit_slices(hidden, rows=1000))
        assert [(first, part.shape[-1]) for first, part in slices] == [(0, 1000), (1000, 1000), (2000, 312)]
        torch.testing.assert_close(torch.cat([part for _, part in slices], -1), model.logits(hidden))

    def test_embeddings_are_read_a_row_at_a_time(self, meta_checkpoint: Callable[..., Any]) -> None:
        checkpoint = Checkpoint.open(meta_checkpoint("guard", ranks=2).src)
        read: list[Any] = []
        tensors = [recording(t, read) for t in checkpoint.logical_tensors() if t.name == "tok_embeddings"]
        weights = LazyWeights(tensors, checkpoint.config, dtype=torch.float32)
        found = weights.rows("tok_embeddings", torch.tensor([2311, 5, 5]))
        assert read == [(5, 6), (2311, 2312)]
        torch.testing.assert_close(found, weights["tok_embeddings"][[2311, 5, 5]])

    def test_what_is_kept_is_bounded_and_never_read_again(self, meta_checkpoint: Callable[..., Any]) -> None:
        checkpoint = Checkpoint.open(meta_checkpoint("guard", ranks=2).src)
        read: list[Any] = []
        tensors = [recording(t, read) for t in checkpoint.logical_tensors()]
        norm_bytes = 128 * 4
        weights = LazyWeights(tensors, checkpoint.config, dtype=torch.float32, keep_bytes=norm_bytes)
        for _ in range(2):
            _ = weights["norm"], weights["layers.0.attention_norm"]
        assert len(read) == 1 + 2  # the first stays, the second does not fit

    def test_layers_one_by_one_are_the_whole(self, meta_checkpoint: Callable[..., Any]) -> None:
        source = meta_checkpoint("scout", ranks=2)
        model = load_reference(source.src, dtype=torch.float32, keep_bytes=0)
        tokens = meta_model.text_tokens(source.model, 20)
        x = model.embed(tokens)
        for index in range(model.config.text_config.num_hidden_layers):
            x = model.model.layer(index, x)
        torch.testing.assert_close(model.logits(model.model.final_norm(x)), model(tokens))


class Recorder:
    def __init__(self, weights: Any) -> None:
        self.weights, self.names = weights, []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.names.append(name)
        return self.weights[name]

    def rows(self, name: str, index: Any) -> torch.Tensor:
        return self.weights.rows(name, index)

    def expect(self, names: Iterable[str]) -> None:
        self.weights.expect(names)


def recording(tensor: Any, read: list[Any]) -> Any:
    from dataclasses import replace

    def load(rows: Any) -> Any:
        read.append(rows)
        return tensor.load(rows)

    return replace(tensor, load=load)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chunks_without_a_mask_are_the_masked_attention(data: st.DataObject) -> None:
    """`attend` cuts at chunks; Meta's definition is a T x T mask."""
    total = data.draw(st.integers(1, 24))
    start = data.draw(st.integers(0, total - 1))
    chunk = data.draw(st.none() | st.integers(1, 30))
    first = start if chunk is None else max(start - start % chunk, 0)
    if chunk is None:
        first = 0
    q = torch.randn(2, 4, total - start, 8)
    k, v = torch.randn(2, 2, total, 8), torch.randn(2, 2, total, 8)
    found = attend(q, k[:, :, first:], v[:, :, first:], start, first, chunk)

    row, column = torch.arange(start, total)[:, None], torch.arange(total)[None]
    mask = column <= row
    if chunk is not None:
        mask &= column // chunk == row // chunk
    grouped = (t.repeat_interleave(2, dim=1) for t in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, *grouped, attn_mask=mask)
    torch.testing.assert_close(found, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_sparse_dispatch_is_the_dense_sum(top_k: int, experts: int, tokens: int, seed: int) -> None:
    top_k = min(top_k, experts)
    generator = torch.Generator().manual_seed(seed)
    names = {"router": (experts, 6)}
    for part in ("shared", *(f"experts.{e}" for e in range(experts))):
        names |= {f"{part}.gate": (4, 6), f"{part}.up": (4, 6), f"{part}.down": (6, 4)}
    weights = DictWeights({name: torch.randn(shape, generator=generator) for name, shape in names.items()})
    x = torch.randn(tokens, 6, generator=generator)
    found, scores = mixture(x, weights, "", top_k)

    def swiglu(x: torch.Tensor, part: str) -> torch.Tensor:
        hidden = torch.nn.functional.silu(x @ weights[f"{part}.gate"].T) * (x @ weights[f"{part}.up"].T)
        return hidden @ weights[f"{part}.down"].T

    expected = swiglu(x, "shared")
    for n in range(tokens):
        best = sorted(range(experts), key=lambda e, n=n: -scores[n, e])[:top_k]
        for e in best:
            expected[n] += swiglu(x[n] * scores[n, e].sigmoid(), f"experts.{e}")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_pixel_shuffle_joins_squares_of_neighbours() -> None:
    patches = torch.arange(16.0).reshape(1, 16, 1)
    assert pixel_shuffle(patches, 0.5)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


class TestMisuse:
    def test_images_for_a_text_model(self, meta_checkpoint: Callable[..., Any]) -> None:
        model = load_reference(meta_checkpoint("text_only", ranks=2).src)
        with pytest.raises(ValueError, match="no vision tower"):
            model(torch.tensor([[1]]), torch.zeros(1, 3, 56, 56))

    def test_tiles_and_patch_tokens_that_do_not_match(self, meta_checkpoint: Callable[..., Any]) -> None:
        model = load_reference(meta_checkpoint("scout", ranks=2).src)
        with pytest.raises(ValueError, match=r"4 features.*1 <\|patch\|>"):
            model(torch.tensor([[1, meta_model.PATCH_TOKEN]]), torch.zeros(1, 3, 56, 56))

    @pytest.mark.parametrize("token", [-1, meta_model.VOCAB_SIZE])
    def test_a_token_outside_the_vocabulary(self, token: int, meta_checkpoint: Callable[..., Any]) -> None:
        model = load_reference(meta_checkpoint("text_only", ranks=2).src)
        with pytest.raises(IndexError, match="2312 rows"):
            model(torch.tensor([[1, token]]))

    def test_a_tensor_that_is_missing(self, meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
        source = meta_checkpoint("text_only", ranks=1)
        (tmp_path / "params.json").write_bytes((source.src / "params.json").read_bytes())
        tensors = torch.load(source.src / "consolidated.00.pth", weights_only=False)
        del tensors["layers.1.attention.wo.weight"]
        torch.save(tensors, tmp_path / "consolidated.00.pth")
        with pytest.raises(BadInput, match=r"no tensor layers\.1\.attention\.wo\.weight"):
            load_reference(tmp_path)


def test_every_shape_is_stated(meta_checkpoint: Callable[..., Any]) -> None:
    """`parameter_shapes` against the parameters of Meta's own model: as many numbers, tensor by tensor of the vision tower."""
    source = meta_checkpoint("odd", ranks=2)
    config: Llama4Config = Checkpoint.open(source.src).config
    total = sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())
    assert total == sum(p.numel() for p in source.model.parameters())


class TestCache:
    @pytest.mark.parametrize("geometry", ["scout", "odd", "temperature", "nope_without_chunks"])
    @pytest.mark.parametrize("steps", [(1,) * 20, (3, 9, 1, 1, 6), (19, 1)])
    def test_any_steps_give_the_logits_of_one_pass(
        self, geometry: str, steps: tuple[int, ...], meta_checkpoint: Callable[..., Any]
    ) -> None:
        source = meta_checkpoint(geometry, ranks=2)
        model = load_reference(source.src, dtype=torch.float32)
        tokens = meta_model.text_tokens(source.model, 20)
        cache = KVCache()
        parts = [model(part, cache=cache) for part in tokens.split(list(steps), dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=2e-5, rtol=0)

    def test_chunked_layers_keep_the_current_chunk_only(self, meta_checkpoint: Callable[..., Any]) -> None:
        source = meta_checkpoint("scout", ranks=2)  # chunks of 8, layer 3 sees everything
        model = load_reference(source.src, dtype=torch.float32)
        cache = KVCache()
        model(meta_model.text_tokens(source.model, 43), cache=cache)
        kept = [cache._held[layer][0].shape[2] for layer in range(5)]
        assert kept == [3, 3, 3, 43, 3]
        assert [cache.length(layer) for layer in range(5)] == [43] * 5
        assert cache.nbytes == 2 * 2 * 8 * 8 * 4 * sum(kept)  # k and v, batch, heads, width, fp32


def test_the_fields_names_are_importable_from_the_package() -> None:
    import llama4

    assert set(llama4.__all__) == set(llama4._HOME)
    for name in llama4.__all__:
        assert getattr(llama4, name).__name__ == name
    with pytest.raises(AttributeError, match="Llama5"):
        _ = llama4.Llama5
