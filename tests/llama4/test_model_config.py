"""A configuration is the same from params.json and from every dialect of config.json, and a changed field is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from llama4.config import Llama4Config, Llama4TextConfig, Llama4VisionConfig, check_runnable
from llama4.config_differences import Difference, differences
from llama4.config_fields import ConfigError
from llama4_convert.reference.checkpoint import Checkpoint
from tests.support import meta_model

GEOMETRIES = sorted(meta_model.GEOMETRIES)
Body = dict[str, Any]


@pytest.fixture(scope="session")
def body(converted: Callable[[str], Path]) -> Callable[[str], Body]:
    """The config.json of a conversion, to be changed."""
    return lambda geometry="scout": json.loads((converted(geometry) / "config.json").read_text())


def meaning(checkpoint: Path) -> Llama4Config:
    """What params.json means; the model code of Meta is held against it in test_model.py."""
    return Checkpoint.open(checkpoint).config


def saved_by_transformers(path: Path, target: Path) -> Body:
    """Loaded by Transformers and saved again: its own dialect."""
    transformers.AutoConfig.from_pretrained(path).save_pretrained(target)
    return json.loads((target / "config.json").read_text())


def named(expected: Llama4Config, found: Llama4Config) -> list[str]:
    return [difference.field for difference in differences(expected, found)]


# -------------------- the same from every side


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_config_that_convert_writes_says_what_params_mean(
    geometry: str, meta_checkpoint: Callable[..., Any], body: Callable[..., Body]
) -> None:
    expected, found = meaning(meta_checkpoint(geometry, 2).src), Llama4Config.from_json(body(geometry))
    assert list(differences(expected, found)) == []
    assert list(differences(found, expected)) == []


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_what_transformers_makes_of_it_and_saves_says_it_still(
    geometry: str, meta_checkpoint: Callable[..., Any], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    saved = saved_by_transformers(converted(geometry), tmp_path)
    text = saved.get("text_config", saved)
    assert "rope_parameters" in text
    assert "rope_theta" not in text
    assert list(differences(meaning(meta_checkpoint(geometry, 2).src), Llama4Config.from_json(saved))) == []


@pytest.mark.parametrize("geometry", ["scout", "maverick", "guard"])
def test_the_values_are_those_of_params(geometry: str, meta_checkpoint: Callable[..., Any]) -> None:
    """By hand, from tests/support/meta_model.py."""
    params = meta_model.GEOMETRIES[geometry]
    c = meaning(meta_checkpoint(geometry, 2).src)
    text, n = c.text_config, params["n_layers"]
    step = (params["moe_args"] or {}).get("interleave_moe_layer_step", 0)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (128, n, 16)
    assert (text.num_key_value_heads, text.head_dim, text.rms_norm_eps, text.rope_theta) == (8, 8, 1e-5, 5e5)
    assert text.moe_layers == (tuple(range(step - 1, n, step)) if step else ())
    nope = {3} - ({3} if geometry == "guard" else set())
    assert text.no_rope_layers == tuple(layer not in nope for layer in range(n))
    chunked = geometry != "guard"
    assert [text.chunk_size(layer) for layer in range(n)] == [
        8 if chunked and layer not in nope else None for layer in range(n)
    ]
    assert text.use_qk_norm is params["use_qk_norm"]
    assert (text.rope_scaling is not None) is params["use_scaled_rope"]
    assert text.is_moe(0) is (step == 1)
    assert c.image_token_index == meta_model.PATCH_TOKEN
    vision = c.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (64, 2, 8)
    assert (vision.patches_a_side, vision.tokens_a_tile, vision.shuffled_size) == (4, 4, 256)
    assert (vision.intermediate_size, vision.vision_output_dim) == (256, 48)


def test_both_dialects_of_rope(body: Callable[..., Body]) -> None:
    old = body()
    new = copy.deepcopy(old)
    text = new["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    assert Llama4Config.from_json(new) == Llama4Config.from_json(old)


def test_the_older_spelling_type_is_taken_for_rope_type(body: Callable[..., Body]) -> None:
    old = body()
    new = copy.deepcopy(old)
    new["text_config"]["rope_scaling"]["type"] = new["text_config"]["rope_scaling"].pop("rope_type")
    assert Llama4Config.from_json(new) == Llama4Config.from_json(old)


def test_a_text_models_config_is_flat(body: Callable[..., Body]) -> None:
    nested = body()
    flat = Llama4Config.from_json(nested["text_config"])
    assert flat.vision_config is None
    assert flat.image_token_index is None
    assert flat.text_config == Llama4Config.from_json(nested).text_config


# -------------------- defaults


def real_text(**given: Any) -> Llama4TextConfig:
    """What Transformers' own class makes of `given`, every field written out."""
    return Llama4TextConfig.from_json(transformers.Llama4TextConfig(**given).to_dict())


