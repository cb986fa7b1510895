"""Recipes: what the built-in ones say, how rules choose, and that nothing unknown passes in silence."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from quant.config import Module, compressed_tensors_config
from quant.recipe import FAMILIES, Recipe, RecipeError, Scheme, built_in, load, parse

ONE_RULE = 'format = "compressed-tensors"\n[[rule]]\nfamilies = ["routed_experts"]\nscheme = "int4"\n'
META = ONE_RULE.replace("compressed-tensors", "meta").replace("int4", "fp8")


def test_the_built_in_recipes() -> None:
    found = built_in()
    assert set(found) == {"int4", "int4-experts", "int4-signed", "fp8", "nf4", "mixed", "meta-fp8"}
    for name, recipe in found.items():
        assert recipe.name == name
        assert recipe.summary
        covered = {family for family in FAMILIES if recipe.scheme(family, 1, 4, 0)}
        assert covered == ({"routed_experts"} if name in ("int4-experts", "meta-fp8") else set(FAMILIES))
    assert found["int4"].scheme("dense_mlp", 3, 4) == Scheme("int4", 128, "search")
    assert found["int4-signed"].scheme("dense_mlp", 3, 4) == Scheme("int4", 128, "signed")
    assert found["fp8"].scheme("dense_mlp", 3, 4) == Scheme("fp8", method="search", granularity="channel")
    assert found["mixed"].scheme("shared_expert", 0, 4) == Scheme("fp8", method="search")
    assert [layer for layer in range(5) if found["meta-fp8"].scheme("routed_experts", layer, 5)] == [1, 2, 3]


def test_the_first_rule_that_names_a_matrix_decides() -> None:
    recipe = parse(
        'format = "compressed-tensors"\n'
        '[[rule]]\nfamilies = ["routed_experts"]\nscheme = "keep"\nlayers = [0, -1]\n'
        '[[rule]]\nfamilies = ["routed_experts"]\nscheme = "fp8"\nexperts = [2]\n'
        '[[rule]]\nfamilies = ["routed_experts", "shared_expert"]\nscheme = "int4"\ngroup_size = 64\n',
        "mine",
    )
    of = [[recipe.scheme("routed_experts", layer, 4, expert) for expert in (1, 2)] for layer in range(4)]
    int4, fp8 = Scheme("int4", 64), Scheme("fp8")
    assert of == [[None, None], [int4, fp8], [int4, fp8], [None, None]]
    assert recipe.scheme("shared_expert", 0, 4) == int4
    assert recipe.scheme("dense_mlp", 0, 4) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x =", "no valid TOML"),
        (ONE_RULE.replace("format", "fromat"), 'fromat.*did you mean "format"'),
        (ONE_RULE.replace("compressed-tensors", "compressed_tensors"), 'did you mean "compressed-tensors"'),
        (ONE_RULE.replace("routed_experts", "attention"), "attention.*choose one of"),
        (ONE_RULE.replace("routed_experts", "routed_expert"), 'did you mean "routed_experts"'),
        (ONE_RULE.replace('"int4"', '"nf4"'), 'no scheme "nf4": choose one of int4, fp8, keep'),
        (ONE_RULE.replace('"int4"', "4"), "scheme is 4: choose one of int4, fp8, nf4, keep"),
        (ONE_RULE + "group_sise = 64\n", 'did you mean "group_size"'),
        (ONE_RULE + "group_size = 48\n", "group_size is 48: choose one of 32, 64, 128"),
        (ONE_RULE + "group_size = true\n", "group_size is true: choose one of 32, 64, 128"),
        (ONE_RULE + 'method = "gptq"\n', "plain, search, signed"),
        (ONE_RULE.replace("int4", "fp8") + 'method = "signed"\n', 'method is "signed": choose one of plain, search$'),
        (ONE_RULE + 'granularity = "channel"\n', "int4 has no granularity"),
        (ONE_RULE.replace('scheme = "int4"', 'scheme = "keep"') + 'method = "plain"\n', "keep has no method"),
        (ONE_RULE + "layers = 3\n", "layers must be a list"),
        (ONE_RULE + "layers = [0, 1.5]\n", "rule 1: layers, entry 2 must be a whole number, not 1.5"),
        (ONE_RULE + "layers = [true]\n", "rule 1: layers, entry 1 must be a whole number, not true"),
        (
            ONE_RULE + ONE_RULE.partition("\n")[2].replace("scheme", "sheme"),
            'rule 2: unknown field "sheme": did you mean "scheme"',
        ),
        (ONE_RULE + "experts = []\n", "experts must be a list"),
        ('format = "compressed-tensors"\n', r"no \[\[rule\]\]"),
        ('format = "compressed-tensors"\nrule = 3\n', "rule must be a list, not 3"),
        (ONE_RULE.partition("\n")[2], "format is missing"),
        ('format = "meta"\n[[rule]]\nscheme = "fp8"\n', "rule 1: families is missing"),
        (META.replace("routed_experts", "shared_expert"), "meta quantizes routed_experts alone"),
        (META.replace("fp8", "int4"), 'meta has no scheme "int4"'),
        (META + "experts = [0]\n", "meta has no experts"),
        (META + 'method = "plain"\n', "meta has no method"),
    ],
)
def test_what_cannot_be_followed_is_told_with_what_to_write(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse(text, "mine")


@pytest.mark.parametrize("field", ["layers = [{}]", "experts = [{}]", "group_size = {}", "block_size = {}"])
@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 5000, "0x" + "f" * 20])
def test_a_number_of_thousands_of_digits_is_refused_in_one_line(field: str, number: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(f"{ONE_RULE}{field.format(number)}\n", "mine")
    assert str(caught.value).startswith("recipe mine")
    assert len(str(caught.value)) < 300


def test_fp8_has_methods() -> None:
    fp8 = ONE_RULE.replace("int4", "fp8")
    for text, method in (("", "search"), ('method = "search"', "search"), ('method = "plain"', "plain")):
        assert parse(fp8 + text, "mine").scheme("routed_experts", 0, 4, 0) == Scheme("fp8", method=method)  # type: ignore[arg-type]


def test_a_name_that_is_none_is_told_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r'did you mean "int4"\?'):
        load("int5")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(ONE_RULE)
    assert load(str(tmp_path / "mine.toml")).name == "mine"
    with pytest.raises(RecipeError, match="cannot be read"):
        load(str(tmp_path / "other.toml"))


def test_layers_and_experts_that_are_not_there() -> None:
    recipe = parse(ONE_RULE + "layers = [-4, 3]\nexperts = [7]\n", "mine")
    recipe.check(4, 8)
    with pytest.raises(RecipeError, match="no layer -4, the model has 3"):
        recipe.check(3, 8)
    with pytest.raises(RecipeError, match="no expert 7, there are 7"):
        recipe.check(4, 7)


def modules(recipe: Recipe, n_layers: int = 4, n_experts: int = 3) -> list[Module]:
    """Odd layers MoE, even ones dense, as Maverick's."""
    found = []
    for layer in range(n_layers):
        at = f"language_model.model.layers.{layer}.feed_forward."
        for name in ("gate_proj", "up_proj", "down_proj"):
            if layer % 2 == 0:
                found.append((f"{at}{name}", "dense_mlp", layer, None))
                continue
            found += [(f"{at}experts.{e}.{name}", "routed_experts", layer, e) for e in range(n_experts)]
            found.append((f"{at}shared_expert.{name}", "shared_expert", layer, None))
    return [Module(*m, recipe.scheme(m[1], m[2], n_layers, m[3])) for m in found]


