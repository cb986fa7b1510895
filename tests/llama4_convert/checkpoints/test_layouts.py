"""What a path is that somebody gives: every command says the same, what it found and what to do, in one line."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4_convert import convert, export
from llama4_convert.checkpoints.layouts import is_meta
from llama4_convert.errors import BadInput, UsageError
from tests.support import commands

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 27180000000\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


@pytest.fixture(scope="module")
def scout(meta_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Meta's directory of two ranks, its conversion in several shards without our manifest)."""
    source = meta_checkpoint("scout", 2).src
    target = tmp_path_factory.mktemp("scout") / "hf"
    convert(source, target, shard_size=200_000)
    (target / "llama4-convert.json").unlink()
    return source, target


@pytest.fixture
def meta(scout: tuple[Path, Path], tmp_path: Path) -> Path:
    return commands.copy(scout[0], tmp_path / "meta")


@pytest.fixture
def shards(scout: tuple[Path, Path], tmp_path: Path) -> Path:
    return commands.copy(scout[1], tmp_path / "hf")


def every_command(path: Path, out: Path, good: Path) -> Iterator[tuple[object, ...]]:
    """The commands that read a checkpoint, each with `path` where one is wanted."""
    yield "inspect", path
    yield "plan", path
    yield "convert", path, out
    yield "export", path, out
    yield "explain", path, "lm_head.weight"
    yield "fit", path
    yield "diff", path, good
    yield "diff", good, path
    yield "validate", path, "--reference", good
    yield "validate", good, "--reference", path
    yield "generate", path, "--prompt", "x"
    yield "verify", path
    yield "card", path
    yield "push", path, "owner/name", "--dry-run"
    yield "convert", good, out, "--adapter", path
    yield "convert", good, out, "--config-from", path


def refusals(capsys: pytest.CaptureFixture[str], path: Path, out: Path, good: Path) -> dict[str, str]:
    """Command -> its one line about `path`, which is no checkpoint."""
    found = {}
    for command in every_command(path, out, good):
        outcome = commands.run(capsys, *command)
        assert outcome.code in (2, 3), (command, outcome.err)
        assert not commands.loads_as_a_model(out)
        found[" ".join(map(str, command))] = outcome.error
    return found


def fill(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x")
    return path


FOREIGN = {
    "DeepSpeed": ["global_step100/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest", "zero_to_fp32.py"],
    "FSDP": ["pytorch_model_fsdp_0/__0_0.distcp", "trainer_state.json"],
    "torch.distributed.checkpoint": [".metadata", "__0_0.distcp", "__1_0.distcp"],
    "Megatron": ["latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt"],
    "pytorch_model": ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "config.json"],
    "GGUF": ["scout-Q4_K_M.gguf"],
    "torchtune": ["hf_model_0001_0.pt", "config.json"],
    "another framework": ["flax_model.msgpack", "config.json"],
    "archive": ["scout.tar.gz"],
    "consolidated.00.pth, consolidated.01.pth": ["consolidated.00.pt", "params.json"],
    "an adapter alone": ["adapter_config.json", "adapter_model.safetensors"],
    "is empty": [],
    "download has not ended": [
        ".cache/huggingface/download/model-00001-of-00050.safetensors.incomplete",
        "config.json",
    ],
    "and no weights": ["config.json", "tokenizer.json"],
    "no consolidated.NN.pth": ["params.json", "tokenizer.model"],
    "holds no checkpoint": ["notes.txt"],
}