def without_counts(config: Llama4TextConfig) -> Llama4TextConfig:
    """Transformers reads neither count where there is a list."""
    return replace(config, no_rope_layer_interval=None, interleave_moe_layer_step=0)


TEXT_DEFAULTS = [
    {},
    {"num_hidden_layers": 7},
    {"num_hidden_layers": 9, "no_rope_layer_interval": 3},
    {"num_hidden_layers": 9, "no_rope_layer_interval": 10},
    {"num_hidden_layers": 4, "no_rope_layers": []},
    {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "no_rope_layer_interval": 2},
    {"num_hidden_layers": 8, "interleave_moe_layer_step": 2},
    {"num_hidden_layers": 4, "moe_layers": [], "interleave_moe_layer_step": 5},
    {"num_hidden_layers": 4, "moe_layers": [1, 3], "interleave_moe_layer_step": 2},
    {"num_hidden_layers": 2, "attention_chunk_size": 16},
    {"rope_theta": 7.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0},
    {"rope_scaling": None, "rope_theta": 7.0},
    {"rope_scaling": {}, "rope_theta": 7.0},
]


@pytest.mark.parametrize("given", TEXT_DEFAULTS, ids=str)
def test_what_a_text_config_leaves_out_is_what_transformers_takes(given: Body) -> None:
    assert Llama4TextConfig.from_json(given) == real_text(**copy.deepcopy(given))


@pytest.mark.parametrize("name", [field.name for field in fields(Llama4TextConfig)])
def test_every_default_of_the_text_is_that_of_the_real_class(name: str) -> None:
    real = transformers.Llama4TextConfig()
    ours = getattr(Llama4TextConfig.from_json({}), name)
    if name == "rope_theta":
        assert ours == real.rope_parameters["rope_theta"]
    elif name == "rope_scaling":
        assert ours is None
        assert real.rope_parameters["rope_type"] == "default"
    elif isinstance(ours, tuple):
        assert list(ours) == getattr(real, name)
    else:
        assert ours == getattr(real, name)
        assert isinstance(ours, type(getattr(real, name))) or float(ours) == getattr(real, name)


# Transformers' own defaults contradict each other here, and a config.json that leaves them out cannot run.
_PROJECTOR = {"projector_input_dim": 7680, "projector_output_dim": 7680}


@pytest.mark.parametrize("name", [field.name for field in fields(Llama4VisionConfig)])
def test_every_default_of_the_vision_tower_is_that_of_the_real_class(name: str) -> None:
    ours, real = Llama4VisionConfig.from_json(_PROJECTOR), transformers.Llama4VisionConfig(**_PROJECTOR)
    if name == "rope_theta":
        assert ours.rope_theta == real.rope_parameters["rope_theta"]
    else:
        assert getattr(ours, name) == getattr(real, name)


def test_the_default_ids_of_image_tokens_are_those_of_the_real_class() -> None:
    ours, real = Llama4Config.from_json({"text_config": {}}), transformers.Llama4Config()
    for name in ("image_token_index", "boi_token_index", "eoi_token_index"):
        assert getattr(ours, name) == getattr(real, name)


@pytest.mark.parametrize("geometry", ["scout", "maverick", "guard", "temperature", "text_only"])
def test_a_field_that_is_left_out_is_named_where_the_default_is_another_and_only_there(
    geometry: str, body: Callable[..., Body]
) -> None:
    """Transformers itself is asked what each absence means."""
    whole = body(geometry)
    text = whole.get("text_config", whole)
    expected = Llama4Config.from_json(text)
    told = 0
    for name in sorted(set(text) & {field.name for field in fields(Llama4TextConfig)}):
        absent = {key: value for key, value in text.items() if key != name}
        if name in ("num_hidden_layers", "head_dim"):  # 48 layers with lists for 5; an absent width is another
            continue
        if name == "moe_layers" and not text["interleave_moe_layer_step"]:  # Transformers divides by it
            continue
        real = real_text(**{k: v for k, v in copy.deepcopy(absent).items() if k != "architectures"})
        ours = Llama4Config.from_json(absent)
        assert without_counts(ours.text_config) == without_counts(real), name
        told += name in named(expected, ours)
    assert told >= 7


