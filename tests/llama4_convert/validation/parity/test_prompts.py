"""Prompts come from files that people write, and side by side they are what each would be alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4.chat import Inputs
from llama4.config import Llama4Config
from llama4_convert.errors import BadInput, ConvertError, EnvironmentFailed, UsageError
from llama4_convert.validation.parity import prompts
from llama4_convert.validation.parity.prompts import (
    Batch,
    Prompt,
    check_prompts,
    prompts_of_file,
    prompts_of_ids,
    random_prompts,
)
from tests.support import meta_model

PATCH = 42
BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="session")
def config() -> Llama4Config:
    """Of a model that sees, 4 patch tokens a tile."""
    text = {"vocab_size": 100, "num_hidden_layers": 1}
    vision = {"image_size": 56, "patch_size": 14, "projector_input_dim": 48, "projector_output_dim": 48}
    body = {"text_config": text, "vision_config": {**vision, "vision_output_dim": 48}, "image_token_index": PATCH}
    return Llama4Config.from_json(body)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "prompts"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def ids_of(path: Path) -> list[list[int]]:
    return [prompt.tokens for prompt in prompts_of_ids(path)]


# -------------------- files of token ids


@pytest.mark.parametrize(
    "content",
    [
        "[[1, 2, 3], [40]]",
        "1 2 3\n40\n",
        "1,2,3\n40",
        "1, 2,\t3 ,\r\n\r\n  40,\r\n",
        "\n\n 1\t2  3\n   \n\n40\n\n",
        BOM + b"[[1, 2, 3], [40]]",
        BOM + b"1 2 3\n40\n",
    ],
)
def test_json_and_lines_say_the_same(file: Any, content: str | bytes) -> None:
    assert ids_of(file(content)) == [[1, 2, 3], [40]]


def test_a_flat_json_list_is_one_prompt(file: Any) -> None:
    assert ids_of(file("[1, 2, 3]")) == [[1, 2, 3]]


@pytest.mark.parametrize("content", ["", "\n \n\t\n", BOM, "[]", "{}", '"1 2 3"', "null", "true"])
def test_nothing_in_the_file_is_a_mistake_of_use(file: Any, content: str | bytes) -> None:
    with pytest.raises(UsageError, match="holds no token ids: write a JSON list"):
        ids_of(file(content))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1 2\nhello\n", "line 2 is no list of token ids: 'hello'"),
        ("1 2\n\n3 x\n", "line 3 is no list"),
        ("1.5 2", "line 1 is no list"),
        (",,,", "prompt 1 is no list"),
        ("[[1, 2]", "line 1 is no list"),
        ("[[1, 2], []]", "prompt 2 is no list"),
        ("[[1, 2], 3]", "prompt 2 is no list"),
        ("[[1, true]]", "prompt 1 is no list"),
        ("[[1, 2.0]]", "prompt 1 is no list"),
        ('[["1"]]', "prompt 1 is no list"),
        ("[[1, NaN]]", "line 1 is no list of token ids"),
        ("[null]", "prompt 1 is no list"),
        ("[" * 100_000, "line 1 is no list"),
        ("[[" + "9" * 5000 + "]]", "line 1 is no list"),
        (b"1 2\n\xff\xfe3", "is not UTF-8 text"),
        (b"1\x002", "line 1 is no list"),
    ],
)
def test_what_is_no_token_id_is_named(file: Any, content: str | bytes, words: str) -> None:
    with pytest.raises((BadInput, UsageError), match=words):
        ids_of(file(content))


def test_a_message_quotes_no_screenful(file: Any) -> None:
    with pytest.raises(BadInput) as refused:
        ids_of(file("x" * 100_000))
    assert len(str(refused.value)) < 500


@given(st.lists(st.lists(st.integers(0, 202047), min_size=2, max_size=6), min_size=1, max_size=5), st.data())
@settings(max_examples=60, deadline=None)
def test_lines_with_any_blanks_and_commas_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], data: st.DataObject
) -> None:
    separator = st.sampled_from([" ", ",", ", ", "\t", " , ", "  "])
    lines = [data.draw(separator).join(map(str, row)) for row in rows]
    path = tmp_path_factory.mktemp("ids") / "ids"
    path.write_text(data.draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(lines))
    assert ids_of(path) == rows


@given(st.binary(max_size=40) | st.text('0123456789[], \n-.eE"tn', max_size=20).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_no_file_ends_in_anything_but_prompts_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("junk") / "ids"
    path.write_bytes(content)
    try:
        found = ids_of(path)
    except ConvertError:
        return
    assert found
    assert all(row and all(type(i) is int for i in row) for row in found)


@pytest.mark.parametrize("read", [prompts_of_ids, lambda path: prompts_of_file(path, Letters())])
def test_a_file_that_cannot_be_read_or_is_no_list_of_prompts(
    read: Any, file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises((EnvironmentFailed, UsageError, BadInput)):
            read(path)
    monkeypatch.setattr(prompts, "_MAX_FILE_BYTES", 10)
    read(file("1 2 3 4 55"))
    with pytest.raises(UsageError, match="that is no list of prompts"):
        read(file("1 2 3 4 555"))


# -------------------- files of text


class Letters:
    """As a processor, one token a letter."""

    def __call__(self, text: str) -> Inputs:
        return Inputs([ord(c) for c in text], None)


def test_a_prompt_a_line_blank_ones_left_out_spaces_kept(file: Any) -> None:
    found = prompts_of_file(file(BOM + b" ab \r\n\n\t\ncd, e\n"), Letters())
    assert ["".join(map(chr, prompt.tokens)) for prompt in found] == [" ab ", "cd, e"]
    assert all(prompt.pixel_values is None for prompt in found)


def test_a_file_without_a_line_of_text_is_a_mistake_of_use(file: Any) -> None:
    for content in ("", "\n\n", " \t\n"):
        with pytest.raises(UsageError, match="holds no prompt: write one a line"):
            prompts_of_file(file(content), Letters())


# -------------------- tokens


@pytest.mark.parametrize(("token", "valid"), [(0, True), (99, True), (100, False), (-1, False), (10**400, False)])
def test_a_token_outside_the_vocabulary_is_named(config: Llama4Config, token: int, valid: bool) -> None:
    given_prompts = [Prompt([1]), Prompt([2, token])]
    if valid:
        check_prompts(given_prompts, config)
        return
    with pytest.raises(BadInput, match=f"prompt 2 has token {token}, and the vocabulary ends at 99"):
        check_prompts(given_prompts, config)


def test_random_prompts_are_repeatable_and_differ_between_seeds(config: Llama4Config) -> None:
    one, again, other = (random_prompts(config, 30, seed) for seed in (1, 1, 2))
    assert [p.tokens for p in one] == [p.tokens for p in again]
    assert one[0].tokens != other[0].tokens
    assert torch.equal(one[1].pixel_values, again[1].pixel_values)
    assert not torch.equal(one[1].pixel_values, other[1].pixel_values)


def test_random_prompts_have_a_patch_token_for_every_feature_of_a_tile_and_no_other(config: Llama4Config) -> None:
    for seed in range(20):
        text, seen = random_prompts(config, 200, seed)
        assert len(text.tokens) == 200
        assert PATCH not in text.tokens
        assert seen.tokens.count(PATCH) == config.vision_config.tokens_a_tile == 4
        assert seen.pixel_values.shape == (1, 3, 56, 56)
        assert seen.pixel_values.abs().max() <= 1
        check_prompts([text, seen], config)


def test_random_tokens_cover_the_vocabulary_from_the_first_to_the_last(config: Llama4Config) -> None:
    [text, _] = random_prompts(config, 5000)
    assert set(text.tokens) == set(range(100)) - {PATCH}
    [text] = random_prompts(Llama4Config(config.text_config), 5000)
    assert set(text.tokens) == set(range(100))


def test_a_model_without_a_patch_token_is_shown_no_tile(config: Llama4Config) -> None:
    assert len(random_prompts(replace(config, image_token_index=None), 5)) == 1
    assert len(random_prompts(replace(config, image_token_index=100), 5)) == 1
    assert len(random_prompts(replace(config, vision_config=None), 5)) == 1


# -------------------- the batch


def test_prompts_are_padded_on_the_right_and_padding_is_known(config: Llama4Config) -> None:
    batch = Batch.padded([Prompt([7, 8, 9]), Prompt([5])], config)
    assert batch.is_real.tolist() == [[True, True, True], [True, False, False]]
    assert batch.tokens[batch.is_real].tolist() == [7, 8, 9, 5]
    assert batch.tokens.shape == (2, 3)
    assert batch.pixel_values is None


def test_a_target_is_the_next_token_of_the_same_prompt(config: Llama4Config) -> None:
    batch = Batch.padded([Prompt([7, 8, 9]), Prompt([5, 6]), Prompt([4])], config)
    assert batch.targets.tolist() == [[8, 9, -1], [6, -1, -1], [-1, -1, -1]]


def test_token_0_is_a_target_like_any_other(config: Llama4Config) -> None:
    batch = Batch.padded([Prompt([1, 0, 0]), Prompt([0, 2])], config)
    assert batch.targets.tolist() == [[0, 0, -1], [2, -1, -1]]


def test_nobody_predicts_a_patch(config: Llama4Config) -> None:
    tile = torch.zeros(1, 3, 56, 56)
    batch = Batch.padded([Prompt([1, PATCH, PATCH, 2], tile)], config)
    assert batch.targets.tolist() == [[-1, -1, 2, -1]]
    without = Batch.padded([Prompt([1, PATCH, 2])], replace(config, image_token_index=None))
    assert without.targets.tolist() == [[PATCH, 2, -1]]


def test_tiles_come_in_the_order_of_the_prompts(config: Llama4Config) -> None:
    tiles = torch.arange(3.0)[:, None, None, None].expand(3, 3, 56, 56)
    patches = [PATCH] * 4
    batch = Batch.padded([Prompt(patches, tiles[:1]), Prompt([1]), Prompt(patches * 2, tiles[1:])], config)
    assert torch.equal(batch.pixel_values, tiles)


def test_what_a_prompt_computes_does_not_depend_on_its_neighbours(meta_checkpoint: Any) -> None:
    source = meta_checkpoint("scout")
    rows = meta_model.text_tokens(source.model, 20).tolist()
    config = Llama4Config.from_json({"vocab_size": meta_model.VOCAB_SIZE, "num_hidden_layers": 1})
    batch = Batch.padded([Prompt(rows[0]), Prompt(rows[1][:3])], config)
    together = meta_model.logits(source.model, batch.tokens)[batch.is_real]
    alone = [meta_model.logits(source.model, torch.tensor([row])) for row in (rows[0], rows[1][:3])]
    torch.testing.assert_close(together, torch.cat([x[0] for x in alone]), atol=1e-5, rtol=0)


# -------------------- a file with one id; blanks other than space and tab around commas


@pytest.mark.parametrize(
    ("content", "expected"), [("5\n", [[5]]), ("\xa0,1\n", [[1]]), ("1, 2,\u2003\n", [[1, 2]]), ("1,\xa0\n", [[1]])]
)
def test_one_id_and_blanks_of_every_kind(file: Any, content: str, expected: list[list[int]]) -> None:
    assert ids_of(file(content)) == expected
