"""What fresh eyes broke once: each is a test of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama4_convert import convert, export, inspect, synth, verify
from llama4_convert.errors import BadInput, UsageError
from tests.support import commands

Run = Callable[..., commands.Outcome]
MANIFEST = "llama4-convert.json"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: commands.run(capsys, *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """meta: two ranks; hf: converted from it."""
    folder = tmp_path_factory.mktemp("attacks")
    synth(folder / "meta", tiny=True, ranks=2)
    convert(folder / "meta", folder / "hf")
    return folder


def change(path: Path, edit: Callable[[Any], object]) -> None:
    body = json.loads(path.read_text())
    edit(body)
    path.write_text(json.dumps(body))


@pytest.mark.parametrize("name", ["params.json", MANIFEST, "tokenizer.model"])
def test_a_planted_link_is_not_written_through(name: str, made: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{name}.partial").symlink_to("../victim")
    export(made / "hf", tmp_path / "out", ranks=1)
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "out" / name).is_symlink()


def test_a_planted_fifo_does_not_hang(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "config.json.partial")
    assert convert(made / "meta", tmp_path / "out").status == "converted"


def test_original_being_a_link_is_refused(made: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "params.json").write_text("precious")
    target = commands.copy(made / "hf", tmp_path / "out")
    for path in (target / "original").iterdir():
        path.unlink()
    (target / "original").rmdir()
    (target / "original").symlink_to(outside)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="original is a link"):
            convert(made / "meta", target, overwrite=overwrite)
    assert (outside / "params.json").read_text() == "precious"


def test_overwrite_does_not_leave_two_models(made: Path, tmp_path: Path) -> None:
    """Of the other layout: an output of ours is replaced, a stranger's refused before anything is removed."""
    target = tmp_path / "out"
    export(made / "hf", target, ranks=2)
    convert(made / "meta", target, overwrite=True)
    assert inspect(target).layout == "transformers"
    assert not list(target.glob("*.pth"))
    export(made / "meta", target, ranks=1, overwrite=True)
    assert inspect(target).layout == "meta"
    assert not list(target.glob("*.safetensors*"))

    theirs = commands.copy(made / "meta", tmp_path / "theirs")
    before = commands.digests(theirs)
    with pytest.raises(UsageError, match="in the other layout"):
        convert(made / "meta", theirs, overwrite=True)
    assert commands.digests(theirs) == before
    downloaded = commands.copy(made / "hf", tmp_path / "downloaded")
    (downloaded / MANIFEST).unlink()
    with pytest.raises(UsageError, match="in the other layout"):
        export(made / "meta", downloaded, overwrite=True)
    assert inspect(downloaded).layout == "transformers"


@pytest.mark.parametrize("ranks", [0, -1, True, 129, "8", None])
def test_a_recorded_number_of_ranks_that_is_none(ranks: Any, made: Path, tmp_path: Path) -> None:
    source = commands.copy(made / "hf", tmp_path / "hf")
    change(source / MANIFEST, lambda b: b["source"].update(ranks=ranks))
    with pytest.raises(BadInput, match=r"is damaged \(a source of"):
        export(source, tmp_path / "out")


EDITS: dict[str, Callable[[Any], object]] = {
    "keys are a number": lambda b: b.update(meta_keys=5),
    "keys are null": lambda b: b.update(meta_keys=None),
    "keys are lists": lambda b: b.update(meta_keys=[[]]),
    "dropped is a list": lambda b: b.update(dropped=[1]),
    "an option is an object": lambda b: b["options"].update(dtype={}),
    "the recipe has no name": lambda b: b["options"].update(recipe={}),
    "the recipe is a number": lambda b: b["options"].update(recipe=3),
    "the tool is a list": lambda b: b.update(tool=[]),
    "counts are no pairs": lambda b: next(iter(b["files"].values())).update(nonfinite={"a": [1]}),
    "counts are a list": lambda b: next(iter(b["files"].values())).update(nonfinite=[1]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_manifests_of_the_wrong_types(edit: str, made: Path, tmp_path: Path, run: Run) -> None:
    source = commands.copy(made / "hf", tmp_path / "hf")
    change(source / MANIFEST, EDITS[edit])
    for arguments in (("export", source, tmp_path / "out"), ("convert", made / "meta", source), ("inspect", source)):
        outcome = run(*arguments)
        assert outcome.code == 3
        assert "llama4-convert.json is damaged" in outcome.error


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "original/params.json"])
def test_small_files_that_decide_are_checked_too(name: str, made: Path, tmp_path: Path, run: Run) -> None:
    source = commands.copy(made / "hf", tmp_path / "hf")
    path = source / name
    path.write_bytes(path.read_bytes() + b" ")
    outcome = run("export", source, tmp_path / "out")
    assert outcome.code == 3
    assert f"{path.name} is damaged" in outcome.error
    assert not (tmp_path / "out" / "params.json").exists()