def test_counts_that_are_left_out_are_read_off_the_lists() -> None:
    lists = {"num_hidden_layers": 6, "no_rope_layers": [1, 1, 0, 1, 1, 0], "moe_layers": [1, 3, 5]}
    found = Llama4TextConfig.from_json(lists)
    assert (found.no_rope_layer_interval, found.interleave_moe_layer_step) == (3, 2)
    none = Llama4TextConfig.from_json({"num_hidden_layers": 2, "no_rope_layers": [1, 1], "moe_layers": []})
    assert (none.no_rope_layer_interval, none.interleave_moe_layer_step) == (None, 0)


def test_absent_layers_contradict_the_lists(body: Callable[..., Body]) -> None:
    text = body()["text_config"]
    del text["num_hidden_layers"]
    config = Llama4Config(Llama4TextConfig.from_json(text))
    with pytest.raises(ConfigError, match="no_rope_layers has 5 entries for num_hidden_layers = 48"):
        check_runnable(config)


# -------------------- what is no configuration


WRONG = {
    "whole": ["3", 1.5, True, -1, 0, [3], {}, float("nan"), float("inf"), 1 << 50],
    "number": ["3", True, [3], {}, float("nan"), float("inf"), -float("inf"), 10**400],
    "boolean": ["true", 0.5, [], {}],
    "list": [3, "1", {}, [None], ["a", 1], [1.5]],
    "object": [3, "llama3", [], True],
    "token": ["3", 1.5, True, [3]],
}
KINDS = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "intermediate_size", "intermediate_size_mlp", "num_experts_per_tok", "attention_chunk_size"),
        "whole",
    ),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "floor_scale", "attn_scale"), "number"),
    **dict.fromkeys(
        ("use_qk_norm", "attn_temperature_tuning", "attention_bias", "tie_word_embeddings"), "boolean"
    ),
    **dict.fromkeys(("moe_layers", "no_rope_layers", "layer_types"), "list"),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), "object"),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_text_field_of_the_wrong_type_is_named(name: str, body: Callable[..., Body]) -> None:
    for value in WRONG[KINDS[name]]:
        changed = body()
        changed["text_config"][name] = value
        with pytest.raises(ConfigError, match=name):
            Llama4Config.from_json(changed)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("hidden_size", "whole"),
        ("num_hidden_layers", "whole"),
        ("num_attention_heads", "whole"),
        ("intermediate_size", "whole"),
        ("image_size", "whole"),
        ("patch_size", "whole"),
        ("vision_output_dim", "whole"),
        ("projector_input_dim", "whole"),
        ("pixel_shuffle_ratio", "number"),
        ("norm_eps", "number"),
        ("rope_theta", "number"),
        ("rope_parameters", "object"),
    ],
)
def test_a_vision_field_of_the_wrong_type_is_named(name: str, kind: str, body: Callable[..., Body]) -> None:
    for value in WRONG[kind]:
        changed = body()
        changed["vision_config"][name] = value
        with pytest.raises(ConfigError, match=f"vision_config.{name}"):
            Llama4Config.from_json(changed)


@pytest.mark.parametrize("name", ["image_token_index", "boi_token_index", "eoi_token_index"])
def test_a_token_id_of_the_wrong_type_is_named(name: str, body: Callable[..., Body]) -> None:
    for value in WRONG["token"]:
        with pytest.raises(ConfigError, match=name):
            Llama4Config.from_json({**body(), name: value})


@pytest.mark.parametrize("name", ["factor", "high_freq_factor", "low_freq_factor"])
def test_a_number_inside_of_rope_is_named_with_its_place(name: str, body: Callable[..., Body]) -> None:
    for value in WRONG["number"]:
        changed = body()
        changed["text_config"]["rope_scaling"][name] = value
        with pytest.raises(ConfigError, match=f"rope_scaling.{name}"):
            Llama4Config.from_json(changed)


def test_other_rope_types_are_none_of_llama_4(body: Callable[..., Body]) -> None:
    for value in ("yarn", "linear", 3, ["llama3"]):
        changed = body()
        changed["text_config"]["rope_scaling"]["rope_type"] = value
        with pytest.raises(ConfigError, match=r"rope_scaling\.rope_type is .*llama3 or default"):
            Llama4Config.from_json(changed)


@pytest.mark.parametrize("name", ["no_rope_layers", "layer_types"])
def test_a_list_that_is_too_short_is_named(name: str, body: Callable[..., Body]) -> None:
    changed = body()
    changed["text_config"][name] = changed["text_config"][name][:-1]
    config = Llama4Config.from_json(changed)
    assert name in {difference.field for difference in differences(Llama4Config.from_json(body()), config)}
    with pytest.raises(ConfigError, match=f"{name} has 4 entries for num_hidden_layers = 5"):
        check_runnable(config)


