"""Two models side by side: where an error is made, what routing has to do with it, and that nobody computes twice."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama4.config import Llama4Config
from llama4.text import Llama4TextModel
from llama4_convert import convert, synth, validate
from llama4_convert.checkpoints import quantized
from llama4_convert.checkpoints.readers import RankReader
from llama4_convert.errors import UsageError
from llama4_convert.reference.checkpoint import Checkpoint
from llama4_convert.validation import cache as parity_cache
from llama4_convert.validation.config_check import matters_from
from llama4_convert.validation.parity.memory import budget
from llama4_convert.validation.results import RoutingLoad
from tests.support import commands

WEIGHTS = "model-00001-of-00001.safetensors"
TEXT, VISION = "language_model.model.", "vision_model."


@pytest.fixture(scope="session")
def pair(
    meta_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """Meta's checkpoint and its conversion, both to be read only."""
    made: dict[Any, tuple[Path, Path]] = {}

    def get(geometry: str = "scout", **options: Any) -> tuple[Path, Path]:
        key = (geometry, *options.items())
        if key not in made:
            source = meta_checkpoint(geometry, 2).src
            made[key] = source, tmp_path_factory.mktemp(geometry) / "out"
            convert(*made[key], **options)
        return made[key]

    return get


@pytest.fixture
def damaged(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """The same with one tensor changed."""

    def get(key: str, change: Callable[[Tensor], Tensor], geometry: str = "scout") -> tuple[Path, Path]:
        source, output = pair(geometry)
        path = commands.copy(output, tmp_path / "damaged")
        tensors = load_file(path / WEIGHTS)
        tensors[key] = change(tensors[key].clone()).to(torch.bfloat16).contiguous()
        save_file(tensors, path / WEIGHTS, {"format": "pt"})
        return source, path

    return get


def noisy(tensor: Tensor) -> Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    return tensor + noise * tensor.float().std().clamp(min=0.05)


# -------------------- which module


MODULES = [
    ("scout", f"{TEXT}layers.1.input_layernorm.weight", "attention_norm"),
    *(("scout", f"{TEXT}layers.1.self_attn.{x}_proj.weight", f"attention.{x}") for x in "qkvo"),
    ("scout", f"{TEXT}layers.1.post_attention_layernorm.weight", "ffn_norm"),
    ("scout", f"{TEXT}layers.1.feed_forward.router.weight", "feed_forward.router"),
    ("scout", f"{TEXT}layers.1.feed_forward.shared_expert.up_proj.weight", "feed_forward.shared"),
    ("maverick", f"{TEXT}layers.2.feed_forward.down_proj.weight", "feed_forward"),
]


@pytest.mark.parametrize("runner", ["llama4", "transformers"])
@pytest.mark.parametrize(("geometry", "key", "module"), MODULES, ids=[f"{g}-{m}" for g, _, m in MODULES])
def test_the_first_layer_that_strays_is_split_into_its_modules(
    geometry: str, key: str, module: str, runner: str, damaged: Callable[..., tuple[Path, Path]]
) -> None:
    source, path = damaged(key, noisy, geometry)
    layer = int(key.split("layers.")[1][0])
    result = validate(path, reference=source, tokens=24, runner=runner)
    assert result.modules.stage == f"layers.{layer}"
    errors = result.modules.errors
    assert {name for name, error in errors.items() if error > 1e-8} == {module}
    assert next(iter(errors)) == "attention_norm"
    before, at, after = result.layers[:layer], result.layers[layer], result.layers[layer + 1 :]
    assert all(told.nmse_propagated < 1e-10 for told in before)
    assert at.nmse_local > 1e-8
    # What comes behind is right in itself, and wrong for what it is given.
    assert all(told.nmse_local < 1e-8 < told.nmse_propagated for told in after)


@pytest.mark.parametrize("runner", ["llama4", "transformers"])
def test_the_expert_that_strays_is_named(runner: str, damaged: Callable[..., tuple[Path, Path]]) -> None:
    def change(tensor: Tensor) -> Tensor:
        tensor[2] = noisy(tensor[2])
        return tensor

    source, path = damaged(f"{TEXT}layers.1.feed_forward.experts.down_proj", change)
    result = validate(path, reference=source, tokens=60, runner=runner)
    errors = result.modules.errors
    assert {name for name, error in errors.items() if error > 1e-8} == {"feed_forward.experts.2"}
    assert {f"feed_forward.experts.{e}" for e in range(4)} <= errors.keys()


@pytest.mark.parametrize(
    ("key", "stage"),
    [
        (f"{VISION}patch_embedding.linear.weight", "vision.embed"),
        (f"{VISION}model.layers.1.mlp.fc1.weight", "vision.layers.1"),
        (f"{VISION}vision_adapter.mlp.fc2.weight", "vision.adapter"),
        ("multi_modal_projector.linear_1.weight", "vision.projector"),
    ],
)
@pytest.mark.parametrize("runner", ["llama4", "transformers"])
def test_the_stage_of_the_vision_tower_that_strays_is_told(
    key: str, stage: str, runner: str, damaged: Callable[..., tuple[Path, Path]]
) -> None:
    source, path = damaged(key, noisy)
    vision = validate(path, reference=source, tokens=4, runner=runner).vision
    names = [told.stage for told in vision]
    assert names == ["vision.embed", "vision.layers.0", "vision.layers.1", "vision.adapter", "vision.projector"]
    assert [told.stage for told in vision if told.nmse_local > 1e-8] == [stage]
    assert [told.stage for told in vision if told.nmse_propagated > 1e-8] == names[names.index(stage) :]


@pytest.mark.parametrize("runner", ["llama4", "transformers"])
@pytest.mark.parametrize(("one", "other"), [("scout", "maverick"), ("maverick", "scout")])
def test_layers_of_another_kind_are_a_failed_check_and_no_crash(
    one: str, other: str, runner: str, pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """Dense where the reference has experts, or the reverse: of as many layers, so that both run."""
    for geometry in (one, other):
        synth(tmp_path / geometry, geometry=geometry, tiny=True, ranks=2)
    convert(tmp_path / one, tmp_path / "out")
    result = validate(tmp_path / "out", reference=tmp_path / other, tokens=4, runner=runner)
    assert not result.passed
    assert {"moe_layers", "interleave_moe_layer_step"} <= {d.field for d in result.config_differences}
    assert any(fault.kind == "missing" for fault in result.tensors_different)


# -------------------- routing


def test_forced_routing_takes_jumps_out(damaged: Callable[..., tuple[Path, Path]]) -> None:
    """A router that errs a little sends some tokens elsewhere: with the reference's choice only the gates differ."""
    source, path = damaged(f"{TEXT}layers.1.feed_forward.router.weight", lambda t: noisy(t) * 0.05 + t * 0.95)
    result = validate(path, reference=source, tokens=60)
    agreement = [layer.router_agreement for layer in result.layers]
    assert agreement[0] == 1
    assert agreement[1] < 1
    assert 0 < result.forced_routing.kl_mean < result.kl_mean / 2


def test_routing_that_agrees_is_the_same_forced(pair: Callable[..., tuple[Path, Path]]) -> None:
    source, output = pair()
    result = validate(output, reference=source, tokens=24)
    assert {layer.router_agreement for layer in result.layers} == {1.0}
    forced = structs.asdict(result.forced_routing)
    assert forced == {name: getattr(result, name) for name in forced}
    load = result.pictures.routing_load
    assert load.layers == [0, 1, 2, 3, 4]
    assert {sum(row) for row in load.tokens} == {result.tokens}
    assert {len(row) for row in load.tokens} == {4}


def test_a_model_without_experts_has_no_routing(pair: Callable[..., tuple[Path, Path]]) -> None:
    source, output = pair("guard")
    result = validate(output, reference=source, tokens=24)
    assert result.passed
    assert {layer.router_agreement for layer in result.layers} == {None}
    assert result.forced_routing is None
    assert result.pictures.routing_load == RoutingLoad(layers=[], tokens=[])


def test_another_number_of_experts_a_token_cannot_be_forced(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    source, output = pair("top2")
    path = commands.copy(output, tmp_path / "copy")
    body = json.loads((path / "config.json").read_text())
    body["num_experts_per_tok"] = 1
    (path / "config.json").write_text(json.dumps(body))
    result = validate(path, reference=source, tokens=24)
    assert result.forced_routing is None
    assert result.first_divergence.module == "feed_forward"


def test_a_quantized_candidate_tells_the_error_of_every_expert(pair: Callable[..., tuple[Path, Path]]) -> None:
    source, output = pair("text_only", recipe="nf4")
    result = validate(output, reference=source, tokens=24)
    assert result.passed, result.gates_failed
    assert result.kind == "nf4"
    told = result.pictures.quantization_error
    assert told.layers == [0, 1, 2, 3]
    assert all(0.004 < error < 0.02 for row in told.relative_mse for error in row)
    assert result.forced_routing.kl_mean <= result.kl_mean
    assert all(0 < layer.nmse_local < 0.5 for layer in result.layers)


# -------------------- Transformers on either side


@pytest.mark.parametrize(("ours", "theirs"), [("transformers", "llama4"), ("transformers", "transformers")])
def test_transformers_can_be_the_reference(
    ours: str, theirs: str, pair: Callable[..., tuple[Path, Path]], damaged: Callable[..., tuple[Path, Path]]
) -> None:
    _, output = pair()
    result = validate(output, reference=output, tokens=24, reference_runner=ours, runner=theirs)
    assert result.passed, result
    assert result.reference_runner == ours
    assert {layer.router_agreement for layer in result.layers} == {1.0}
    assert all(layer.nmse_propagated < 1e-10 for layer in result.layers)
    # Of two records neither can run on the other's input.
    assert all((layer.nmse_local is None) == (theirs == "transformers") for layer in result.layers)
    _, wrong = damaged(f"{TEXT}layers.1.self_attn.o_proj.weight", noisy)
    result = validate(wrong, reference=output, tokens=24, reference_runner=ours, runner=theirs)
    assert not result.passed
    assert result.layers[0].nmse_propagated < 1e-10 < 1e-4 < result.layers[1].nmse_propagated
    assert "kl_mean" in result.gates_failed
    if theirs == "llama4":
        assert {name for name, error in result.modules.errors.items() if error > 1e-8} == {"attention.o"}


def test_what_only_transformers_can_read_is_compared_by_what_it_computes(
    pair: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of widths that bitsandbytes' kernel for avx512_bf16 takes: 32 divides the outputs, a block the inputs.
    source, output = pair("absent_moe", recipe="nf4")
    monkeypatch.setattr(quantized, "_METHODS", ("another",))
    result = validate(
        output, reference=source, tokens=24, runner="transformers", dtype="bfloat16", gates={"kl_mean": 1}
    )
    assert "bitsandbytes" in result.weights_not_compared
    assert result.tensors_compared == 0
    assert result.tokens == 24 + 20  # text, and a picture with text around it
    assert result.candidate_failure is None


def test_meta_s_layout_is_none_that_transformers_reads(pair: Callable[..., tuple[Path, Path]]) -> None:
    source, output = pair()
    with pytest.raises(UsageError, match="Meta's layout"):
        validate(output, reference=source, reference_runner="transformers")


# -------------------- kept on disk


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers of the text model that any model of ours has computed."""
    found: list[int] = []
    layer = Llama4TextModel.layer

    def counting(self: Llama4TextModel, index: int, *arguments: Any, **options: Any) -> Tensor:
        found.append(index)
        return layer(self, index, *arguments, **options)

    monkeypatch.setattr(Llama4TextModel, "layer", counting)
    return found


def test_the_reference_is_computed_once_for_all_its_candidates(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, computed: list[int]
) -> None:
    source, output = pair()
    first = validate(output, reference=source, tokens=24, cache=tmp_path)
    assert len(computed) == 2 * 5
    computed.clear()
    again = validate(output, reference=source, tokens=24, cache=tmp_path)
    assert len(computed) == 5
    assert again == first == validate(output, reference=source, tokens=24)
    _, other = pair(recipe="nf4")
    computed.clear()
    lossy = validate(other, reference=source, tokens=24, cache=tmp_path)
    assert lossy == validate(other, reference=source, tokens=24)
    # Other prompts are other numbers.
    assert validate(output, reference=source, tokens=25, cache=tmp_path).tokens == first.tokens + 1


def test_a_second_candidate_is_compared_without_reading_the_reference(
    damaged: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs is found and told all the same, and then the reference is read of that."""
    source, bad = damaged(f"{TEXT}layers.3.self_attn.q_proj.weight", lambda t: t.neg())
    output = tmp_path / "sound"
    convert(source, output)
    expected = validate(bad, reference=source, tokens=2)
    read: list[str] = []
    load = RankReader.read

    def counting(self: RankReader, name: str, *rows: Any) -> Any:
        read.append(name)
        return load(self, name, *rows)

    monkeypatch.setattr(RankReader, "read", counting)
    first = validate(output, reference=source, tokens=2, cache=tmp_path / "cache")
    assert "layers.3.attention.wqkv.weight" in read
    read.clear()
    assert validate(output, reference=source, tokens=2, cache=tmp_path / "cache") == first
    assert set(read) == {"output.weight"}  # for the logits
    assert validate(bad, reference=source, tokens=2, cache=tmp_path / "cache") == expected
    assert [fault.kind for fault in expected.tensors_different] == ["negated"]


def test_a_changed_reference_is_computed_anew(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    _, output = pair("text_only")
    path = commands.copy(output, tmp_path / "reference")
    validate(output, reference=path, tokens=8, cache=tmp_path / "cache")
    tensors = load_file(path / WEIGHTS)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    result = validate(output, reference=path, tokens=8, cache=tmp_path / "cache")
    assert [fault.tensor for fault in result.tensors_different] == ["model.norm.weight"]
    assert result.nmse > 0.1


@pytest.mark.parametrize("recipe", [None, "nf4"])
def test_an_interrupted_run_goes_on_where_it_stopped(
    recipe: str | None,
    pair: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    computed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parity_cache, "_SECONDS_BETWEEN_SAVES", 0.0)
    source, output = pair("text_only", **({"recipe": recipe} if recipe else {}))
    expected = validate(output, reference=source, tokens=24)

    def stop_at(stage: str) -> None:
        if stage == "layers.2":
            raise commands.Stop

    with pytest.raises(commands.Stop):
        validate(output, reference=source, tokens=24, cache=tmp_path, at=stop_at)
    computed.clear()
    assert validate(output, reference=source, tokens=24, cache=tmp_path) == expected
    assert set(computed) == {2, 3}


def test_an_interrupted_comparison_of_weights_goes_on_too(
    damaged: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong before the interruption is told after it, and so is what stands in another's place."""
    monkeypatch.setattr(parity_cache, "_SECONDS_BETWEEN_SAVES", 0.0)
    source, path = damaged(f"{TEXT}layers.3.self_attn.q_proj.weight", lambda t: t.neg())
    tensors = load_file(path / WEIGHTS)
    names = [f"{TEXT}layers.{i}.self_attn.v_proj.weight" for i in (0, 4)]
    tensors[names[1]] = tensors[names[0]].clone()
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    expected = validate(path, reference=source, tokens=2)
    assert [fault.kind for fault in expected.tensors_different] == ["negated", "other_tensor"]
    total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    with pytest.raises(commands.Stop):
        validate(path, reference=source, tokens=2, cache=tmp_path, progress=commands.stopping_after(0.6 * total))
    read: list[int] = []
    again = validate(path, reference=source, tokens=2, cache=tmp_path, progress=read.append)
    assert again == expected
    assert read[0] > 0.5 * total  # at once


def test_what_was_cut_off_on_disk_is_computed_anew(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source, output = pair("text_only")
    expected = validate(output, reference=source, tokens=24, cache=tmp_path)
    for path in tmp_path.rglob("*.npy"):
        path.write_bytes(path.read_bytes()[:-7])
    assert validate(output, reference=source, tokens=24, cache=tmp_path) == expected


def test_a_folder_that_takes_nothing_is_a_warning(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source, output = pair("text_only")
    (tmp_path / "file").write_text("")
    said: list[str] = []
    result = validate(output, reference=source, tokens=8, cache=tmp_path / "file", warn=said.append)
    assert result.passed
    assert len(said) == 1
    assert "keeps nothing" in said[0]


def test_only_the_runs_used_last_are_kept(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source, output = pair("text_only")
    for tokens in range(2, 9):
        validate(output, reference=source, tokens=tokens, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == parity_cache._KEPT_VALIDATIONS


def test_the_report_is_written_beside_the_summary_and_a_wrong_place_is_refused_first(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = pair("text_only")
    arguments = ("validate", output, "--reference", source, "--tokens", 4, "--no-cache", "--html")
    refused = commands.run(capsys, *arguments, tmp_path / "nowhere" / "report.html")
    assert refused.code == 2
    assert "nowhere is no folder" in refused.error
    assert refused.out == ""
    os.mkfifo(tmp_path / "pipe")
    for place, words in (
        ("", "no file"),
        (tmp_path / "pipe", "no regular file"),
        ("/proc/x.html", "/proc is no folder"),
    ):
        refused = commands.run(capsys, *arguments, place)
        assert (refused.code, refused.out) == (2, "")
        assert words in refused.error
    assert (tmp_path / "pipe").is_fifo()
    without = commands.run(capsys, "validate", output, "--reference", source, "--cache", "")
    assert (without.code, without.out) == (2, "")
    outcome = commands.run(capsys, *arguments, tmp_path / "report.html", "--json")
    assert outcome.code == 0
    assert outcome.json["passed"]
    page = (tmp_path / "report.html").read_text()
    assert "Passed:" in page
    assert page.rstrip().endswith("</html>")
    assert outcome.json["command"] in re.sub("<[^>]*>", "", page)


# -------------------- what a field changes, and from which length on


LENGTHS = [
    ("scout", {"attention_chunk_size": 12}, "attention_chunk_size"),
    ("temperature", {"floor_scale": 12}, "floor_scale"),
    ("temperature", {"attn_scale": 0.4}, "attn_scale"),
    ("scout", {"use_qk_norm": False}, "use_qk_norm"),
    ("scout", {"rms_norm_eps": 1e-2}, "rms_norm_eps"),
]


@pytest.mark.parametrize(("geometry", "changes", "name"), LENGTHS, ids=str)
def test_a_field_changes_no_logit_before_the_length_that_is_told_and_does_then(
    geometry: str, changes: dict[str, Any], name: str, pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    source, output = pair(geometry)
    path = commands.copy(output, tmp_path / "copy")
    body = json.loads((path / "config.json").read_text())
    body.get("text_config", body).update(changes)
    (path / "config.json").write_text(json.dumps(body))
    least = matters_from(name, Checkpoint.open(source).config.text_config, Checkpoint.open(path).config.text_config)
    assert least is not None
    (tmp_path / "ids").write_text(json.dumps([list(range(3, 3 + least))]))
    result = validate(path, reference=source, token_ids=tmp_path / "ids")
    [told] = [d for d in result.config_differences if d.field == name]
    assert told.matters_from == least
    assert told.matters is True
    assert "kl_mean" in result.gates_failed
    if least > 1:
        (tmp_path / "ids").write_text(json.dumps([list(range(3, 2 + least))]))
        result = validate(path, reference=source, token_ids=tmp_path / "ids")
        assert {d.matters for d in result.config_differences} == {False}
        assert result.gates_failed == []
        assert not result.passed  # what it says is wrong all the same


def test_rope_differs_from_the_length_at_which_an_angle_does(pair: Callable[..., tuple[Path, Path]]) -> None:
    config = Checkpoint.open(pair("nope_without_chunks")[0]).config.text_config
    from dataclasses import replace

    assert config.rope_scaling is not None
    other = replace(config, rope_scaling=replace(config.rope_scaling, factor=8.0))
    least = matters_from("rope_scaling.factor", config, other)
    assert least is not None
    assert 10 < least < 1_000_000
    assert matters_from("rope_scaling.factor", config, config) is None
    assert matters_from("rope_theta", config, replace(config, rope_theta=10.0)) == 2


def test_rope_that_differs_only_beyond_the_chunks_changes_no_logit(pair: Callable[..., tuple[Path, Path]]) -> None:
    config = Checkpoint.open(pair("scout")[0]).config.text_config  # RoPE in chunks of 8
    from dataclasses import replace

    assert config.rope_scaling is not None
    other = replace(config, rope_scaling=replace(config.rope_scaling, factor=8.0))
    assert matters_from("rope_scaling.factor", config, other) is None


def test_a_chat_template_that_writes_other_tokens_is_a_wrong_field(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    source, output = pair(variant="instruct")
    assert validate(output, reference=source, tokens=2).passed
    path = commands.copy(output, tmp_path / "copy")
    file = path / "chat_template.jinja"
    text = file.read_text()
    for wrong in (text.replace("<|header_end|>\\n\\n", "<|header_end|>\\n"), text.replace("<|eot|>", "<|eom|>"), "{{"):
        file.write_text(wrong)
        result = validate(path, reference=source, tokens=2)
        assert not result.passed
        assert [d.field for d in result.config_differences] == ["chat_template"]
        assert result.config_differences[0].matters is None


def test_a_chat_template_that_does_not_end_is_stopped(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama4_convert.checkpoints.confined.MAX_CPU_SECONDS", 1)
    source, output = pair("text_only", variant="instruct")
    path = commands.copy(output, tmp_path / "copy")
    loop = "{% for i in range(99999) %}"
    (path / "chat_template.jinja").write_text(loop * 4 + "{% endfor %}" * 4)
    [told] = validate(path, reference=source, tokens=2).config_differences
    assert (told.field, told.found) == ("chat_template", "it does not end within 1 s")


# -------------------- memory


def test_too_little_memory_is_refused_with_what_is_needed(pair: Callable[..., tuple[Path, Path]]) -> None:
    config = Checkpoint.open(pair()[0]).config
    with pytest.raises(UsageError, match=r"tokens of this width need [\d,]+ MiB: give --max-memory"):
        budget(config, 100_000, 0, 4, 1 << 29)
    assert budget(config, 100, 0, 4, 4 << 30).keep > 1 << 30


def test_scout_and_maverick_at_4096_tokens_need_no_more_than_the_default() -> None:
    vision = {"projector_input_dim": 7680, "projector_output_dim": 7680}
    for dense, step in ((16384, 1), (16384, 2)):
        text = {"intermediate_size_mlp": dense, "interleave_moe_layer_step": step}
        config = Llama4Config.from_json({"text_config": text, "vision_config": vision})
        assert budget(config, 4096, 1, 4, 4 << 30).ahead > 0
