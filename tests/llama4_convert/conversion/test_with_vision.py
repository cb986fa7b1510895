"""`--vision-from`: a text-only fine-tune becomes whole again, and what its config.json has lost comes back, said aloud."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llama4.config import Llama4Config
from llama4.config_differences import differences
from llama4_convert import convert, plan, synth, validate
from llama4_convert.conversion.results import Repaired
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.validation.parity.transformers_runner import load_transformers
from tests.support import adapter as peft
from tests.support import commands

TEXT = "language_model."


@pytest.fixture(scope="session")
def tuned(meta_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tuned(geometry)`: its language model with other numbers, as Transformers saves it. Read only."""

    @functools.cache
    def get(geometry: str) -> Path:
        text, path = tmp_path_factory.mktemp("text") / "out", tmp_path_factory.mktemp("tuned") / "fine-tune"
        convert(meta_checkpoint(geometry, 2).src, text, text_only=True)
        model = load_transformers(text, torch.bfloat16)
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator).bfloat16() * 0.01
        model.save_pretrained(path)
        return path

    return get


def layouts(geometry: str, meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path]) -> dict[str, Path]:
    return {"meta": meta_checkpoint(geometry, 2).src, "transformers": converted(geometry)}


def config_of(path: Path) -> Any:
    return json.loads((path / "config.json").read_text())


def change(path: Path, *drop: str, **fields: Any) -> None:
    body = {k: v for k, v in config_of(path).items() if k not in drop} | fields
    (path / "config.json").write_text(json.dumps(body))


def expected_tensors(text: Path, base: Path) -> dict[str, Tensor]:
    vision = {key: t for key, t in peft.tensors(base).items() if not key.startswith(TEXT)}
    return {TEXT + key: t for key, t in peft.tensors(text).items()} | vision