def test_parts_that_are_no_objects(body: Callable[..., Body]) -> None:
    for name in ("text_config", "vision_config"):
        for value in (3, [], "x"):
            with pytest.raises(ConfigError, match="must be objects"):
                Llama4Config.from_json({**body(), name: value})


def test_widths_of_the_projector_that_do_not_join(body: Callable[..., Body]) -> None:
    for name in ("projector_input_dim", "projector_output_dim"):
        for value in (64, None):
            changed = body()
            changed["vision_config"][name] = value
            with pytest.raises(ConfigError, match=f"vision_config.{name}"):
                Llama4Config.from_json(changed)


def test_a_side_may_be_a_pair_of_equal_numbers(body: Callable[..., Body]) -> None:
    changed = body()
    changed["vision_config"].update(image_size=[56, 56], patch_size=[14, 14])
    assert Llama4Config.from_json(changed) == Llama4Config.from_json(body())
    changed["vision_config"]["image_size"] = [56, 28]
    with pytest.raises(ConfigError, match=r"vision_config\.image_size"):
        Llama4Config.from_json(changed)


# -------------------- differences


# Of Scout; ... leaves the field out. Every field of the classes is here (see below).
TEXT_CHANGES: dict[str, list[Any]] = {
    "vocab_size": [2000, ...],
    "hidden_size": [64, ...],
    "num_attention_heads": [8, ...],
    "num_key_value_heads": [4],
    "head_dim": [16, ...],
    "intermediate_size": [96, ...],
    "intermediate_size_mlp": [96, ...],
    "num_local_experts": [8, ...],
    "num_experts_per_tok": [2],
    "interleave_moe_layer_step": [2],
    "moe_layers": [[], [0], [1, 3], [0, 1, 2, 3]],
    "rms_norm_eps": [1e-6, 1.00001e-5, 0],
    "rope_theta": [10000.0, 500001],
    "rope_scaling": [None, ...],
    "no_rope_layer_interval": [3],
    "no_rope_layers": [[1] * 5, [0] * 5, [1, 1, 1, 0, 0]],
    "layer_types": [["full_attention"] * 5, ["chunked_attention"] * 5],
    "attention_chunk_size": [4, 8192, ...],
    "use_qk_norm": [False],
    "attn_temperature_tuning": [True, ...],
    "floor_scale": [4096, 8193],
    "attn_scale": [0.2, 0],
    "hidden_act": ["gelu"],
    "attention_bias": [True],
    "tie_word_embeddings": [True],
}
VISION_CHANGES: dict[str, list[Any]] = {
    "hidden_size": [32, ...],
    "num_hidden_layers": [1, ...],
    "num_attention_heads": [4, ...],
    "intermediate_size": [128, ...],
    "image_size": [112, ...],
    "patch_size": [7],
    "pixel_shuffle_ratio": [0.25],
    "norm_eps": [1e-6],
    "rope_theta": [500000.0],
    "hidden_act": ["silu"],
}


def changed_in(place: Body, name: str, value: Any) -> None:
    if value is ...:
        del place[name]
    else:
        place[name] = value


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in TEXT_CHANGES.items() for v in values], ids=str)
def test_a_changed_field_of_the_text_is_named_and_no_other(name: str, value: Any, body: Callable[..., Body]) -> None:
    expected, changed = Llama4Config.from_json(body()), body()
    changed_in(changed["text_config"], name, value)
    found = Llama4Config.from_json(changed)
    assert named(expected, found) == [name]
    assert named(found, expected) == [name]
    [difference] = differences(expected, found)
    json.dumps(difference._asdict(), allow_nan=False)
    if value is not ... and name != "rope_scaling":
        assert difference.found == value


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in VISION_CHANGES.items() for v in values], ids=str)
def test_a_changed_field_of_the_vision_tower_is_named_and_no_other(
    name: str, value: Any, body: Callable[..., Body]
) -> None:
    expected, changed = Llama4Config.from_json(body()), body()
    changed_in(changed["vision_config"], name, value)
    [difference] = differences(expected, Llama4Config.from_json(changed))
    assert difference.field == f"vision_config.{name}"
    assert difference.found == value or value is ...


def test_the_changes_above_are_of_every_field() -> None:
    apart = {"num_hidden_layers"}  # with all its lists, below
    assert {field.name for field in fields(Llama4TextConfig)} == {*TEXT_CHANGES, *apart}
    assert {field.name for field in fields(Llama4VisionConfig)} == {*VISION_CHANGES, "vision_output_dim"}


