"""The model card: what `convert` writes, what `card` makes of it later, and what the Hub reads in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from llama4_convert import card, convert, export, publishing, synth, validate, verify
from llama4_convert.checkpoints.manifest import NAME, Manifest
from llama4_convert.commands.terminal import json_text
from llama4_convert.conversion.convert import bind
from llama4_convert.conversion.request import Request
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.streaming.execution import model_card
from tests.support import commands


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("meta")
    synth(path, geometry="maverick", tiny=True, ranks=2)
    return path


@pytest.fixture(scope="module")
def made(meta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "out"
    convert(meta, path, recipe="int4")
    return path


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return commands.copy(made, tmp_path / "out")


def readme(path: Path) -> str:
    return (path / "README.md").read_text()


# -------------------- what convert writes


@pytest.mark.parametrize(
    "options", [{}, {"recipe": "mixed"}, {"recipe": "nf4"}, {"text_only": True, "dtype": "float16"}]
)
def test_convert_and_card_write_the_same(options: dict[str, Any], meta: Path, tmp_path: Path) -> None:
    result = convert(meta, tmp_path / "out", **options)
    assert readme(tmp_path / "out") == card(tmp_path / "out").card
    assert "README.md" in {file.file for file in result.files}
    assert str(tmp_path) not in readme(tmp_path / "out")
    assert verify(tmp_path / "out").ok
    commands.flip(tmp_path / "out" / "README.md", 100)
    assert [f.file for f in verify(tmp_path / "out").files if not f.ok] == ["README.md"]


@pytest.mark.parametrize("geometry", ["scout", "guard", "odd", "text_only", "dense_chunks", "top2"])
def test_every_geometry_has_a_card(geometry: str, converted: Callable[[str], Path]) -> None:
    assert readme(converted(geometry)) == card(converted(geometry)).card
    told = ModelCard(readme(converted(geometry))).data.to_dict()
    assert told["pipeline_tag"] == ("text-generation" if geometry in ("text_only", "top2") else "image-text-to-text")
    assert "base_model" not in told  # of no published size


def test_the_hub_reads_the_front_matter(made: Path) -> None:
    told = ModelCard(readme(made)).data.to_dict()
    assert told["license"] == "other"
    assert told["license_name"] == "llama4"
    assert told["license_link"] == "https://www.llama.com/llama4/license/"
    assert told["library_name"] == "transformers"
    assert {"compressed-tensors", "int4"} <= set(told["tags"])


def test_the_licence_that_came_with_the_source_is_linked(meta: Path, tmp_path: Path) -> None:
    source = commands.copy(meta, tmp_path / "source")
    for name in ("LICENSE", "USE_POLICY.md"):
        (source / name).write_text("as Meta wrote it")
    convert(source, tmp_path / "out")
    assert ModelCard(readme(tmp_path / "out")).data.to_dict()["license_link"] == "LICENSE"
    assert "`LICENSE`, `USE_POLICY.md`" in readme(tmp_path / "out")
    assert "without a LICENSE" not in readme(tmp_path / "out")


@pytest.mark.parametrize(
    ("geometry", "variant", "recipe", "base"),
    [
        ("scout", "instruct", None, "meta-llama/Llama-4-Scout-17B-16E-Instruct"),
        ("scout", "base", "int4", "meta-llama/Llama-4-Scout-17B-16E"),
        ("maverick", "instruct", None, "meta-llama/Llama-4-Maverick-17B-128E-Instruct"),
        ("guard", "guard", None, "meta-llama/Llama-Guard-4-12B"),
    ],
)
def test_a_published_model_is_named(geometry: str, variant: str, recipe: str | None, base: str, tmp_path: Path) -> None:
    """From the sizes alone: nothing is converted."""
    synth(tmp_path / "meta", geometry=geometry, sparse=True)
    job = bind(Request(tmp_path / "meta", variant=variant, recipe=recipe)).job
    text = model_card(job, json.loads(job.contents()["config.json"]), job.manifest)
    told = ModelCard(text).data.to_dict()
    assert told["base_model"] == base
    assert told.get("base_model_relation") == ("quantized" if recipe else None)
    assert f"# {base.removeprefix('meta-llama/')}" in text
    if geometry == "scout":
        assert "| parameters | 108.64 B |" in text
        assert "| active for a token of text | 17.17 B |" in text


def test_the_measured_errors_are_on_the_card(meta: Path, tmp_path: Path) -> None:
    told = convert(meta, tmp_path / "out", recipe="mixed").quantization
    text = readme(tmp_path / "out")
    for family, one in told.families.items():
        name = family.replace("_", " ").replace("mlp", "MLP")
        assert f"| {name} | {one.matrices} | {one.relative_mse:.4g} | {one.sqnr_db:.2f} |" in text
    for one in told.worst:
        assert f"| `{one.module}` | {one.relative_mse:.4g} |" in text
    assert "## Quantization" not in readme_of_plain(meta, tmp_path)


def readme_of_plain(meta: Path, tmp_path: Path) -> str:
    convert(meta, tmp_path / "plain")
    return readme(tmp_path / "plain")


def test_the_sources_fingerprints_are_on_the_card(made: Path) -> None:
    for name, digest in json.loads((made / NAME).read_text())["source"]["sha256"].items():
        assert f"| `{name}` | `{digest}` |" in readme(made)


@pytest.mark.parametrize(
    ("recipe", "words", "no"),
    [
        ("int4", "vllm serve MODEL --max-model-len 32768\n", "bitsandbytes"),
        ("nf4", "pip install bitsandbytes", "vllm serve"),
    ],
)
def test_what_loads_it(recipe: str, words: str, no: str, meta: Path, tmp_path: Path) -> None:
    convert(meta, tmp_path / "out", recipe=recipe)
    assert words in readme(tmp_path / "out")
    assert no not in readme(tmp_path / "out")


def test_metas_layout_has_none(made: Path, meta: Path, tmp_path: Path) -> None:
    convert(meta, tmp_path / "hf")
    export(tmp_path / "hf", tmp_path / "back", ranks=1)
    assert not (tmp_path / "back" / "README.md").exists()
    with pytest.raises(UsageError, match="Meta's layout"):
        card(tmp_path / "back")


# -------------------- a source's own card


def test_a_card_of_the_source_is_kept_beside_ours(meta: Path, tmp_path: Path) -> None:
    convert(meta, tmp_path / "hf")
    # Ours, of an earlier conversion, tells of other files: it does not come along.
    convert(tmp_path / "hf", tmp_path / "int4", recipe="int4")
    assert not (tmp_path / "int4" / "README.source.md").exists()
    assert "a Transformers directory" in readme(tmp_path / "int4")
    assert readme(tmp_path / "int4") == card(tmp_path / "int4").card
    # Somebody's does, byte for byte, and so does one that has this name already.
    (tmp_path / "hf" / "README.md").write_bytes(b"---\nlanguage: en\n---\n# Mine\xff")
    (tmp_path / "hf" / "README.source.md").write_text("its own source's")
    convert(tmp_path / "hf", tmp_path / "fp8", recipe="fp8")
    assert (tmp_path / "fp8" / "README.source.source.md").read_bytes() == b"---\nlanguage: en\n---\n# Mine\xff"
    assert (tmp_path / "fp8" / "README.source.md").read_text() == "its own source's"
    assert "# Llama 4, fp8" in readme(tmp_path / "fp8")
    assert verify(tmp_path / "fp8").ok


# -------------------- card --write


@pytest.fixture(scope="module")
def parity(meta: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("parity") / "parity.json"
    file.write_text(json_text(validate(made, reference=meta, tokens=16)))
    return file


def test_what_validate_measured_goes_onto_the_card(
    out: Path, meta: Path, parity: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = commands.digests(out)
    told = json.loads(parity.read_text())
    printed = commands.run(capsys, "card", out, "--validation", parity)
    assert commands.digests(out) == before  # printing changes nothing
    assert "against the source: passed." in printed.out
    assert f"| KL divergence, nats a token | {told['kl_mean']:.4g} |" in printed.out
    written = commands.run(capsys, "card", out, "--validation", parity, "--write", "--json").json
    assert written["status"] == "written"
    assert readme(out) == printed.out
    assert {name for name, digest in commands.digests(out).items() if digest != before[name]} == {"README.md", NAME}
    assert verify(out).ok
    # What is finished stays as it is, and so does the card.
    assert convert(meta, out, recipe="int4").status == "already complete"
    assert readme(out) == printed.out
    assert commands.run(capsys, "card", out, "--validation", parity, "--write", "--json").json["status"] == "unchanged"


def test_a_failed_validation_is_told_as_it_is(out: Path, parity: Path, tmp_path: Path) -> None:
    told = json.loads(parity.read_text()) | {"passed": False, "gates_failed": ["kl_mean"], "kl_mean": None}
    (tmp_path / "failed.json").write_text(json.dumps(told))
    text = card(out, validation=tmp_path / "failed.json").card
    assert "against the source: FAILED (kl_mean)." in text
    assert "| KL divergence, nats a token | not a number |" in text


def test_a_card_that_was_edited_is_not_lost(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = readme(out) + "\nMy own words.\n"
    (out / "README.md").write_text(mine)
    refused = commands.run(capsys, "card", out, "--write")
    assert refused.code == 2
    assert "--adopt" in refused.error
    assert readme(out) == mine
    assert commands.run(capsys, "card", out, "--write", "--adopt").code == 0
    assert readme(out) == mine
    assert verify(out).ok
    (out / "README.md").write_text("something else")
    assert commands.run(capsys, "card", out, "--write", "--overwrite").code == 0
    assert readme(out) == card(out).card
    assert verify(out).ok


def test_a_lost_card_is_made_again(out: Path) -> None:
    before = readme(out)
    (out / "README.md").unlink()
    assert publishing.write_card(out).status == "written"
    assert readme(out) == before


def test_a_kill_between_card_and_manifest_is_made_good_by_the_same_command(
    out: Path, parity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise commands.Stop

    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "write", die)
        with pytest.raises(commands.Stop):
            publishing.write_card(out, validation=parity)
    assert not verify(out).ok
    assert publishing.write_card(out, validation=parity).status == "written"
    assert verify(out).ok


# -------------------- refusals


def test_what_is_no_validation(out: Path, parity: Path, tmp_path: Path) -> None:
    told = json.loads(parity.read_text())
    for damage in ({"passed": 1}, {"gates_failed": ["a|b\n"]}, {"tensors_quantized": {"int4": 3}}, {"runner": None}):
        (tmp_path / "bad.json").write_text(json.dumps(told | damage))
        with pytest.raises(BadInput, match="validate --json"):
            card(out, validation=tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text(json.dumps(told | {"path": "elsewhere"}))
    with pytest.raises(UsageError, match="another directory"):
        card(out, validation=tmp_path / "bad.json")


def test_what_has_no_card(meta: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, words in ((meta, "what `convert` has written"), (tmp_path / "nothing", "is not a directory")):
        outcome = commands.run(capsys, "card", path)
        assert (outcome.code, words in outcome.error) == (2, True)
    with pytest.raises(UsageError, match="no id of a model"):
        card(out, base_model="a b\nlicense: mit")
    body = json.loads((out / NAME).read_text())
    del body["files"][commands.INDEX]
    (out / NAME).write_text(json.dumps(body))
    with pytest.raises(UsageError, match="unfinished"):
        card(out)
    assert commands.run(capsys, "card", out, "--adopt").code == 2
    assert commands.run(capsys, "card", out, "--write", "--adopt", "--overwrite").code == 2


def test_names_from_files_break_neither_tables_nor_front_matter(out: Path) -> None:
    body = json.loads((out / NAME).read_text())
    body["options"]["recipe"]["name"] = "int4` | <b>\n---\nlicense: mit\n---"
    body["source"]["sha256"]["a|b`\n# heading"] = "x\u202ey"
    (out / NAME).write_text(json.dumps(body))
    config = json.loads((out / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": "many | more", "vocab_size": None, "max_position_embeddings": 1.5}
    (out / "config.json").write_text(json.dumps(config))
    text = card(out).card
    assert ModelCard(text).data.to_dict()["license"] == "other"
    assert "\n# heading" not in text
    assert "| layers | - |" in text
    assert text.count("\n---\n") == 1
