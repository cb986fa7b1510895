"""`validate` passes what is right, refuses what it cannot read, and says so on the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image

from llama4_convert import convert, export, plan, validate
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.validation.results import Validation
from quant.typed import decode
from tests.support import commands, meta_model
from tests.support.candidates import (
    METRICS,
    SCOUT,
    TEXT,
    WEIGHTS,
    change_config,
    change_tensors,
    fields,
    written,
)

# -------------------- what is right


@pytest.mark.parametrize("geometry", sorted(meta_model.GEOMETRIES))
def test_a_conversion_passes(geometry: str, source: Callable[..., Path], converted: Callable[..., Path]) -> None:
    result = validate(converted(geometry), reference=source(geometry), tokens=40)
    assert result.passed, result
    assert result.config_differences == result.tensors_different == result.tensors_unexpected == []
    assert result.gates_failed == []
    assert result.candidate_failure is None
    assert result.first_divergence is None
    assert result.nmse < 1e-12
    assert [layer.layer for layer in result.layers] == list(range(len(result.layers)))


def test_the_result_has_every_field_of_the_contract(
    source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    result = validate(converted(), reference=source(), tokens=40)
    printed = json.loads(json.dumps(msgspec.to_builtins(result), allow_nan=False))
    assert decode(printed, Validation, "the JSON") == result
    assert result.passed is True
    assert result.runner == "llama4"
    assert result.dtype == "float32"
    assert result.tokens == 40 + 8 + 4 + 8  # the random ones, and a tile of 4 patches between words
    assert result.top1_agreement == 1
    assert all(isinstance(getattr(result, name), float) for name in (*METRICS, "perplexity_candidate"))
    assert set(result.gates) == {"top1_agreement", "kl_mean", "kl_p999", "nmse"}
    assert result.tensors_compared == 155
    assert [set(layer) for layer in printed["layers"]] == [
        {"layer", "nmse_local", "nmse_propagated", "router_agreement"}
    ] * 5


@pytest.mark.parametrize("geometry", ["scout", "temperature"])
def test_transformers_computes_the_same(
    geometry: str, source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    result = validate(converted(geometry), reference=source(geometry), tokens=40, runner="transformers")
    assert result.passed, result
    assert result.runner == "transformers"
    assert result.nmse < 1e-10
    assert len(result.layers) == len(validate(converted(geometry), reference=source(geometry), tokens=2).layers)
    assert all(layer.nmse_local < 1e-10 > layer.nmse_propagated for layer in result.layers)
    assert result.first_divergence is None


@pytest.mark.parametrize("is_reference", [False, True])
def test_a_text_model_beside_a_directory_that_sees(is_reference: bool, converted: Callable[..., Path]) -> None:
    """Their keys differ by a prefix, and the tower of the other is no tensor too many."""
    sides = [converted(text_only=True), converted()]
    path, reference = reversed(sides) if is_reference else sides
    said: list[str] = []
    result = validate(path, reference=reference, tokens=10, warn=said.append)
    assert result.passed, result
    assert (result.kl_mean, result.tensors_unexpected, result.config_differences) == (0, [], [])
    assert len(said) == 1
    assert f"the vision tower of {converted()} is left out" in said[0]


def test_a_text_only_conversion_passes_and_says_what_it_leaves_out(
    source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    said: list[str] = []
    for runner in ("llama4", "transformers"):
        result = validate(converted(text_only=True), reference=source(), tokens=10, runner=runner, warn=said.append)
        assert result.passed, result
        assert result.tokens == 10
    assert len(said) == 2
    assert "vision tower" in said[0]
    assert "left out of the comparison" in said[0]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_conversion_to_another_dtype_passes(
    dtype: str, source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    result = validate(converted(dtype=dtype), reference=source(), tokens=10)
    assert result.passed, result


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_sides_compute_in_the_dtype_that_is_asked_for(
    dtype: str, source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    result = validate(converted("text_only"), reference=source("text_only"), tokens=10, dtype=dtype)
    exact = validate(converted("text_only"), reference=source("text_only"), tokens=10)
    assert result.passed, result
    assert result.dtype == dtype
    assert result.perplexity_reference != exact.perplexity_reference


def test_either_layout_can_be_either_side(
    meta_checkpoint: Callable[..., Any], source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    others = (meta_checkpoint("scout", 8, "mixed").src, meta_checkpoint("scout", 1, "module").src)
    assert all(validate(other, reference=source(), tokens=5).passed for other in others)
    assert validate(converted(), reference=converted(), tokens=5).passed


def test_random_tokens_come_from_the_seed(source: Callable[..., Path], converted: Callable[..., Path]) -> None:
    one, again, other = (
        validate(converted("text_only"), reference=source("text_only"), tokens=5, seed=seed) for seed in (3, 3, 4)
    )
    assert one == again
    assert one.perplexity_reference != other.perplexity_reference


def test_progress_is_told_a_total_and_comes_near_it(
    source: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    totals: list[int] = []
    steps: list[int] = []
    validate(
        converted(),
        reference=source(),
        tokens=2,
        start=lambda total, done: totals.append(total),
        progress=steps.append,
    )
    assert len(totals) == 1
    assert min(steps) >= 0
    assert 0.99 * totals[0] <= sum(steps) <= totals[0]


def test_nothing_is_written_on_either_side(source: Callable[..., Path], converted: Callable[..., Path]) -> None:
    before = [commands.times(path) for path in (source(), converted())]
    validate(converted(), reference=source(), tokens=2)
    assert [commands.times(path) for path in (source(), converted())] == before


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


# -------------------- files that are damaged


@pytest.fixture
def refusal(
    source: Callable[..., Path], capsys: pytest.CaptureFixture[str], copy: Callable[..., Path]
) -> Callable[..., str]:
    """Damages a copy, asserts that it is bad input; returns the one line."""

    def refuse(damage: Callable[[Path], object], *options: object) -> str:
        path = copy()
        damage(path)
        outcome = commands.run(capsys, "validate", path, "--reference", source(), "--json", *options)
        assert outcome.code == 3, outcome.err
        assert outcome.out == ""
        return outcome.error

    return refuse


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 100_000, "null", '{"text_config": 3}', '{"text_config": [1]}']
)
@pytest.mark.parametrize("file", ["config.json", commands.INDEX])
def test_damaged_json(refusal: Callable[..., str], file: str, content: str) -> None:
    assert file in refusal(lambda path: (path / file).write_text(content))


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000])
def test_a_damaged_generation_config(refusal: Callable[..., str], content: str) -> None:
    assert "generation_config.json" in refusal(lambda path: (path / "generation_config.json").write_text(content))


@pytest.mark.parametrize("file", ["config.json", commands.INDEX, WEIGHTS])
def test_a_missing_file(refusal: Callable[..., str], file: str) -> None:
    refusal(lambda path: (path / file).unlink())


def test_truncated_weights(refusal: Callable[..., str]) -> None:
    def cut(path: Path) -> None:
        data = (path / WEIGHTS).read_bytes()
        (path / WEIGHTS).write_bytes(data[: len(data) // 2])

    assert WEIGHTS in refusal(cut)


def test_a_tokenizer_that_is_not_there_where_it_is_needed(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("hello\n")
    message = refusal(lambda path: (path / "tokenizer.json").unlink(), "--prompts", tmp_path / "prompts")
    assert "tokenizer" in message


@pytest.mark.parametrize("value", ["8", True, -1, 0, 1.5, 10**15, [8], {}], ids=str)
@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vision_config__image_size"])
def test_a_field_of_the_wrong_type_is_named(refusal: Callable[..., str], field: str, value: Any) -> None:
    message = refusal(lambda path: change_config(path, **{field: value}))
    assert "config.json" in message
    assert field.rpartition("__")[2] in message or "layers" in message


def test_a_directory_that_is_not_there(
    converted: Callable[..., Path], source: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, reference in ((tmp_path / "gone", source()), (converted(), tmp_path / "gone")):
        outcome = commands.run(capsys, "validate", path, "--reference", reference)
        assert outcome.code == 2
        assert "gone" in outcome.error


def test_damage_of_the_reference_is_the_references(
    meta_checkpoint: Callable[..., Any], converted: Callable[..., Path], tmp_path: Path
) -> None:
    damaged = commands.copy(meta_checkpoint("scout", 2).src, tmp_path / "source")
    for rank in (0, 1):
        tensors = torch.load(damaged / f"consolidated.{rank:02d}.pth", weights_only=False)
        del tensors["layers.1.attention.wo.weight"]
        torch.save(tensors, damaged / f"consolidated.{rank:02d}.pth")
    with pytest.raises(BadInput, match=r"source.*no tensor layers\.1\.attention\.wo\.weight.*fetch it again"):
        validate(converted(), reference=damaged, tokens=2)


# -------------------- gates


def test_a_gate_can_be_closed_and_opened(
    source: Callable[..., Path], copy: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    closed = validate(converted("text_only"), reference=source("text_only"), tokens=5, gates={"top1_agreement": 1.1})
    assert not closed.passed
    assert closed.gates_failed == ["top1_agreement"]
    assert closed.gates["top1_agreement"] == 1.1

    path = copy("text_only")
    change_config(path, rms_norm_eps=0.5)
    wide = {"top1_agreement": 0, "kl_mean": 100, "kl_p999": 100, "nmse": 100}
    opened = validate(path, reference=source("text_only"), tokens=5, gates=wide)
    assert opened.gates_failed == []
    assert not opened.passed  # the field differs whatever logits may


def test_a_gate_of_another_metric_is_added(source: Callable[..., Path], copy: Callable[..., Path]) -> None:
    path = copy("text_only")
    change_config(path, rms_norm_eps=0.5)
    result = validate(path, reference=source("text_only"), tokens=5, gates={"max_abs_diff": 1e-3})
    assert "max_abs_diff" in result.gates_failed


def test_unknown_names_are_mistakes_of_use(source: Callable[..., Path], converted: Callable[..., Path]) -> None:
    for options in ({"gates": {"kl": 1.0}}, {"dtype": "int8"}, {"runner": "vllm"}, {"tokens": 0}):
        with pytest.raises(UsageError):
            validate(converted(), reference=source(), **options)


# -------------------- the command line


@pytest.fixture
def command(
    source: Callable[..., Path], converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> Callable[..., commands.Outcome]:
    return lambda *options: commands.run(
        capsys, "validate", converted(), "--reference", source(), "--tokens", 5, *options
    )


def strict(outcome: commands.Outcome) -> Any:
    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is not JSON")

    assert outcome.out.count("\n") == 1
    return json.loads(outcome.out, parse_constant=refuse)


def test_json_is_one_object_on_stdout_and_nothing_else(command: Callable[..., commands.Outcome]) -> None:
    outcome = command("--json")
    assert outcome.code == 0
    assert strict(outcome)["passed"] is True
    assert outcome.err == ""


def test_a_failed_check_prints_the_same_json_and_one_line_of_error(
    source: Callable[..., Path], copy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy()
    change_tensors(path, lambda tensors: tensors[f"{TEXT}norm.weight"].fill_(math.nan))
    outcome = commands.run(capsys, "validate", path, "--reference", source(), "--json")
    assert outcome.code == 5
    assert strict(outcome)["passed"] is False
    assert f"{TEXT}norm.weight" in outcome.error


def test_without_json_the_same_is_said_in_words(command: Callable[..., commands.Outcome]) -> None:
    outcome = command()
    assert outcome.code == 0
    assert "every field says what the reference says" in outcome.out
    assert "155 tensors are equal bit by bit" in outcome.out
    assert "top1_agreement" in outcome.out


def test_gates_on_the_command_line(command: Callable[..., commands.Outcome]) -> None:
    outcome = command("--gate", "top1_agreement=2", "--gate", "kl_mean=0.5", "--json")
    assert outcome.code == 5
    assert outcome.json["gates"]["kl_mean"] == 0.5
    assert "logits differ: top1_agreement" in outcome.error
    unknown = command("--gate", "kl=0.5")
    assert unknown.code == 2
    assert "unknown gate 'kl': choose one of top1_agreement" in unknown.error
    for value in ("kl_mean", "kl_mean=", "kl_mean=x", "=1"):
        assert command("--gate", value).code == 2


def test_prompts_replace_the_random_tokens(command: Callable[..., commands.Outcome], tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("hello\n\nthe inn\n")
    result = command("--prompts", tmp_path / "prompts", "--json").json
    assert result["passed"]
    assert 5 < result["tokens"] <= 2 + len("hellothe inn")


@pytest.mark.parametrize("content", ["[[1, 2, 3], [4, 5]]", "1 2 3\n4,5\n"])
def test_token_ids_from_json_and_from_lines(
    command: Callable[..., commands.Outcome], tmp_path: Path, content: str
) -> None:
    (tmp_path / "ids").write_text(content)
    result = command("--token-ids", tmp_path / "ids", "--json").json
    assert result["passed"]
    assert result["tokens"] == 5


def test_an_image_is_seen_in_both_runners(command: Callable[..., commands.Outcome], tmp_path: Path) -> None:
    Image.effect_noise((112, 56), 80).convert("RGB").save(tmp_path / "picture.png")
    options = ("--image", tmp_path / "picture.png", "--json")
    ours, theirs = command(*options).json, command(*options, "--with", "transformers").json
    assert ours["passed"]
    assert theirs["passed"]
    # <bos> <image_start>, two tiles of 4 patches with separators, the global one, <image_end>
    assert ours["tokens"] == theirs["tokens"] == 1 + 1 + (4 + 1) + (4 + 1) + 1 + 4 + 1
    assert ours["perplexity_reference"] == theirs["perplexity_reference"]


def test_a_token_outside_the_vocabulary_is_bad_input(command: Callable[..., commands.Outcome], tmp_path: Path) -> None:
    (tmp_path / "ids").write_text(f"[[1], [2, {meta_model.VOCAB_SIZE}]]")
    outcome = command("--token-ids", tmp_path / "ids")
    assert outcome.code == 3
    assert f"prompt 2 has token {meta_model.VOCAB_SIZE}" in outcome.error


def test_empty_files_and_no_files_are_mistakes_of_use(command: Callable[..., commands.Outcome], tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for option in ("--prompts", "--token-ids"):
        outcome = command(option, tmp_path / "empty")
        assert outcome.code == 2
        assert "holds no" in outcome.error
        assert command(option, tmp_path / "missing").code == 2
    picture = command("--image", tmp_path / "empty")
    assert picture.code == 3
    assert "is no image" in picture.error


def test_another_tokenizer_is_named(source: Callable[..., Path], copy: Callable[..., Path], tmp_path: Path) -> None:
    """Only where there are texts to encode."""
    path = copy()
    file = path / "tokenizer.json"
    body = json.loads(file.read_text())
    body["model"]["merges"] = body["model"]["merges"][1:]
    file.write_text(json.dumps(body))
    (tmp_path / "prompts").write_text("the thin\n")
    result = validate(path, reference=source(), prompts=tmp_path / "prompts")
    assert not result.passed
    assert fields(result) == {"tokenizer.json"}


# -------------------- tracebacks, wrong words, and JSON that is none


@pytest.mark.parametrize("limit", ["inf", "nan", "-inf"])
def test_a_gate_that_json_cannot_say(command: Callable[..., commands.Outcome], limit: str) -> None:
    outcome = command("--gate", f"kl_mean={limit}", "--json")
    assert outcome.code == 2


def test_the_placeholder_of_an_image_in_a_prompt(command: Callable[..., commands.Outcome], tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("hello <|image|> there\n")
    assert command("--prompts", tmp_path / "prompts").code == 2


def test_an_image_beside_patch_tokens(command: Callable[..., commands.Outcome], tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "picture.png")
    (tmp_path / "ids").write_text(f"[[1, {meta_model.PATCH_TOKEN}, 2]]")
    outcome = command("--image", tmp_path / "picture.png", "--token-ids", tmp_path / "ids")
    assert outcome.code in (2, 3)


def test_patch_tokens_without_an_image_in_transformers(
    command: Callable[..., commands.Outcome], tmp_path: Path
) -> None:
    (tmp_path / "ids").write_text(f"[[1, {meta_model.PATCH_TOKEN}, 2]]")
    assert (
        command("--token-ids", tmp_path / "ids").code
        == command("--token-ids", tmp_path / "ids", "--with", "transformers").code
    )


def test_an_image_for_a_model_that_does_not_see(
    source: Callable[..., Path],
    converted: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "picture.png")
    arguments = ("--reference", source("text_only"), "--image", tmp_path / "picture.png")
    outcome = commands.run(capsys, "validate", converted("text_only"), *arguments)
    assert outcome.code == 2


def test_a_seed_that_torch_cannot_hold(command: Callable[..., commands.Outcome]) -> None:
    assert command("--seed", 10**30).code == 2


def test_metas_layout_has_nothing_for_transformers(
    source: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = commands.run(capsys, "validate", source(), "--reference", source(), "--with", "transformers")
    assert outcome.code == 2
    assert "Meta's layout" in outcome.error


@pytest.mark.parametrize(
    "changes", [{"num_experts_per_tok": 9}, {"head_dim": 16}, {"vision_config__num_attention_heads": 7}], ids=str
)
def test_a_reference_that_cannot_run_is_not_the_candidates_failure(
    changes: dict[str, Any], converted: Callable[..., Path], copy: Callable[..., Path], capsys: Any
) -> None:
    path = copy()
    change_config(path, **changes)
    outcome = commands.run(capsys, "validate", converted(), "--reference", path, "--tokens", 20)
    assert outcome.code == 3
    assert str(path) in outcome.error


@pytest.mark.parametrize("changes", [{"vision_config__pixel_shuffle_ratio": 0}, {"image_token_index": 10**30}], ids=str)
def test_numbers_that_end_in_a_traceback(
    changes: dict[str, Any], source: Callable[..., Path], copy: Callable[..., Path], capsys: Any
) -> None:
    path = copy()
    change_config(path, **changes)
    outcome = commands.run(capsys, "validate", path, "--reference", source(), "--tokens", 2)
    assert outcome.code in (3, 5)


@pytest.mark.parametrize("field", ["num_local_experts", "vision_config__num_hidden_layers"])
def test_absurd_counts_are_refused_before_lists_of_their_length_are_made(
    field: str, source: Callable[..., Path], copy: Callable[..., Path]
) -> None:
    path = copy()
    change_config(path, **{field: 20_000})
    with pytest.raises(BadInput, match=field.rpartition("__")[2]):
        validate(path, reference=source(), tokens=2)


def test_without_config_json_the_words_are_of_the_other_layout(refusal: Callable[..., str]) -> None:
    assert "config.json" in refusal(lambda path: (path / "config.json").unlink())
