"""`diff`: equal across layouts, ranks and spellings; what differs is named, and the same whichever side comes first."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import to_builtins
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama4_convert import convert, diff, synth
from llama4_convert.checkpoints.readers import DirectoryReader, RankReader
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.reference.checkpoint import Checkpoint
from llama4_convert.validation.diagnosis import tensor_pairs
from llama4_convert.validation.parity.memory import INTERPRETER_BYTES
from llama4_convert.validation.results import Diff, RoundedTensors
from llama4_convert.validation.weight_check import compare_weights, pairs_with_reference
from quant.typed import decode
from tests.support import commands, meta_model, meta_quantizer

WEIGHTS = "model-00001-of-00001.safetensors"
TEXT = "language_model.model."
LAYER = f"{TEXT}layers.1."
FUSED, DOWN = f"{LAYER}feed_forward.experts.gate_up_proj", f"{LAYER}feed_forward.experts.down_proj"


@pytest.fixture
def copy(converted: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A converted directory to be changed."""
    return lambda geometry="scout", name="copy": commands.copy(converted(geometry), tmp_path / name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made(recipe=..., text_only=..., dtype=..., layers=..., experts=...)`: a directory of a synthetic checkpoint. Read only."""

    @functools.cache
    def source(layers: int, experts: int, seed: int) -> Path:
        path = tmp_path_factory.mktemp("meta") / "source"
        synth(path, tiny=True, layers=layers, experts=experts, ranks=2, seed=seed)
        return path

    @functools.cache
    def get(layers: int = 2, experts: int = 2, seed: int = 0, layout: str = "hf", **options: Any) -> Path:
        if layout == "meta":
            return source(layers, experts, seed)
        path = tmp_path_factory.mktemp("hf") / "out"
        convert(source(layers, experts, seed), path, **options)
        return path

    return get


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(path / WEIGHTS)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / WEIGHTS, {"format": "pt"})
    index = path / commands.INDEX
    body = json.loads(index.read_text())
    index.write_text(json.dumps({**body, "weight_map": dict.fromkeys(tensors, WEIGHTS)}))
    return path


def change_config(path: Path, **changes: Any) -> Path:
    body = json.loads((path / "config.json").read_text())
    body.get("text_config", body).update(changes)
    (path / "config.json").write_text(json.dumps(body))
    return path


def linearize(tensors: dict[str, Tensor]) -> None:
    """Experts under keys of their own, as quantized directories have them, by hand."""
    for key in [key for key in tensors if ".experts." in key]:
        stem, _, kind = key.rpartition(".")
        for expert, matrix in enumerate(tensors.pop(key)):
            parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2, 1), strict=True))
            for name, part in (parts if kind == "gate_up_proj" else {"down_proj": matrix}).items():
                tensors[f"{stem}.{expert}.{name}.weight"] = part.T


def both_ways(a: Path, b: Path) -> dict[str, Any]:
    """What `diff a b` tells, after a look at `diff b a`."""
    one, other = diff(a, b), diff(b, a)
    assert decode(json.loads(json.dumps(to_builtins(one), allow_nan=False)), Diff, "the JSON") == one
    assert one.equal is other.equal
    assert one.tensors_compared == other.tensors_compared
    assert (one.only_in_a, one.only_in_b) == (other.only_in_b, other.only_in_a)
    assert one.dropped == other.dropped

    def measured(result: Diff) -> dict[tuple[str, str], Any]:
        return {(d.name, d.module): d.max_abs_diff for d in result.different}

    assert measured(one) == measured(other)
    assert {(d.field, str(d.a), str(d.b)) for d in one.config_differences} == {
        (d.field, str(d.b), str(d.a)) for d in other.config_differences
    }
    return one


def names(result: Diff) -> list[str]:
    return [d.name for d in result.different]


# -------------------- equal


@pytest.mark.parametrize("geometry", sorted(meta_model.GEOMETRIES))
def test_a_checkpoint_equals_its_conversion(
    geometry: str, meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path]
) -> None:
    result = both_ways(meta_checkpoint(geometry, 2).src, converted(geometry))
    assert result.equal, result
    assert result.different == result.config_differences == result.only_in_b == []
    assert result.only_in_a == [one.name for one in result.dropped]  # RoPE's table and what trainers leave
    assert "rope.freqs" in result.only_in_a


@pytest.mark.parametrize(("geometry", "ranks"), [("scout", 8), ("odd", 1), ("maverick", 4), ("guard", 1)])
@pytest.mark.parametrize("spelling", ["module", "mixed"])
def test_ranks_and_spellings_make_no_difference(
    geometry: str, ranks: int, spelling: str, meta_checkpoint: Callable[..., Any]
) -> None:
    one, other = meta_checkpoint(geometry, 2).src, meta_checkpoint(geometry, ranks, spelling, extra=False).src
    result = both_ways(one, other)
    assert result.equal, result
    assert result.tensors_compared > 50


@pytest.mark.parametrize("geometry", ["scout", "top2"])
def test_fused_experts_equal_linearized_ones(
    geometry: str, converted: Callable[[str], Path], copy: Callable[..., Path]
) -> None:
    result = both_ways(converted(geometry), change(copy(geometry), linearize))
    assert result.equal, result
    assert result.only_in_a == result.only_in_b == []


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_are_compared_after_rounding_and_it_is_said(dtype: str, made: Callable[..., Path]) -> None:
    result = both_ways(made(), made(dtype=dtype))
    assert result.equal, result
    told = {"float16": "F16", "float32": "F32"}[dtype]
    assert result.rounded == [RoundedTensors(a="BF16", b=told, tensors=result.tensors_compared)]


@pytest.mark.parametrize(("factor", "equal"), [(1 + 2**-20, True), (1 + 2**-6, False)])
def test_what_rounding_takes_away_is_no_difference(
    factor: float, equal: bool, made: Callable[..., Path], tmp_path: Path
) -> None:
    """float32's lower half, beside a bfloat16 that it rounds to."""
    path = commands.copy(made(dtype="float32"), tmp_path / "copy")
    change(path, lambda tensors: tensors[f"{TEXT}norm.weight"].mul_(factor))
    result = both_ways(path, made())
    assert result.equal is equal
    assert names(result) == ([] if equal else [f"{TEXT}norm.weight"])


# -------------------- different


# In the diagnosis' word for it; None: any.
FAULTS: dict[str, tuple[str | None, Callable[[Tensor], Tensor]]] = {
    f"{TEXT}norm.weight": ("scaled", lambda t: t.mul_(2)),
    f"{LAYER}self_attn.q_proj.weight": ("zeros", lambda t: t.zero_()),
    f"{LAYER}self_attn.o_proj.weight": ("transposed", lambda t: t.copy_(t.T.reshape(t.shape).clone())),
    FUSED: ("gate_up_swapped", lambda t: t.copy_(torch.cat(t.chunk(2, 2)[::-1], 2))),
    DOWN: ("experts_reordered", lambda t: t.copy_(t.flip(0))),
    f"{LAYER}feed_forward.router.weight": (None, lambda t: t[0, 0].add_(1)),
    f"{TEXT}embed_tokens.weight": ("zeros", lambda t: t[-3:].zero_()),
    "language_model.lm_head.weight": ("negated", lambda t: t.neg_()),
    "vision_model.model.layers.0.mlp.fc1.bias": ("scaled", lambda t: t.mul_(3)),
}


@pytest.mark.parametrize("layout", ["meta", "transformers"])
def test_planted_faults_are_named_from_either_side(
    layout: str, meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path], copy: Callable[..., Path]
) -> None:
    path = change(copy(), lambda tensors: [edit(tensors[key]) for key, (_, edit) in FAULTS.items()])
    other = meta_checkpoint("scout", 8, "module", extra=False).src if layout == "meta" else converted("scout")
    result = both_ways(other, path)
    assert not result.equal
    assert set(names(result)) == set(FAULTS)
    assert result.only_in_a == result.only_in_b == result.config_differences == []
    before, after = (load_file(folder / WEIGHTS) for folder in (converted("scout"), path))
    for key, (kind, _) in FAULTS.items():
        found = [d for d in result.different if d.name == key]
        assert kind is None or {d.kind for d in found} == {kind}, key
        assert max(d.max_abs_diff for d in found) == float((after[key].double() - before[key].double()).abs().max())


def test_zeros_are_told_whichever_side_has_them(made: Callable[..., Path], tmp_path: Path) -> None:
    key = f"{LAYER}self_attn.q_proj.weight"
    path = change(commands.copy(made(), tmp_path / "copy"), lambda tensors: tensors[key][-1].zero_())
    [found], [turned] = diff(made(), path).different, diff(path, made()).different
    assert found.kind == "zeros"
    assert turned.cause.startswith("numbers where the reference has zeros in row 255; ")


def test_an_expert_is_named_where_many_share_a_tensor(
    converted: Callable[[str], Path], copy: Callable[..., Path]
) -> None:
    path = change(copy(), lambda tensors: tensors[FUSED][3, :, -1].zero_())
    [found] = both_ways(converted("scout"), path).different
    assert (found.name, found.module) == (FUSED, "feed_forward.experts.3.up")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_has_no_difference_that_json_could_say(
    value: float, converted: Callable[[str], Path], copy: Callable[..., Path]
) -> None:
    path = change(copy(), lambda tensors: tensors[f"{TEXT}norm.weight"][3].fill_(value))
    [found] = both_ways(converted("scout"), path).different
    assert found.max_abs_diff is None
    assert diff(path, path).equal


def test_nan_in_one_slice_of_the_vocabulary_is_not_forgotten_in_the_next(copy: Callable[..., Path]) -> None:
    key = "language_model.lm_head.weight"

    def longer(tensors: dict[str, Tensor]) -> None:
        tensors[key] = torch.cat([tensors[key], torch.zeros(9000, tensors[key].shape[1], dtype=tensors[key].dtype)])

    one, other = change(copy(name="one"), longer), change(copy(name="other"), longer)
    change(other, lambda tensors: (tensors[key][0].fill_(float("nan")), tensors[key][-1].fill_(1)))
    [found] = both_ways(one, other).different
    assert (found.name, found.max_abs_diff) == (key, None)


def test_a_transposed_vocabulary_is_told_by_its_first_column_whatever_columns_stand_for_all(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of 256 columns as few as 64 are of a real width: the first is not among them.
    monkeypatch.setattr(tensor_pairs, "_SAMPLE_COLUMNS", 2)
    key = f"{TEXT}embed_tokens.weight"
    path = change(
        commands.copy(made(), tmp_path / "copy"),
        lambda tensors: tensors[key].copy_(tensors[key].T.reshape_as(tensors[key]).clone()),
    )
    [found] = both_ways(made(), path).different
    assert (found.name, found.kind) == (key, "transposed")


@pytest.mark.parametrize(
    ("key", "cut"),
    [
        (f"{LAYER}self_attn.v_proj.weight", lambda t: t[:-1]),
        (FUSED, lambda t: t[..., :-2]),
        (f"{TEXT}embed_tokens.weight", lambda t: t[:-1]),
        (f"{TEXT}embed_tokens.weight", lambda t: torch.cat([t, t[:9]])),
    ],
)
def test_a_tensor_of_another_shape_differs(
    key: str, cut: Callable[[Tensor], Tensor], converted: Callable[[str], Path], copy: Callable[..., Path]
) -> None:
    path = change(copy(), lambda tensors: tensors.update({key: cut(tensors[key])}))
    result = both_ways(converted("scout"), path)
    assert set(names(result)) == {key}
    assert all(d.max_abs_diff is None for d in result.different)


def test_rows_beyond_what_both_configurations_count_are_compared(copy: Callable[..., Path]) -> None:
    def longer(last: float) -> Callable[[dict[str, Tensor]], None]:
        def edit(tensors: dict[str, Tensor]) -> None:
            head = tensors["language_model.lm_head.weight"]
            more = torch.zeros(9000, head.shape[1], dtype=head.dtype)
            more[-1] = last
            tensors["language_model.lm_head.weight"] = torch.cat([head, more])

        return edit

    one, other = change(copy(name="one"), longer(1)), change(copy(name="other"), longer(2))
    assert names(both_ways(one, other)) == ["language_model.lm_head.weight"]
    assert diff(one, one).equal


# -------------------- what only one has


def test_a_missing_tensor_is_only_in_the_other(meta_checkpoint: Callable[..., Any], copy: Callable[..., Path]) -> None:
    path = change(copy(), lambda tensors: (tensors.pop(f"{LAYER}self_attn.k_proj.weight"), tensors.pop(FUSED)))
    result = both_ways(meta_checkpoint("scout", 2, extra=False).src, path)
    assert result.only_in_a == [f"{LAYER}self_attn.k_proj.weight", FUSED]
    assert result.only_in_b == result.different == []


def test_a_text_only_directory_lacks_the_vision_tower_and_equals_the_rest(made: Callable[..., Path]) -> None:
    result = both_ways(made(text_only=True), made(layout="meta"))
    assert not result.equal
    assert result.different == result.only_in_a == []
    tower = [key for key in load_file(made() / WEIGHTS) if key.startswith(("vision_model.", "multi_modal_"))]
    weights = set(result.only_in_b) - {one.name for one in result.dropped}
    assert weights == set(tower)
    assert [d.field for d in result.config_differences] == ["vision_config"]


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_fewer_layers(layout: str, made: Callable[..., Path]) -> None:
    result = both_ways(made(layers=2, layout=layout), made(layers=3))
    assert result.different == []
    assert set(result.only_in_b) == {key for key in load_file(made(layers=3) / WEIGHTS) if f"{TEXT}layers.2." in key}
    assert "num_hidden_layers" in {d.field for d in result.config_differences}
    assert result.tensors_compared == diff(made(layers=2), made(layers=2)).tensors_compared


def test_fewer_experts(converted: Callable[[str], Path], copy: Callable[..., Path]) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".experts." in key]:
            tensors[key] = tensors[key][:3].clone()

    path = change_config(change(copy(), cut), num_local_experts=3)
    result = both_ways(converted("scout"), path)
    assert result.different == []
    assert len(result.only_in_a) == 5 * 3
    assert result.only_in_a[0] == f"{TEXT}layers.0.feed_forward.experts.3.gate_proj.weight"
    assert [d.field for d in result.config_differences] == ["num_local_experts"]


def test_experts_and_layers_that_no_configuration_counts_are_seen(
    converted: Callable[[str], Path], copy: Callable[..., Path]
) -> None:
    more = change(copy(name="more"), lambda t: t.update({DOWN: torch.cat([t[DOWN], t[DOWN][:1]])}))
    result = both_ways(converted("scout"), more)
    assert result.only_in_b == [f"{LAYER}feed_forward.experts.4.down_proj.weight"]
    less = change_config(copy(name="less"), num_hidden_layers=4)
    result = both_ways(converted("scout"), less)
    assert result.different == result.only_in_a == result.only_in_b == []
    assert result.config_differences != []


def test_a_tensor_that_no_llama_4_has(converted: Callable[[str], Path], copy: Callable[..., Path]) -> None:
    def with_bias(value: float, name: str) -> Path:
        return change(copy(name=name), lambda tensors: tensors.update(bias=torch.full((2, 3), value)))

    one, other = with_bias(1, "one"), with_bias(2, "other")
    result = both_ways(converted("scout"), one)
    assert result.only_in_b == ["bias"]
    assert not result.equal
    assert diff(one, one).equal
    result = both_ways(one, other)
    assert names(result) == ["bias"]
    assert not result.equal


# -------------------- fields


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_theta": 10000.0}, "rope_theta"),
        ({"bos_token_id": 1}, "bos_token_id"),
        ({"num_attention_heads": 8}, "num_attention_heads"),
    ],
)
def test_a_field_alone_makes_them_different(
    changes: dict[str, Any],
    field: str,
    meta_checkpoint: Callable[..., Any],
    converted: Callable[[str], Path],
    copy: Callable[..., Path],
) -> None:
    path = change_config(copy(), **changes)
    for other in (converted("scout"), meta_checkpoint("scout", 1).src):
        result = both_ways(other, path)
        assert not result.equal
        assert [d.field for d in result.config_differences] == [field]
        assert result.config_differences[0].b == changes[field]
        assert result.different == []


def test_another_chat_template_and_other_stops(made: Callable[..., Path], tmp_path: Path) -> None:
    path, other = commands.copy(made(variant="instruct"), tmp_path / "copy"), made(variant="instruct")
    file = path / "chat_template.jinja"
    file.write_text(file.read_text() + "{# the same #}")
    assert both_ways(other, path).equal
    file.write_text("{{ messages[0]['content'] }}")
    (path / "generation_config.json").write_text('{"eos_token_id": 1}')
    found = both_ways(other, path).config_differences
    assert [d.field for d in found] == ["eos_token_id", "chat_template"]


# -------------------- quantized


@pytest.mark.parametrize("recipe", ["int4", "fp8", "nf4"])
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_quantized_against_bf16(recipe: str, layout: str, made: Callable[..., Path]) -> None:
    result = both_ways(made(recipe=recipe), made(layout=layout))
    assert result.equal, result
    told = result.quantized[recipe]
    assert told.matrices >= 2 * 2 * 3  # each expert's, at least
    assert 0 < told.relative_mse_mean <= told.relative_mse_largest < 0.03
    assert told.worst.endswith(".weight")


def test_two_quantized_alike_are_equal_bit_by_bit(made: Callable[..., Path], tmp_path: Path) -> None:
    path = commands.copy(made(recipe="int4"), tmp_path / "copy")
    result = both_ways(made(recipe="int4"), path)
    assert result.equal
    assert result.quantized == {}
    key = f"{LAYER}feed_forward.experts.0.down_proj.weight_packed"
    change(path, lambda tensors: tensors[key][0, 0].bitwise_xor_(1))
    [found] = both_ways(made(recipe="int4"), path).different
    assert (found.name, found.module) == (DOWN, "feed_forward.experts.0.down")


def test_two_schemes_are_held_against_what_both_lose(made: Callable[..., Path]) -> None:
    result = both_ways(made(recipe="int4"), made(recipe="fp8"))
    assert result.equal, result
    assert "fp8 and int4" in result.quantized


def test_a_matrix_beyond_what_its_scheme_loses_is_different(made: Callable[..., Path], tmp_path: Path) -> None:
    path = commands.copy(made(recipe="int4"), tmp_path / "copy")
    key = f"{LAYER}feed_forward.experts.1.up_proj.weight_scale"
    change(path, lambda tensors: tensors[key].mul_(2))
    for other in (made(), made(layout="meta"), made(recipe="fp8")):
        result = both_ways(path, other)
        assert names(result) == [FUSED]
        assert result.different[0].module == "feed_forward.experts.1.up"
        assert result.different[0].max_abs_diff > 0
        assert "a relative squared error of 1" in result.different[0].cause


def test_metas_own_quantized_original(
    meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    source = meta_checkpoint("top2", 2).src
    path = meta_quantizer.quantize(source, tmp_path / "fp8", ranks=2, mode="fp8_mixed")
    for other in (source, converted("top2"), meta_checkpoint("top2", 4).src):
        result = both_ways(path, other)
        assert result.equal, result
        assert result.quantized["fp8"].matrices > 0
    convert(path, tmp_path / "bf16")
    result = both_ways(path, tmp_path / "bf16")
    assert result.equal
    assert result.quantized["fp8"].relative_mse_largest == 0


# -------------------- memory, progress, refusals


@pytest.mark.parametrize("geometry", ["scout", "maverick"])
def test_no_fused_tensor_is_read_whole(
    geometry: str, meta_checkpoint: Callable[..., Any], copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of experts one at a time, also where all of them differ and a cause is looked for."""
    read: dict[str, int] = {}
    for reader in (DirectoryReader, RankReader):

        def spied(self: Any, key: str, *part: Any, original: Any = reader.read) -> Any:
            found = original(self, key, *part)
            read[key] = max(read.get(key, 0), np.size(found))
            return found

        monkeypatch.setattr(reader, "read", spied)
    path = change(copy(geometry), lambda t: [t[key].mul_(1.5) for key in t if ".experts." in key])
    experts = {"scout": 4, "maverick": 8}[geometry]
    assert not diff(meta_checkpoint(geometry, 2).src, path).equal
    sizes = {key: tensor.numel() for key, tensor in load_file(path / WEIGHTS).items()}
    fused = [key for key in read if ".experts." in key and key in sizes]
    assert fused
    assert all(read[key] * experts <= sizes[key] for key in fused)  # of gate and up one at a time


def test_progress_is_told_a_total_and_reaches_it(made: Callable[..., Path]) -> None:
    totals: list[int] = []
    steps: list[int] = []
    diff(made(), made(layout="meta"), start=lambda total, done: totals.append(total), progress=steps.append)
    assert totals == [sum(steps)]


def test_nothing_is_written_on_either_side(made: Callable[..., Path]) -> None:
    folders = made(), made(layout="meta")
    before = [commands.times(path) for path in folders]
    diff(*folders)
    assert [commands.times(path) for path in folders] == before


def test_what_cannot_be_compared_is_refused_in_a_line(made: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the largest matrix needs [\d,]+ MiB: give --max-memory \d+MiB"):
        diff(made(), made(), max_memory=1 << 20)
    with pytest.raises(UsageError, match="is not a directory"):
        diff(made(), tmp_path / "nowhere")
    path = commands.copy(made(), tmp_path / "awq")
    body = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**body, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UsageError, match="quantized as awq, which we cannot read"):
        diff(made(), path)
    cut = commands.copy(made(), tmp_path / "cut")
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(BadInput, match="damaged or cut off"):
        diff(made(), cut)


# -------------------- the command line


def test_equal_ends_with_0_and_different_with_5_and_a_line(
    capsys: pytest.CaptureFixture[str], made: Callable[..., Path], tmp_path: Path
) -> None:
    outcome = commands.run(capsys, "diff", made(), made(layout="meta"))
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "equal"
    path = commands.copy(made(), tmp_path / "copy")
    change(path, lambda tensors: [tensors[key].mul_(2) for key in tensors if "layers." in key])
    outcome = commands.run(capsys, "diff", made(), path)
    assert outcome.code == 5
    assert outcome.error.startswith(f"{made()} and {path} differ: {TEXT}layers.0.input_layernorm.weight: scaled")
    assert sum(" scaled" in line for line in outcome.out.splitlines()) == 20
    assert any(line.strip().startswith("and ") and line.endswith(" more") for line in outcome.out.splitlines())
    assert outcome.out.splitlines()[-1] == "different"


def test_the_line_names_what_only_one_has_or_the_field(
    capsys: pytest.CaptureFixture[str], made: Callable[..., Path], tmp_path: Path
) -> None:
    outcome = commands.run(capsys, "diff", made(text_only=True), made())
    assert outcome.code == 5
    assert f"only {made()} has vision_model.class_embedding and " in outcome.error
    path = change_config(commands.copy(made(), tmp_path / "copy"), rms_norm_eps=0.5)
    outcome = commands.run(capsys, "diff", made(), path)
    assert outcome.code == 5
    assert outcome.error.endswith("differ: rms_norm_eps is 1e-05 and 0.5")


def test_json_is_one_object_whatever_the_verdict(capsys: pytest.CaptureFixture[str], made: Callable[..., Path]) -> None:
    equal = commands.run(capsys, "diff", made(), made(recipe="int4"), "--json")
    assert (equal.code, equal.err) == (0, "")
    assert decode(equal.json, Diff, "the JSON") == diff(made(), made(recipe="int4"))
    different = commands.run(capsys, "diff", made(), made(text_only=True), "--json")
    assert different.code == 5
    assert different.json["equal"] is False
    assert different.error


def test_a_cause_that_memory_does_not_hold_is_not_looked_for_and_that_is_said(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    """The comparison holds all the same: what differs is named, and how much would do."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{TEXT}embed_tokens.weight"].neg_()
        tensors[f"{TEXT}norm.weight"].neg_()

    path = change(commands.copy(made(), tmp_path / "copy"), edit)
    found = {d.name: d for d in diff(made(), path, max_memory=INTERPRETER_BYTES + (9 << 20)).different}
    assert found[f"{TEXT}norm.weight"].kind == "negated"
    short = found[f"{TEXT}embed_tokens.weight"]
    assert short.kind is None
    assert short.max_abs_diff > 0
    assert short.cause.endswith("; to have its cause looked for, give --max-memory 0.5GiB")
    enough = {d.name: d.kind for d in diff(made(), path, max_memory=1 << 29).different}
    assert set(enough.values()) == {"negated"}


def test_gate_and_up_are_not_held_together_where_memory_holds_one(made: Callable[..., Path], tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        gate, up = (tensors[f"{LAYER}feed_forward.shared_expert.{name}_proj.weight"] for name in ("gate", "up"))
        both = torch.stack([gate, up], 1).reshape(-1, gate.shape[1])
        gate.copy_(both[: len(gate)]), up.copy_(both[len(gate) :])

    path = change(commands.copy(made(), tmp_path / "copy"), edit)
    numbers = prod(load_file(path / WEIGHTS)[f"{LAYER}feed_forward.shared_expert.up_proj.weight"].shape)
    one, other = Checkpoint.open(made()), Checkpoint.open(path)

    def kinds(bytes_a_number: int) -> set[str | None]:
        pairs = pairs_with_reference(one, other, one.config)
        return {fault.kind for fault in compare_weights(pairs, memory=numbers * bytes_a_number).faults}

    assert kinds(40) == {"gate_up_interleaved"}
    assert kinds(28) == {None}  # neither that, nor that its numbers are unrelated