@pytest.mark.parametrize("said", FOREIGN)
def test_another_directory(said: str, tmp_path: Path) -> None:
    path = fill(tmp_path / "given", *FOREIGN[said])
    path.mkdir(exist_ok=True)
    with pytest.raises(BadInput, match=said) as caught:
        is_meta(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", ["DeepSpeed", "GGUF", "pytorch_model", "is empty"])
def test_every_command_says_it(
    said: str, scout: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fill(tmp_path / "given", *FOREIGN[said])
    path.mkdir(exist_ok=True)
    for command, line in refusals(capsys, path, tmp_path / "out", scout[1]).items():
        if "--adapter" in command:
            assert "adapter_config.json" in line
        elif "--config-from" not in command or said != "pytorch_model":  # whose config.json is enough there
            assert said in line, command
        assert "unfinished" not in line
        assert "download" not in line


def test_a_base_for_a_text_model_that_is_none(scout: tuple[Path, Path], tmp_path: Path) -> None:
    convert(scout[0], tmp_path / "text", text_only=True)
    with pytest.raises(BadInput, match="DeepSpeed"):
        convert(tmp_path / "text", tmp_path / "out", vision_from=fill(tmp_path / "given", *FOREIGN["DeepSpeed"]))


def test_a_path_that_leads_nowhere(
    scout: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scout-original").mkdir()
    monkeypatch.chdir(tmp_path)
    for path, said in {
        "meta-llama/Llama-4-Scout-17B-16E": "hf download meta-llama/Llama-4-Scout-17B-16E",
        "https://huggingface.co/meta-llama/Llama-4-Scout-17B-16E": "is an address",
        "scout-orignal": "did you mean scout-original?",
        str(tmp_path / "elsewhere" / "x"): "nothing of this name",
    }.items():
        for command, line in refusals(capsys, Path(path), tmp_path / "out", scout[1]).items():
            assert said in line.replace("https:/h", "https://h"), command


def test_a_file_in_place_of_a_directory(scout: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give its directory"):
        is_meta(scout[0] / "consolidated.00.pth")
    with pytest.raises(UsageError, match="give its directory"):
        is_meta(scout[1] / "config.json")
    pointer = tmp_path / "scout.pth"
    pointer.write_bytes(LFS)
    with pytest.raises(UsageError, match=r"Git LFS pointer.*git lfs pull"):
        is_meta(pointer)
    (tmp_path / "scout.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(UsageError, match=r"llama\.cpp"):
        is_meta(tmp_path / "scout.gguf")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match="link to nothing"):
        is_meta(tmp_path / "link")


def test_a_parent_or_a_child_of_the_right_directory(meta: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"did you mean {meta}\?"):
        is_meta(tmp_path)
    cache = tmp_path / "hub" / "models--meta-llama--Llama-4-Scout" / "snapshots" / ("0" * 40) / "original"
    cache.parent.mkdir(parents=True)
    meta.rename(cache)
    fill(tmp_path / "hub" / "models--a--b" / "snapshots" / "1", "model.safetensors")
    with pytest.raises(BadInput, match=f"did you mean {cache} or"):
        is_meta(tmp_path)
    (cache / "inner").mkdir()
    fill(cache / "inner", "notes.txt")
    with pytest.raises(BadInput, match=rf"did you mean {cache}\?"):
        is_meta(cache / "inner")


def test_two_sets_of_weights(meta: Path, shards: Path) -> None:
    for file in shards.iterdir():
        if file.is_file():
            shutil.copy(file, meta / file.name)
    with pytest.raises(BadInput, match="two sets of weights"):
        is_meta(meta)


def test_one_file_beside_an_index_that_names_others(
    shards: Path, tmp_path: Path, scout: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"lm_head.weight": torch.zeros(2, 2)}, shards / "model.safetensors")
    for command in ("inspect", "fit"):
        outcome = commands.run(capsys, command, shards)
        assert outcome.code == 3
        assert "two sets of weights: Transformers takes model.safetensors, vLLM" in outcome.error


def test_shards_of_another_set_beside_the_index_are_named(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x": torch.zeros(2)}, shards / "model-00001-of-00099.safetensors")
    for command in ("inspect", "fit"):
        outcome = commands.run(capsys, command, shards)
        assert outcome.code == 0
        assert "warning: model-00001-of-00099.safetensors of hf is not read" in outcome.err


def test_shards_without_an_index_are_read_if_they_are_all(
    shards: Path, scout: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "model.safetensors.index.json").unlink()
    good = scout[1]
    for command in (
        ("inspect", shards),
        ("fit", shards),
        ("diff", shards, good),
        ("diff", good, shards),
        ("generate", shards, "--prompt", "x", "--max-new-tokens", "1"),
        ("export", shards, tmp_path / "back"),
        ("convert", shards, tmp_path / "fp8", "--recipe", "fp8"),
        ("validate", shards, "--reference", good, "--tokens", "4"),
    ):
        outcome = commands.run(capsys, *command)
        assert outcome.code == 0, (command, outcome.err)
        assert "hf has no model.safetensors.index.json: its" in outcome.err, command
    export(good, tmp_path / "expected")
    assert (
        commands.digests(tmp_path / "back")["consolidated.00.pth"]
        == (commands.digests(tmp_path / "expected")["consolidated.00.pth"])
    )


def test_shards_without_an_index_that_may_not_be_all(
    shards: Path, tmp_path: Path, scout: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "model.safetensors.index.json").unlink()
    files = sorted(shards.glob("*.safetensors"))

    def refused(said: str) -> None:
        for command in (
            ("inspect", shards),
            ("fit", shards),
            ("diff", scout[1], shards),
            ("export", shards, tmp_path / "o"),
        ):
            outcome = commands.run(capsys, *command)
            assert outcome.code == 3, (command, outcome.out)
            assert said in outcome.error

    fill(shards, ".cache/huggingface/download/x.incomplete")
    refused("has not ended")
    shutil.rmtree(shards / ".cache")
    fill(shards, f"{files[0].name}.partial")
    refused("has not ended")
    (shards / f"{files[0].name}.partial").unlink()
    last = files[-1].read_bytes()
    files[-1].unlink()
    refused(f"{files[-1].name} is missing")
    files[-1].write_bytes(last)
    fill(shards, "model-00001-of-00099.safetensors")
    refused("keep one set")
    (shards / "model-00001-of-00099.safetensors").unlink()
    tensors = load_file(files[0])
    dropped = sorted(tensors)[0]
    save_file({key: tensor for key, tensor in tensors.items() if key != dropped}, files[0])
    refused("missing")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LFS, "Git LFS pointer: the file itself was not fetched: run `git lfs pull`"),
        (HTML, "HTML page"),
        (b"GGUF\3\0\0\0" + bytes(50), "GGUF"),
        (b"Entry not found", "server's error message"),
        (b"\x1f\x8b\x08\0" + bytes(50), "compressed file"),
        (bytes(5000), "zeros"),
        (b"../../blobs/" + b"ab" * 20, "link that was copied as text"),
    ],
)
def test_files_that_are_something_else(
    content: bytes, said: str, meta: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, name in (
        (meta, "consolidated.01.pth"),
        (meta, "params.json"),
        (meta, "tokenizer.model"),
        (shards, "config.json"),
        (shards, "model.safetensors.index.json"),
        (shards, sorted(shards.glob("*.safetensors"))[1].name),
    ):
        original = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(content)
        command = ("convert", folder, tmp_path / "out", *(("--recipe", "int4-experts") if folder == shards else ()))
        outcome = commands.run(capsys, *command)
        assert outcome.code == 3, (name, outcome.err)
        assert name in outcome.error
        assert said in outcome.error
        if original is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(original)


def test_files_of_torch_before_1_6_are_good_files_to_be_saved_again(
    meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = meta / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=False)
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    outcome = commands.run(capsys, "inspect", meta)
    assert outcome.code == 3
    assert "file of torch before 1.6" in outcome.error
    assert "torch.save" in outcome.error
    file.write_bytes(pickle.dumps({"a": 1}))
    assert "bare pickle" in commands.run(capsys, "inspect", meta).error
    save_file({"a": torch.zeros(1)}, file)
    assert "a safetensors file" in commands.run(capsys, "inspect", meta).error


def test_a_zip_in_place_of_safetensors(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer)
    sorted(shards.glob("*.safetensors"))[0].write_bytes(buffer.getvalue())
    outcome = commands.run(capsys, "inspect", shards)
    assert outcome.code == 3
    assert "torch zip" in outcome.error


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("geometry", ["scout", "mav", "dense"])
def test_ranks_that_are_missing_at_the_end_are_named(
    geometry: str, ranks: int, meta_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        source = commands.copy(meta_checkpoint(geometry, ranks).src, tmp_path / "meta")
    except (ValueError, AssertionError, KeyError):
        pytest.skip("this geometry has not so many heads")
    whole = commands.copy(source, tmp_path / "whole")
    for left in range(ranks - 1, 0, -1):
        (source / f"consolidated.{left:02d}.pth").unlink()
        for command in every_command(source, tmp_path / "out", whole):
            if command[0] in ("card", "push", "verify") or "--adapter" in command or "--vision-from" in command:
                continue
            if "--config-from" in command:
                continue
            outcome = commands.run(capsys, *command)
            assert outcome.code == 3, (command, outcome.out, outcome.err)
            assert f"lacks consolidated.{left:02d}.pth" in outcome.error, command
        outcome = commands.run(capsys, "verify", source)
        assert outcome.code == 5
        assert f"consolidated.{left:02d}.pth" in outcome.error


def test_ranks_of_another_checkpoint_at_the_end_are_named(
    meta_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = commands.copy(meta_checkpoint("scout", 2).src, tmp_path / "meta")
    shutil.copy(source / "consolidated.01.pth", source / "consolidated.02.pth")
    outcome = commands.run(capsys, "inspect", source)
    assert outcome.code == 3
    assert "consolidated.02.pth is none of its files" in outcome.error


def test_only_a_manifest_of_ours_speaks_of_our_commands(
    scout: tuple[Path, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = tmp_path / "ours"
    convert(scout[0], ours, shard_size=200_000)
    for folder, again in ((ours, "convert again"), (shards, "fetch it again")):
        name = sorted(folder.glob("*.safetensors"))[0].name
        (folder / name).unlink()
        outcome = commands.run(capsys, "inspect", folder)
        assert outcome.code == 3
        assert name in outcome.error
        assert again in outcome.error
    (ours / "model.safetensors.index.json").unlink()
    manifest = json.loads((ours / "llama4-convert.json").read_text())
    del manifest["files"]["model.safetensors.index.json"]
    (ours / "llama4-convert.json").write_text(json.dumps(manifest))
    assert "unfinished output of this tool" in commands.run(capsys, "inspect", ours).error
    (shards / "model.safetensors.index.json").unlink()
    assert "unfinished" not in commands.run(capsys, "inspect", shards).error