@pytest.mark.parametrize("layout", ["meta", "transformers"])
@pytest.mark.parametrize("geometry", ["scout", "maverick", "odd", "guard"])
def test_text_of_the_one_and_vision_of_the_other(
    geometry: str,
    layout: str,
    tuned: Callable[[str], Path],
    converted: Callable[[str], Path],
    meta_checkpoint: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Bit by bit; and Transformers loads it without a missing key, and computes what the fine-tune does."""
    base = layouts(geometry, meta_checkpoint, converted)[layout]
    result = convert(tuned(geometry), tmp_path / "out", vision_from=base)
    assert peft.different(peft.tensors(tmp_path / "out"), expected_tensors(tuned(geometry), converted(geometry))) == []
    assert result.status == "converted"
    tokens = torch.arange(5, 45)[None] * 50 % 2000
    with torch.no_grad():
        found = load_transformers(tmp_path / "out", torch.float32)(tokens).logits
        assert torch.equal(found, load_transformers(tuned(geometry), torch.float32)(tokens).logits)
    base_config, out = (Llama4Config.from_json(config_of(p)) for p in (converted(geometry), tmp_path / "out"))
    assert list(differences(base_config, out)) == []


def test_it_sees_pictures(tuned: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path) -> None:
    """As the base does with the fine-tune's language model put into it."""
    convert(tuned("scout"), tmp_path / "out", vision_from=converted("scout"))
    expected = load_transformers(converted("scout"), torch.float32)
    expected.language_model.load_state_dict(load_transformers(tuned("scout"), torch.float32).state_dict())
    found = load_transformers(tmp_path / "out", torch.float32)
    side = found.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    n = (side // found.config.vision_config.patch_size // 2) ** 2
    tokens = torch.tensor([[5, 6, *[found.config.image_token_index] * n, 7, 8]])
    with torch.no_grad():
        with_picture = found(tokens, pixel_values=pixels).logits
        assert torch.equal(with_picture, expected(tokens, pixel_values=pixels).logits)
        assert not torch.equal(with_picture, found(tokens, pixel_values=-pixels).logits)
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (converted("scout") / name).read_bytes()


def test_validates_against_a_whole_fine_tune(
    tuned: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(tuned("odd"), tmp_path / "out", vision_from=converted("odd"))
    whole = commands.copy(converted("odd"), tmp_path / "whole")
    for file in whole.glob("*.safetensors*"):
        file.unlink()
    save_file(expected_tensors(tuned("odd"), converted("odd")), whole / "model.safetensors")
    assert validate(tmp_path / "out", reference=whole, tokens=24).passed


# -------------------- what config.json has lost

STRIPPED: dict[str, Any] = {
    "rope_scaling": ("rope_parameters", "rope_theta"),
    "attention_chunk_size": ("attention_chunk_size",),
    "layer_types": ("layer_types", "no_rope_layers", "no_rope_layer_interval"),
    "max_position_embeddings": ("max_position_embeddings",),
    "bos_token_id": ("bos_token_id",),
}
WRONG: dict[str, Any] = {
    "attention_chunk_size": 4096,
    "use_qk_norm": False,
    "attn_temperature_tuning": True,
    "floor_scale": 16,
    "rms_norm_eps": 1e-6,
    "num_experts_per_tok": 2,
    "no_rope_layers": [1, 1, 1, 1, 1],
    "layer_types": ["full_attention"] * 5,
    "eos_token_id": 2,
    "pad_token_id": None,
    "rope_theta": 10000.0,
    "num_attention_heads": 8,
}


@pytest.mark.parametrize("field", STRIPPED)
def test_a_field_that_was_stripped_is_the_bases(
    field: str, tuned: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """One that a reader's default makes what it was is not lost: `odd` rotates two layers of three, the default three of four."""
    geometry = "odd" if field == "layer_types" else "scout"
    damaged = commands.copy(tuned(geometry), tmp_path / "damaged")
    change(damaged, *STRIPPED[field])
    _is_repaired(damaged, converted(geometry), tmp_path / "out", field)


@pytest.mark.parametrize("field", WRONG)
def test_a_field_that_is_wrong_is_the_bases(
    field: str, tuned: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    damaged = commands.copy(tuned("scout"), tmp_path / "damaged")
    if field == "rope_theta":
        change(damaged, "rope_parameters", rope_theta=WRONG[field], rope_scaling=None)
    elif field == "num_attention_heads":  # as many rows in all
        change(damaged, num_attention_heads=8, head_dim=16, num_key_value_heads=4)
    else:
        change(damaged, **{field: WRONG[field]})
    _is_repaired(damaged, converted("scout"), tmp_path / "out", field)


def _is_repaired(source: Path, base: Path, out: Path, field: str) -> None:
    expected, before = config_of(base)["text_config"], config_of(source)
    said: list[str] = []
    result = convert(source, out, vision_from=base, warn=said.append)
    repaired = {one.field: one for one in result.repaired}
    assert repaired[field].found == before.get(field)
    assert repaired[field].used == expected[field] == config_of(out)["text_config"][field]
    assert any(text.startswith(f"{field} is ") and "repaired" in text for text in said)
    assert list(differences(*(Llama4Config.from_json(config_of(path)) for path in (base, out)))) == []


@pytest.fixture(scope="session")
def instruct(meta_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An instruct model in both layouts."""
    path = tmp_path_factory.mktemp("instruct") / "out"
    source = meta_checkpoint("scout", 2, extra=False).src
    assert convert(source, path).variant == "instruct"
    return {"meta": source, "transformers": path}


def test_what_is_right_is_left_alone(tuned: Callable[[str], Path], instruct: dict[str, Path], tmp_path: Path) -> None:
    """Any special token may end a text or fill a batch, a context may be shorter; rope_parameters say what rope_scaling does."""
    source = commands.copy(tuned("scout"), tmp_path / "source")
    base = instruct["transformers"]
    eos = config_of(base)["text_config"]["eos_token_id"]
    change(source, eos_token_id=eos[-1], pad_token_id=eos[0], max_position_embeddings=65536)
    (source / "generation_config.json").unlink(missing_ok=True)
    result = convert(source, tmp_path / "out", vision_from=base)
    assert [one.field for one in result.repaired] == ["tokenizer.json", "chat_template", "generation_config.json"]
    text = config_of(tmp_path / "out")["text_config"]
    assert (text["eos_token_id"], text["pad_token_id"], text["max_position_embeddings"]) == (eos[-1], eos[0], 65536)
    assert config_of(tmp_path / "out")["pad_token_id"] == eos[0]  # which Transformers 5.0.0 reads beside the text's


def test_no_source_is_written_over(
    tuned: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    base = commands.copy(converted("odd"), tmp_path / "base")
    before = commands.digests(base)
    with pytest.raises(UsageError, match="would overwrite the source"):
        convert(tuned("odd"), base, vision_from=base, overwrite=True)
    with pytest.raises(UsageError, match="would overwrite the source"):
        convert(tuned("odd"), base, adapter=base, overwrite=True)
    assert commands.digests(base) == before


@pytest.mark.parametrize(
    ("fields", "used"),
    [
        ({"vocab_size": 202048}, {"vocab_size": 2312}),
        ({"num_hidden_layers": 4}, {"num_hidden_layers": 6}),
        ({"num_local_experts": 16}, {"num_local_experts": 3}),
        ({"intermediate_size": 8192, "intermediate_size_mlp": 16384}, None),
        ({"moe_layers": [0, 1, 2, 3, 4, 5], "interleave_moe_layer_step": 1}, {"interleave_moe_layer_step": 3}),
    ],
)
def test_sizes_are_read_off_the_tensors(
    fields: dict[str, Any],
    used: dict[str, int] | None,
    tuned: Callable[[str], Path],
    converted: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = commands.copy(tuned("odd"), tmp_path / "source")
    change(source, **fields)
    result = convert(source, tmp_path / "out", vision_from=converted("odd"))
    expected = used or {name: config_of(tuned("odd"))[name] for name in fields}
    assert expected.items() <= {one.field: one.used for one in result.repaired}.items()
    assert peft.different(peft.tensors(tmp_path / "out"), expected_tensors(tuned("odd"), converted("odd"))) == []
    load_transformers(tmp_path / "out")


def test_a_vocabulary_that_grew_stays_grown(
    tuned: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Sizes are never the base's."""
    source = commands.copy(tuned("odd"), tmp_path / "source")
    state = peft.tensors(source)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        state[key] = torch.cat([state[key], state[key][:8]])
    for file in source.glob("*.safetensors*"):
        file.unlink()
    save_file(state, source / "model.safetensors")
    result = convert(source, tmp_path / "out", vision_from=converted("odd"))
    assert Repaired(field="vocab_size", found=2312, used=2320) in result.repaired
    assert load_transformers(tmp_path / "out").config.text_config.vocab_size == 2320


def test_tokenizer_and_chat_template(tuned: Callable[[str], Path], instruct: dict[str, Path], tmp_path: Path) -> None:
    """The fine-tune's own, where it has them."""
    base = instruct["transformers"]
    template = (base / "chat_template.jinja").read_bytes()
    for layout in instruct:
        out = tmp_path / layout
        convert(tuned("scout"), out, vision_from=instruct[layout])
        assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        assert (out / "chat_template.jinja").read_bytes() == template
    source = commands.copy(tuned("scout"), tmp_path / "source")
    (source / "tokenizer.json").write_text('{"of": "the fine-tune"}')
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    result = convert(source, tmp_path / "half", vision_from=base)
    assert (tmp_path / "half" / "tokenizer.json").read_text() == '{"of": "the fine-tune"}'
    assert (tmp_path / "half" / "chat_template.jinja").read_bytes() == template
    assert "chat_template" in [one.field for one in result.repaired]
    (source / "tokenizer_config.json").write_text('{"chat_template": "its own"}')
    result = convert(source, tmp_path / "own", vision_from=base)
    assert "chat_template" not in [one["field"] for one in result.repaired]
    assert not (tmp_path / "own" / "chat_template.jinja").exists()


def test_ends_of_text_in_generation_config(
    tuned: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    source = commands.copy(tuned("scout"), tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.1}')
    convert(source, tmp_path / "out", vision_from=converted("scout"))
    made = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    base = json.loads((converted("scout") / "generation_config.json").read_text())
    assert made["eos_token_id"] == base["eos_token_id"]
    assert made["temperature"] == 0.1


# -------------------- together with the rest


def test_with_an_adapter_and_a_recipe(
    tuned: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """One pass makes what three make; the adapter may name text and vision."""
    model = load_transformers(converted("odd"), torch.float32)
    path = peft.train(model, tmp_path / "adapter", r=2, target_modules=["q_proj"], target_parameters=peft.EXPERTS)
    convert(tuned("odd"), tmp_path / "one", vision_from=converted("odd"))
    convert(tmp_path / "one", tmp_path / "two", adapter=path)
    convert(tmp_path / "two", tmp_path / "three", recipe="fp8")
    convert(tuned("odd"), tmp_path / "at once", vision_from=converted("odd"), adapter=path, recipe="fp8")
    assert peft.different(peft.tensors(tmp_path / "at once"), peft.tensors(tmp_path / "three")) == []
    made, stepwise = config_of(tmp_path / "at once"), config_of(tmp_path / "three")
    assert made["quantization_config"] == stepwise["quantization_config"]


def test_is_complete_or_another_conversion(
    tuned: Callable[[str], Path],
    converted: Callable[[str], Path],
    meta_checkpoint: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["convert", tuned("odd"), tmp_path / "out", "--vision-from"]
    assert commands.run(capsys, *arguments, converted("odd"), "--json").json["status"] == "converted"
    assert commands.run(capsys, *arguments, converted("odd"), "--json").json["status"] == "already complete"
    outcome = commands.run(capsys, *arguments, meta_checkpoint("odd", 2).src)
    assert outcome.code == 2
    assert "another base for --vision-from" in outcome.error
    planned = commands.run(capsys, "plan", tuned("odd"), "--vision-from", converted("odd"), "--json").json
    assert [one["field"] for one in planned["repaired"]][:1] == ["tokenizer.json"]


@pytest.mark.parametrize("part", [0.2, 0.6])
def test_goes_on_where_it_stopped(
    part: float, tuned: Callable[[str], Path], meta_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"vision_from": meta_checkpoint("odd", 2).src, "shard_size": commands.SHARD}
    convert(tuned("odd"), tmp_path / "straight", **options)
    size = sum(t.nbytes for t in peft.tensors(tmp_path / "straight").values())
    with pytest.raises(commands.Stop):
        convert(tuned("odd"), tmp_path / "out", progress=commands.stopping_after(part * size), **options)
    convert(tuned("odd"), tmp_path / "out", **options)
    assert commands.digests(tmp_path / "out") == commands.digests(tmp_path / "straight")


# -------------------- what is refused


def test_a_base_of_another_width(
    tuned: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = commands.run(capsys, "convert", tuned("odd"), tmp_path / "out", "--vision-from", converted("scout"))
    assert outcome.code == 3
    assert "hidden_size is 96" in outcome.error
    assert "and 128 there" in outcome.error
    assert not (tmp_path / "out").exists()


def test_sources_and_bases_of_the_wrong_kind(
    tuned: Callable[[str], Path], converted: Callable[[str], Path], meta_checkpoint: Callable[..., Any]
) -> None:
    with pytest.raises(UsageError, match="a vision tower of its own"):
        plan(converted("odd"), vision_from=converted("odd"))
    with pytest.raises(UsageError, match="no Transformers directory"):
        plan(meta_checkpoint("odd", 2).src, vision_from=converted("odd"))
    with pytest.raises(BadInput, match="has no vision tower"):
        plan(tuned("odd"), vision_from=tuned("odd"))
    with pytest.raises(BadInput, match="has no vision tower"):
        plan(tuned("odd"), vision_from=meta_checkpoint("text_only", 2).src)


def test_damage_of_the_bases_tower_is_found_and_of_its_text_not_looked_for(
    tuned: Callable[[str], Path], meta_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    from llama4_convert.checkpoints.pth import PthIndex

    for key, is_read in (("vision_projection.weight", True), ("output.weight", False)):
        base = commands.copy(meta_checkpoint("odd", 2).src, tmp_path / key)
        record = PthIndex.read(base / "consolidated.01.pth").tensors[key].record
        commands.flip(base / "consolidated.01.pth", record.offset + 7)
        if is_read:
            with pytest.raises(BadInput, match=r"vision_projection\.weight is damaged"):
                convert(tuned("odd"), tmp_path / f"{key}-out", vision_from=base)
        else:
            convert(tuned("odd"), tmp_path / f"{key}-out", vision_from=base)


@pytest.mark.parametrize("layout", ["views", "one_storage", "parameters"])
def test_a_base_in_any_arrangement_of_storages(
    layout: str,
    tuned: Callable[[str], Path],
    meta_checkpoint: Callable[..., Any],
    converted: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    convert(tuned("odd"), tmp_path / "out", vision_from=meta_checkpoint("odd", 2, layout=layout).src)
    assert peft.different(peft.tensors(tmp_path / "out"), expected_tensors(tuned("odd"), converted("odd"))) == []


def test_ranks_of_the_base_that_disagree(
    tuned: Callable[[str], Path], meta_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """Copies on two ranks whose CRCs tell nothing, since neither fills its storage, are compared by value."""
    base = commands.copy(meta_checkpoint("odd", 2, extra=False).src, tmp_path / "base")
    key = "vision_embeddings.vision_encoder.ln_pre.weight"
    for rank in range(2):
        file = base / f"consolidated.{rank:02d}.pth"
        state = torch.load(file, weights_only=True)
        state[key] = torch.cat([state[key], state[key]])[: len(state[key])]
        torch.save(state, file)
    convert(tuned("odd"), tmp_path / "out", vision_from=base)
    state[key][3] += 1
    torch.save(state, file)
    with pytest.raises(BadInput, match="the ranks disagree"):
        convert(tuned("odd"), tmp_path / "other", vision_from=base)


def test_a_base_of_another_model_is_refused_and_nothing_is_taken_from_it(tmp_path: Path) -> None:
    """Scout's text and Maverick: the widths are the same, and the layers that have experts are others."""
    for geometry in ("scout", "maverick"):
        synth(tmp_path / geometry, geometry=geometry, tiny=True, ranks=2)
    convert(tmp_path / "scout", tmp_path / "text", text_only=True)
    with pytest.raises(BadInput, match=r"is no fine-tune of .*maverick: layers"):
        convert(tmp_path / "text", tmp_path / "out", vision_from=tmp_path / "maverick")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    convert(tmp_path / "text", tmp_path / "right", vision_from=tmp_path / "scout")
    assert validate(tmp_path / "right", reference=tmp_path / "scout", tokens=4).passed


# -------------------- --config-from: what a model's config.json has lost, and nothing else


@pytest.fixture
def stripped(converted: Callable[[str], Path], tuned: Callable[[str], Path], tmp_path: Path) -> dict[str, Path]:
    """Fine-tunes of `odd`, whole and text-only, whose config.json has little but the sizes left."""
    whole = commands.copy(converted("odd"), tmp_path / "whole")
    (whole / "llama4-convert.json").unlink()  # a trainer's, not ours
    body = config_of(whole)
    for name in ("rope_theta", "rope_scaling", "no_rope_layers", "no_rope_layer_interval", "layer_types"):
        del body["text_config"][name]
    body["text_config"] |= {"attention_chunk_size": None, "rms_norm_eps": None, "use_qk_norm": False, "eos_token_id": 2}
    body["vision_config"] = {"hidden_size": 32}
    change(
        whole,
        "image_token_index",
        "architectures",
        text_config=body["text_config"],
        vision_config=body["vision_config"],
    )
    text = commands.copy(tuned("odd"), tmp_path / "text")
    change(text, "rope_parameters", "layer_types", "no_rope_layers", "attention_chunk_size", "dtype", rms_norm_eps=None)
    return {"whole": whole, "text": text}


@pytest.mark.parametrize("layout", ["meta", "transformers", "config.json"])
@pytest.mark.parametrize("kind", ["whole", "text"])
def test_config_from_repairs_and_changes_no_tensor(
    kind: str,
    layout: str,
    stripped: dict[str, Path],
    converted: Callable[[str], Path],
    meta_checkpoint: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """From a base in either layout; a config.json alone is one. What is text-only stays so."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_bytes((converted("odd") / "config.json").read_bytes())
    base = {**layouts("odd", meta_checkpoint, converted), "config.json": tmp_path / "alone"}[layout]
    said: list[str] = []
    result = convert(stripped[kind], tmp_path / "out", config_from=base, warn=said.append)
    assert peft.different(peft.tensors(tmp_path / "out"), peft.tensors(stripped[kind])) == []
    expected, found = (Llama4Config.from_json(config_of(path)) for path in (converted("odd"), tmp_path / "out"))
    expected = expected if kind == "whole" else Llama4Config(expected.text_config)
    assert list(differences(expected, found)) == []
    assert all(any(text.startswith(f"{one.field} is ") for text in said) for one in result.repaired)
    load_transformers(tmp_path / "out")  # which refuses null


def test_config_from_with_a_recipe_and_an_adapter(
    stripped: dict[str, Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_transformers(converted("odd"), torch.float32)
    path = peft.train(model, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    convert(stripped["whole"], tmp_path / "one", config_from=converted("odd"))
    convert(tmp_path / "one", tmp_path / "two", adapter=path, recipe="fp8")
    convert(stripped["whole"], tmp_path / "at once", config_from=converted("odd"), adapter=path, recipe="fp8")
    assert peft.different(peft.tensors(tmp_path / "at once"), peft.tensors(tmp_path / "two")) == []
    assert config_of(tmp_path / "at once") == config_of(tmp_path / "two")


def test_config_from_goes_by_the_tensors_where_config_json_is_another_kinds(
    tuned: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """A trainer's text model beside the whole one's config.json, its keys a level too deep; and the other way round."""
    text = commands.copy(tuned("odd"), tmp_path / "text")
    save_file({TEXT + key: t for key, t in peft.tensors(text).items()}, text / "model.safetensors")
    (text / "config.json").write_bytes((converted("odd") / "config.json").read_bytes())
    result = convert(text, tmp_path / "text-out", config_from=converted("odd"))
    assert peft.different(peft.tensors(tmp_path / "text-out"), peft.tensors(tuned("odd"))) == []
    assert [one.field for one in result.repaired][:2] == ["model_type", "architectures"]
    whole = commands.copy(converted("odd"), tmp_path / "whole")
    (whole / "llama4-convert.json").unlink()
    (whole / "config.json").write_bytes((tuned("odd") / "config.json").read_bytes())
    convert(whole, tmp_path / "whole-out", config_from=converted("odd"))
    for out in ("text-out", "whole-out"):
        load_transformers(tmp_path / out)


@pytest.mark.parametrize(("outer", "inner"), [(0, 0), (0, ...), (..., 0)])
def test_config_from_repairs_both_padding_tokens(
    outer: Any, inner: Any, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Transformers 5.0.0 reads the one beside text_config, all others the text's."""
    source = commands.copy(converted("odd"), tmp_path / "source")
    (source / "llama4-convert.json").unlink()  # its digests
    body = config_of(source)
    pad = body["pad_token_id"]
    body["pad_token_id"] = pad if outer is ... else outer
    body["text_config"]["pad_token_id"] = pad if inner is ... else inner
    (source / "config.json").write_text(json.dumps(body))
    result = convert(source, tmp_path / "out", config_from=converted("odd"))
    assert [(one.field, one.found, one.used) for one in result.repaired] == [("pad_token_id", 0, pad)]
    assert config_of(tmp_path / "out") == config_of(converted("odd"))


def test_config_from_says_what_it_is_not_for(
    tuned: Callable[[str], Path], converted: Callable[[str], Path], meta_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="repairs a Transformers directory"):
        plan(meta_checkpoint("odd", 2).src, config_from=converted("odd"))
    with pytest.raises(UsageError, match="leave --config-from out"):
        plan(tuned("odd"), config_from=converted("odd"), vision_from=converted("odd"))
    with pytest.raises(BadInput, match=r"is no fine-tune of the base: hidden_size is 96"):
        plan(tuned("odd"), config_from=converted("scout"))
    with pytest.raises(UsageError, match=r"nowhere is not a directory"):
        plan(tuned("odd"), config_from=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="would overwrite the source"):
        convert(tuned("odd"), converted("odd"), config_from=converted("odd"), overwrite=True)
    broken = commands.copy(tuned("odd"), tmp_path / "broken")
    (broken / "generation_config.json").write_text("[]")
    with pytest.raises(BadInput, match=r"generation_config\.json holds no JSON object"):
        plan(broken, config_from=converted("odd"))


def test_another_base_for_config_from_is_another_conversion(
    stripped: dict[str, Path],
    converted: Callable[[str], Path],
    meta_checkpoint: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is what it says that counts: the same model in Meta's layout is no other base."""
    arguments = ["convert", stripped["text"], tmp_path / "out", "--config-from"]
    assert commands.run(capsys, *arguments, converted("odd"), "--json").json["status"] == "converted"
    again = commands.run(capsys, *arguments, meta_checkpoint("odd", 2).src, "--json").json
    assert again["status"] == "already complete"
    other = commands.copy(converted("odd"), tmp_path / "other")
    change(other, transformers_version="9")
    outcome = commands.run(capsys, *arguments, other)
    assert outcome.code == 2
    assert "another base for --config-from" in outcome.error