def test_fewer_layers_are_named_with_the_lists(body: Callable[..., Body]) -> None:
    expected, changed = Llama4Config.from_json(body()), body()
    changed["text_config"]["num_hidden_layers"] = 4
    found = named(expected, Llama4Config.from_json(changed))
    assert set(found) == {"num_hidden_layers", "no_rope_layers", "layer_types"}


def test_a_vision_width_is_named_once(body: Callable[..., Body]) -> None:
    expected, changed = Llama4Config.from_json(body()), body()
    names = ("vision_output_dim", "projector_input_dim", "projector_output_dim")
    changed["vision_config"].update(dict.fromkeys(names, 64))
    assert named(expected, Llama4Config.from_json(changed)) == ["vision_config.vision_output_dim"]


@pytest.mark.parametrize(
    ("inner", "value"),
    [("factor", 8.0), ("high_freq_factor", 4.0), ("low_freq_factor", 0.5), ("original_max_position_embeddings", 4096)],
)
@pytest.mark.parametrize("dialect", ["rope_scaling", "rope_parameters"])
def test_a_number_inside_of_rope_is_named_as_config_json_names_it(
    dialect: str, inner: str, value: float, body: Callable[..., Body]
) -> None:
    expected, changed = Llama4Config.from_json(body()), body()
    text = changed["text_config"]
    text[dialect] = {**text.pop("rope_scaling"), inner: value}
    [difference] = differences(expected, Llama4Config.from_json(changed))
    assert difference.field == f"rope_scaling.{inner}"
    assert difference.found == value
    assert difference.expected != value


@pytest.mark.parametrize("name", ["image_token_index", "boi_token_index", "eoi_token_index"])
def test_an_image_tokens_id_is_named_unless_nobody_knows_it(name: str, body: Callable[..., Body]) -> None:
    expected = Llama4Config.from_json(body())
    found = Llama4Config.from_json({**body(), name: 7})
    assert list(differences(expected, found)) == [Difference(name, getattr(expected, name), 7)]
    assert named(expected, Llama4Config.from_json({**body(), name: -1})) == [name]
    assert named(replace(expected, **{name: None}), found) == []


def test_a_vision_tower_that_is_not_there(body: Callable[..., Body]) -> None:
    seeing = Llama4Config.from_json(body())
    blind = replace(seeing, vision_config=None)
    assert list(differences(seeing, blind)) == [Difference("vision_config", "present", None)]
    assert list(differences(blind, seeing)) == [Difference("vision_config", None, "present")]
    assert list(differences(blind, blind)) == []


def test_what_no_layer_uses_is_no_difference(body: Callable[..., Body]) -> None:
    """Guard has no experts: what a reader would make of their number matters to nobody."""
    expected, changed = Llama4Config.from_json(body("guard")), body("guard")
    changed["text_config"].update(num_local_experts=9, num_experts_per_tok=3, intermediate_size=77)
    assert named(expected, Llama4Config.from_json(changed)) == []
    changed["text_config"]["moe_layers"] = [0]
    assert "moe_layers" in named(expected, Llama4Config.from_json(changed))


def test_several_changes_are_all_named(body: Callable[..., Body]) -> None:
    expected, changed = Llama4Config.from_json(body()), body()
    changed["text_config"].update(rms_norm_eps=1e-6, use_qk_norm=False)
    changed["vision_config"]["norm_eps"] = 1e-3
    assert named(expected, Llama4Config.from_json(changed)) == ["rms_norm_eps", "use_qk_norm", "vision_config.norm_eps"]


# -------------------- where Transformers 5.23 reads RoPE's numbers from


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    "given",
    [
        {"rope_scaling": LLAMA3, "max_position_embeddings": 1000},
        {
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 10},
            "rope_parameters": {"rope_type": "default", "rope_theta": 3.0},
        },
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 10, "rope_theta": 7.0}, "rope_theta": 9.0},
        {"rope_scaling": {}, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 10, "rope_theta": 7.0}},
    ],
    ids=str,
)
def test_rope_is_read_as_transformers_reads_it(given: Body) -> None:
    assert Llama4TextConfig.from_json(given) == real_text(**copy.deepcopy(given))


def test_a_difference_in_the_whole_of_rope_is_in_the_words_of_config_json(body: Callable[..., Body]) -> None:
    changed = body()
    changed["text_config"]["rope_scaling"] = None
    [difference] = differences(Llama4Config.from_json(body()), Llama4Config.from_json(changed))
    assert "original_max_position_embeddings" in difference.expected


@pytest.mark.parametrize("n", [30_000, 10**9])
def test_absurd_numbers_of_layers_end_in_a_message(n: int) -> None:
    """Not in lists of that length, which took minutes and filled the memory."""
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        Llama4TextConfig.from_json({"num_hidden_layers": n})
