"""Wrappers around every name, and a dictionary around the state dict: taken off and said; around some names: refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4_convert import convert
from llama4_convert.checkpoints.wrapped_names import unwrapped
from llama4_convert.errors import BadInput
from mappings import load_table
from tests.support import commands

PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "_fsdp_wrapped_module.",
    "module.module.",
    "_orig_mod.module.",
    "student.llm.",
]


def inside_fsdp(key: str) -> str:
    """As nested FSDP with torch.compile names it."""
    return "_fsdp_wrapped_module." + key.replace(".attention.", "._fsdp_wrapped_module.attention._orig_mod.").replace(
        ".self_attn.", "._checkpoint_wrapped_module.self_attn."
    )


WRAPPERS: dict[str, Callable[[str], str]] = {p: (lambda key, p=p: p + key) for p in PREFIXES}  # type: ignore[misc]
WRAPPERS["FSDP"] = inside_fsdp
WRAPPERS[".default"] = lambda key: key + ".default"


def rename_meta(source: Path, wrap: Callable[[str], str]) -> None:
    for file in source.glob("*.pth"):
        torch.save({wrap(key): tensor for key, tensor in torch.load(file, weights_only=False).items()}, file)


def rename_directory(path: Path, wrap: Callable[[str], str]) -> None:
    for file in path.glob("*.safetensors"):
        save_file({wrap(key): tensor for key, tensor in load_file(file).items()}, file)
    index = path / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    body["weight_map"] = {wrap(key): name for key, name in body["weight_map"].items()}
    index.write_text(json.dumps(body))
    (path / "llama4-convert.json").unlink()


def weights(path: Path) -> dict[str, str]:
    return {name: digest for name, digest in commands.digests(path).items() if name.endswith((".safetensors", ".pth"))}


@pytest.fixture(scope="module")
def converted(meta_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Meta's directory of two ranks, its conversion)."""
    source, target = meta_checkpoint("scout", 2, extra=False).src, tmp_path_factory.mktemp("out") / "hf"
    convert(source, target, shard_size=200_000)
    return source, target


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_ranks(
    wrapper: str, converted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = commands.copy(converted[0], tmp_path / "meta")
    rename_meta(source, WRAPPERS[wrapper])
    outcome = commands.run(capsys, "convert", source, tmp_path / "out", "--shard-size", 200_000)
    assert outcome.code == 0, outcome.err
    assert "taken o" in outcome.err
    assert weights(tmp_path / "out") == weights(converted[1])
    for command in (("inspect", source), ("diff", source, converted[1]), ("fit", source)):
        outcome = commands.run(capsys, *command)
        assert outcome.code == 0, (command, outcome.err)
        assert "taken o" in outcome.err


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_directories(
    wrapper: str, converted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = commands.copy(converted[1], tmp_path / "hf")
    rename_directory(directory, WRAPPERS[wrapper])
    for command in (
        ("export", directory, tmp_path / "back", "--ranks", 2),
        ("inspect", directory),
        ("diff", directory, converted[0]),
        ("validate", directory, "--reference", converted[0], "--tokens", 4),
        ("generate", directory, "--prompt", "x", "--max-new-tokens", 1),
    ):
        outcome = commands.run(capsys, *command)
        assert outcome.code == 0, (command, outcome.err)
        assert "taken o" in outcome.err, command
    assert commands.run(capsys, "export", converted[1], tmp_path / "expected", "--ranks", 2).code == 0
    assert weights(tmp_path / "back") == weights(tmp_path / "expected")


def test_a_wrapper_around_some_keys_is_the_reason(
    converted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = commands.copy(converted[0], tmp_path / "meta")
    rename_meta(source, lambda key: f"module.{key}" if key.startswith("layers.0.") else key)
    outcome = commands.run(capsys, "convert", source, tmp_path / "out")
    assert outcome.code == 3
    assert "keys begin with 'module.'" in outcome.error
    directory = commands.copy(converted[1], tmp_path / "hf")
    rename_directory(directory, lambda key: f"model.{key}" if "lm_head" not in key else key)
    outcome = commands.run(capsys, "inspect", directory)
    assert outcome.code == 3
    assert "keys begin with 'model.'" in outcome.error


@pytest.mark.parametrize("name", ["model", "state_dict", "module", "anything"])
def test_a_dictionary_around_the_state_dict(
    name: str, converted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = commands.copy(converted[0], tmp_path / "meta")
    for file in source.glob("*.pth"):
        around = {name: torch.load(file, weights_only=False), "step": 1000, "optimizer": {"state": {}, "lr": 0.1}}
        torch.save(around, file)
    outcome = commands.run(capsys, "convert", source, tmp_path / "out", "--shard-size", 200_000)
    assert outcome.code == 0, outcome.err
    assert f"under '{name}': that is read, without step, optimizer beside it" in outcome.err
    assert weights(tmp_path / "out") == weights(converted[1])


def test_several_state_dicts_in_one_file_are_refused(
    converted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = commands.copy(converted[0], tmp_path / "meta")
    for file in source.glob("*.pth"):
        state = torch.load(file, weights_only=False)
        torch.save({"model": state, "ema": state}, file)
    outcome = commands.run(capsys, "inspect", source)
    assert outcome.code == 3
    assert "several state dicts (model, ema)" in outcome.error


def test_what_is_a_part_of_a_model_is_no_wrapper() -> None:
    is_known = load_table().transformers_names.fullmatch
    for prefix in ("vision_tower.", "audio_model.", "layers.3."):
        keys = [f"{prefix}model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
        names, notes = unwrapped(keys, is_known, "here")
        assert list(names.values()) == keys
        assert not notes


def test_a_tied_text_model_has_no_wrapper() -> None:
    keys = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert unwrapped(keys, load_table().transformers_names.fullmatch, "here") == ({key: key for key in keys}, [])


def test_two_keys_that_become_one_are_refused() -> None:
    with pytest.raises(BadInput, match="both"):
        unwrapped(["output.weight", "_orig_mod.output.weight"], load_table().meta_names.fullmatch, "here")


ADAPTERS: dict[str, Callable[[str], str]] = {
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "module.": lambda key: f"module.{key}",
    "base_model.model.": lambda key: f"base_model.model.{key}",
    "_orig_mod.": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    ".default.": lambda key: key.replace(".weight", ".default.weight"),
    "another name": lambda key: key.replace(".weight", ".my-adapter.weight"),
    "FSDP": lambda key: f"_fsdp_wrapped_module.{key}",
}


@pytest.mark.parametrize("wrapper", ADAPTERS)
def test_wrapped_adapters(
    wrapper: str, converted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = commands.write_adapter(converted[1], tmp_path / "adapter")
    wrapped = tmp_path / "wrapped"
    shutil.copytree(adapter, wrapped)
    file = wrapped / "adapter_model.safetensors"
    save_file({ADAPTERS[wrapper](key): tensor for key, tensor in load_file(file).items()}, file)
    for path, out in ((adapter, "expected"), (wrapped, "found")):
        outcome = commands.run(capsys, "convert", converted[1], tmp_path / out, "--adapter", path)
        assert outcome.code == 0, outcome.err
    assert ("taken o" in outcome.err) == (wrapper != "no prefix")
    assert weights(tmp_path / "found") == weights(tmp_path / "expected")


def test_two_adapters_in_one_file_are_refused(
    converted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = commands.write_adapter(converted[1], tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        {key.replace(".weight", f".{name}.weight"): t.clone() for key, t in tensors.items() for name in "ab"}, file
    )
    outcome = commands.run(capsys, "convert", converted[1], tmp_path / "out", "--adapter", adapter)
    assert outcome.code == 3
    assert "several adapters (a, b)" in outcome.error