def test_a_source_that_changed_under_the_same_size_is_another(made: Path, tmp_path: Path) -> None:
    source = commands.copy(made / "hf", tmp_path / "hf")
    (source / MANIFEST).unlink()
    export(source, tmp_path / "out", ranks=2)
    (path,) = source.glob("*.safetensors")
    commands.flip(path, path.stat().st_size - 100)
    with pytest.raises(UsageError, match="another source"):
        export(source, tmp_path / "out", ranks=2)


@pytest.mark.parametrize("rank", ["Infinity", "1e999", "-1", "1.5", "null"])
def test_ranks_of_tokens_that_are_no_numbers(rank: str, made: Path, tmp_path: Path, run: Run) -> None:
    source = commands.copy(made / "hf", tmp_path / "hf")
    (source / MANIFEST).unlink()
    text = (source / "tokenizer.json").read_text()
    assert '"!":33,' in text
    (source / "tokenizer.json").write_text(text.replace('"!":33,', f'"!":{rank},'))
    assert run("export", source, tmp_path / "out").code == 3


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_broken_tokenizer_model_is_not_handed_on(content: bytes, made: Path, tmp_path: Path) -> None:
    source = commands.copy(made / "hf", tmp_path / "hf")
    (source / "tokenizer.model").write_bytes(content)
    with pytest.raises(BadInput, match=r"tokenizer\.model"):
        export(source, tmp_path / "out")