KEPT_ELSEWHERE = (
    "language_model.lm_head",
    "language_model.model.layers.0.self_attn.q_proj",
    "language_model.model.layers.1.feed_forward.router",
    "vision_model.model.layers.0.mlp.fc1",
    "vision_model.patch_embedding.linear",
    "multi_modal_projector.linear_1",
)

SPARING = (
    'format = "compressed-tensors"\n'
    '[[rule]]\nfamilies = ["routed_experts"]\nscheme = "keep"\nlayers = [1]\n'
    '[[rule]]\nfamilies = ["routed_experts"]\nscheme = "int4"\n'
    '[[rule]]\nfamilies = ["dense_mlp"]\nscheme = "fp8"\nlayers = [2]\n'
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'format = "bitsandbytes"\n' + b"#" * (64 << 10), "larger than 64 KiB"),
        (b".".join([b"a"] * 20_000) + b" = 1", "more than 100 dots"),
        (b"[" + b" . ".join([b"'a'"] * 2_000) + b"]", "more than 100 dots"),
        (b"x = " + b"[" * 30_000, "no valid TOML: maximum recursion depth"),
        (b"x = " + b"{a=" * 10_000, "no valid TOML: maximum recursion depth"),
        (b"x = 1" + b"0" * 60_000, "no valid TOML: Exceeds the limit"),
        (b"summary = '\xff'", "not UTF-8"),
    ],
)
def test_a_file_has_bounds(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load(str(tmp_path / "own.toml"))


def test_what_is_no_file_is_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "folder.toml").mkdir()
    for name in ("fifo", "zero", "folder"):
        with pytest.raises(RecipeError, match="no regular file"):
            load(str(tmp_path / f"{name}.toml"))


@pytest.mark.parametrize(
    "recipe",
    [*(r for r in built_in().values() if r.format == "compressed-tensors"), parse(SPARING, "sparing")],
    ids=lambda r: r.name,
)
def test_targets_and_ignored_patterns_say_exactly_what_was_done(recipe: Recipe) -> None:
    """Read as compressed-tensors reads them: ignored by name or pattern; else the group whose target matches."""
    told = modules(recipe)
    config = compressed_tensors_config(told)

    def matches(target: str, name: str) -> bool:
        return (
            re.match(target.removeprefix("re:"), name) is not None if target.startswith("re:") else target == "Linear"
        )

    def read(name: str) -> str | None:
        if any(matches(pattern, name) for pattern in config["ignore"]):
            return None
        groups = [g for g in config["config_groups"].values() if any(matches(t, name) for t in g["targets"])]
        assert len(groups) <= 1
        return groups[0]["weights"]["type"] if groups else None

    kinds = {"int4": "int", "fp8": "float"}
    for module in told:
        assert read(module.name) == (kinds[module.scheme.kind] if module.scheme else None), module
    for name in KEPT_ELSEWHERE:
        assert read(name) is None, name
    expected = {"int4": "pack-quantized", "fp8": "float-quantized"}.get(recipe.name.split("-")[0], "mixed-precision")
    assert config["format"] == expected