def test_replicated_nan_are_counted_once(made: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = commands.copy(made / "hf", tmp_path / "hf")
    (source / MANIFEST).unlink()
    (path,) = source.glob("*.safetensors")
    content = load_file(path)
    key = next(key for key in content if key.endswith("model.norm.weight"))
    content[key][0] = torch.nan
    save_file(content, path, metadata={"format": "pt"})
    told = export(source, tmp_path / "out", ranks=4).nonfinite
    assert [(one.tensor, one.nan) for one in told] == [("norm.weight", 1)]
    for stats in (False, True):
        assert [one.nan for one in inspect(tmp_path / "out", stats=stats).nonfinite] == [1]


def test_ids_from_inside_the_folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = commands.copy(made / "meta", tmp_path / "original")
    digests = commands.digests(source)
    ids = tmp_path / "ids"
    ids.write_text("\ufeff" + "".join(f"{digest.upper()}  original/{name}\r\n" for name, digest in digests.items()))
    monkeypatch.chdir(source)
    assert verify(".", ids="../ids").ok
    (source / "consolidated.02.pth").write_bytes((source / "consolidated.01.pth").read_bytes())
    bad = {one.file: one.note for one in verify(source, ids=ids).files if not one.ok}
    assert bad == {"consolidated.02.pth": "the list does not name it"}


def test_ids_that_contradict_each_other(made: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    ids.write_text(f"{'0' * 64}  params.json\n{'1' * 64}  params.json\n")
    with pytest.raises(BadInput, match="two different ids"):
        verify(made / "meta", ids=ids)
    ids.write_text(f"{'0' * 64}  {'a/' * 3000}x\n")
    with pytest.raises(BadInput, match="is no path"):
        verify(made / "meta", ids=ids)


def test_odd_entries_beside_a_download(made: Path, tmp_path: Path) -> None:
    source = commands.copy(made / "meta", tmp_path / "meta")
    folder = source / ".cache" / "huggingface" / "download"
    (folder / "sub.metadata").mkdir(parents=True)
    os.mkfifo(folder / "p.metadata")
    assert verify(source).ok
    (folder / "params.json.metadata").write_text("garbled")
    with pytest.raises(BadInput, match=r"params\.json\.metadata is damaged"):
        verify(source)


@pytest.mark.parametrize(
    "arguments",
    [["export"], ["export", "a", "b", "--ranks", "0"], ["export", "a", "b", "--max-memory", "-5"], ["nosuch"]],
)
def test_usage_errors_are_one_line(arguments: list[str], run: Run) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert "--help says more)" in outcome.error


@pytest.mark.parametrize("name", ["params.json", "consolidated.00.pth", "model-00009.safetensors", "x.partial"])
def test_a_directory_in_the_way_is_named_before_anything_is_removed(name: str, made: Path, tmp_path: Path) -> None:
    target = commands.copy(made / "hf", tmp_path / "out")
    (target / name).mkdir()
    before = commands.digests(target)
    with pytest.raises(UsageError, match="is a directory, where a file will be"):
        convert(made / "meta", target, overwrite=True)
    assert commands.digests(target) == before


def test_another_kind_of_model(made: Path, tmp_path: Path) -> None:
    source = commands.copy(made / "hf", tmp_path / "hf")
    change(source / "config.json", lambda b: b.update(model_type="bert"))
    with pytest.raises(BadInput, match="this is no Llama 4"):
        export(source, tmp_path / "out")


def test_into_the_sources_original(made: Path, tmp_path: Path) -> None:
    source = commands.copy(made / "hf", tmp_path / "hf")
    with pytest.raises(UsageError, match="would overwrite the source"):
        export(source, source / "original", overwrite=True)
    assert verify(source).ok


def test_a_link_to_nothing(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(UsageError, match="is a link to nothing"):
        export(made / "hf", tmp_path / "out")


def test_the_folder_around_original(made: Path, tmp_path: Path, run: Run) -> None:
    commands.copy(made / "meta", tmp_path / "Scout" / "original")
    for command in (["plan"], ["inspect"], ["verify"], ["export", "-"]):
        more = [tmp_path / "out"] if "export" in command else []
        outcome = run(command[0], tmp_path / "Scout", *more)
        assert outcome.code in (2, 3)
        assert f"did you mean {tmp_path / 'Scout' / 'original'}?" in outcome.error


def test_an_unfinished_export_says_so(made: Path, tmp_path: Path, run: Run) -> None:
    export(made / "hf", tmp_path / "out", ranks=2)
    (tmp_path / "out" / "params.json").unlink()
    assert "unfinished export: run its command again" in run("inspect", tmp_path / "out").error
    (tmp_path / "out" / "consolidated.00.pth").unlink()
    (tmp_path / "out" / "consolidated.01.pth").unlink()
    assert "unfinished output of this tool" in run("inspect", tmp_path / "out").error


def test_verify_says_what_it_held_files_against(made: Path, tmp_path: Path, run: Run) -> None:
    """And an output against its manifest whatever list there is."""
    out = commands.copy(made / "hf", tmp_path / "hf")
    ids = tmp_path / "ids"
    ids.write_text(f"{commands.digests(out)['config.json']}  config.json\n")
    told = run("verify", out, "--ids", ids)
    assert told.code == 0
    assert "1 file as the SHA-256 in llama4-convert.json says and the published ids say" in told.out
    (out / "original" / "params.json").write_text("{}")
    damaged = run("verify", out, "--ids", ids)
    assert damaged.code == 5
    assert "DAMAGED  original/params.json" in damaged.out
    (out / "original" / "params.json").unlink()
    assert "MISSING  original/params.json" in run("verify", out).out
    assert "2 files as the MD5 in checklist.chk says and the CRCs inside say" in run("verify", made / "meta").out


def test_what_is_dropped_is_said(made: Path, tmp_path: Path, run: Run) -> None:
    for command in ("convert", "export"):
        assert "dropped  " in run(command, made / "meta", tmp_path / command).out
