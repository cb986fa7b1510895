"""A source that is damaged, incomplete or contradicts itself: exit 3, one line that names it, nothing that loads."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_convert import convert
from llama4_convert.errors import BadInput
from tests.support import commands

RANK_1 = "consolidated.01.pth"


@pytest.fixture
def source(meta_checkpoint: Callable[..., Any], tmp_path: Path) -> Path:
    """A Scout of two ranks, to be damaged."""
    return commands.copy(meta_checkpoint("scout", 2).src, tmp_path / "source")


@pytest.fixture
def refusal(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Converts `source`, asserts that it is refused as bad input and leaves no model; returns the message."""

    def convert_it(*options: object) -> str:
        outcome = commands.run(capsys, "convert", source, tmp_path / "out", *options)
        assert outcome.code == 3, outcome.err
        assert outcome.out == ""
        assert not commands.loads_as_a_model(tmp_path / "out")
        return outcome.error

    return convert_it


def change_rank(source: Path, change: Callable[[dict[str, Any]], object], rank: int = 1) -> None:
    path = source / f"consolidated.{rank:02d}.pth"
    tensors = torch.load(path, weights_only=False)
    change(tensors)
    torch.save(tensors, path)


# -------------------- files


def test_a_missing_shard_between_others(source: Path, refusal: Callable[..., str]) -> None:
    (source / "consolidated.00.pth").unlink()
    assert "lacks consolidated.00.pth: fetch it" in refusal()


def test_a_missing_last_shard_is_seen_in_the_shapes(source: Path, refusal: Callable[..., str]) -> None:
    (source / RANK_1).unlink()
    assert "lacks consolidated.01.pth: its tensors are cut for 2 ranks" in refusal()


def test_no_shard_at_all(source: Path, refusal: Callable[..., str]) -> None:
    for file in source.glob("*.pth"):
        file.unlink()
    assert "no consolidated.NN.pth" in refusal()
    (source / "model.safetensors").touch()
    assert "no config.json" in refusal()


@pytest.mark.parametrize("kept", [0, 1, 21, 1000, -1, -22, -5000])
def test_a_truncated_shard(source: Path, refusal: Callable[..., str], kept: int) -> None:
    size = (source / RANK_1).stat().st_size
    os.truncate(source / RANK_1, kept % size)
    message = refusal()
    assert RANK_1 in message
    assert "fetch it again" in message


@pytest.mark.parametrize("name", ["params.json", "tokenizer.model", RANK_1])
def test_a_link_to_nothing(source: Path, refusal: Callable[..., str], name: str) -> None:
    (source / name).unlink()
    (source / name).symlink_to("gone")
    assert f"{name} is no file, or a link to nothing" in refusal()


def test_a_directory_in_place_of_a_shard(source: Path, refusal: Callable[..., str]) -> None:
    (source / RANK_1).unlink()
    (source / RANK_1).mkdir()
    assert f"{RANK_1} is no file" in refusal()


# -------------------- a flipped byte


@pytest.mark.parametrize(
    "key",
    [
        "layers.0.attention.wqkv.weight",  # streamed
        "layers.1.attention.wo.weight",  # gathered from all ranks
        "layers.2.feed_forward.router_DE",  # a copy of rank 0's, not written from here
        "norm.weight",
        "layers.0.feed_forward.expert_activation_DE",  # dropped
    ],
)
def test_in_a_tensor(source: Path, refusal: Callable[..., str], key: str) -> None:
    names = list(torch.load(source / RANK_1, weights_only=False))
    storages = [n for n in names if isinstance(torch.load(source / RANK_1, weights_only=False)[n], torch.Tensor)]
    record = f"/data/{storages.index(key)}"
    commands.flip(source / RANK_1, commands.data_offset(source / RANK_1, record) + 5)
    message = refusal()
    assert RANK_1 in message
    assert key in message
    assert "damaged" in message


@pytest.mark.parametrize("record", ["/data.pkl", "/version", "/byteorder", "/serialization_id"])
def test_in_torchs_own_records(source: Path, refusal: Callable[..., str], record: str) -> None:
    commands.flip(source / RANK_1, commands.data_offset(source / RANK_1, record))
    assert RANK_1 in refusal()


def test_in_the_archives_directory(source: Path, tmp_path: Path) -> None:
    """Refused, or a byte that carries no meaning (a date, say): then the output is the right one. Never anything else."""
    convert(source, tmp_path / "right")
    right = commands.digests(tmp_path / "right")
    path = source / RANK_1
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    chosen = random.Random(0)
    refused = 0
    for turn in range(60):
        at = chosen.randrange(start, path.stat().st_size) if turn else path.stat().st_size - 22
        commands.flip(path, at)
        try:
            convert(source, tmp_path / f"{turn}")
        except BadInput:
            refused += 1
            assert not (tmp_path / f"{turn}").exists()
        else:
            found = commands.digests(tmp_path / f"{turn}")
            assert {n for n in right if found[n] != right[n]} <= {"llama4-convert.json", "README.md"}
        commands.flip(path, at)
    assert refused > 10


# -------------------- params.json


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ('{"dim": 128', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "no JSON object"),
        ("\ud800".encode("utf-8", "surrogatepass"), "not valid JSON"),
        ('{"dim": 1' + "0" * 5000 + "}", "not valid JSON"),
        ("{}", "dim is missing"),
    ],
)
def test_params_that_are_no_params(source: Path, refusal: Callable[..., str], text: str | bytes, words: str) -> None:
    (source / "params.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal()
    assert "params.json" in message
    assert words in message


@pytest.mark.parametrize("value", [10**12, 10**18, 10**400, 1e300, 1e-300, -1, float("nan"), float("inf"), "4", True])
@pytest.mark.parametrize(
    "field", ["n_layers", "dim", "n_heads", "vision_args__n_layers", "ffn_dim_multiplier", "vision_args__mlp_ratio"]
)
def test_absurd_numbers_end_in_a_message(source: Path, refusal: Callable[..., str], field: str, value: Any) -> None:
    commands.change_params(source, **{field: value})
    assert "params.json" in refusal()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"dim": 256, "head_dim": 16}, "has shape"),
        ({"n_layers": 6}, "missing key layers.5."),
        ({"n_layers": 4}, "unknown key layers.4."),
        ({"vocab_size": 2320}, "tok_embeddings.weight"),
        ({"n_kv_heads": 4}, "wqkv.weight"),
        ({"moe_args": None}, "unknown key layers.0.feed_forward"),
        ({"moe_args__num_experts": 8}, "layers.0.feed_forward"),
        ({"moe_args__interleave_moe_layer_step": 2}, "layers.0.feed_forward"),
        ({"moe_args__num_experts": -1, "moe_args__top_k": 9}, "top_k"),
        ({"ffn_dim_multiplier": 2.0}, "feed_forward"),
        ({"vision_args": None}, "unknown key vision_"),
        ({"vision_args__n_layers": 3}, "missing key vision_"),
        ({"vision_args__output_dim": 64}, "vision"),
        ({"head_dim": 16}, "head_dim"),
    ],
    ids=str,
)
def test_params_that_contradict_the_tensors(
    source: Path, refusal: Callable[..., str], change: dict[str, Any], key: str
) -> None:
    commands.change_params(source, **change)
    assert key in refusal()


# -------------------- tensors


def test_an_unknown_key_is_named_with_its_neighbour(source: Path, refusal: Callable[..., str]) -> None:
    for rank in (0, 1):
        change_rank(source, lambda t: t.update({"layers.0.attention.wo.wieght": torch.zeros(2)}), rank)
    message = refusal()
    assert "unknown key layers.0.attention.wo.wieght" in message
    assert "nearest known key is layers.0.attention.wo.weight" in message


def test_a_missing_key(source: Path, refusal: Callable[..., str]) -> None:
    for rank in (0, 1):
        change_rank(source, lambda t: t.pop("norm.weight"), rank)
    assert "missing key norm.weight" in refusal()


def test_ranks_that_disagree_on_a_key(source: Path, refusal: Callable[..., str]) -> None:
    change_rank(source, lambda t: t.pop("norm.weight"))
    assert "consolidated.00.pth has norm.weight, consolidated.01.pth has not" in refusal()


def test_ranks_that_disagree_on_a_shape(source: Path, refusal: Callable[..., str]) -> None:
    change_rank(source, lambda t: t.update({"norm.weight": torch.ones(64, dtype=torch.bfloat16)}))
    assert "norm.weight in consolidated.01.pth has shape [64]" in refusal()


def test_ranks_that_disagree_on_a_dtype(source: Path, refusal: Callable[..., str]) -> None:
    change_rank(source, lambda t: t.update({"norm.weight": t["norm.weight"].float()}))
    assert "norm.weight is BF16 in consolidated.00.pth and F32 in consolidated.01.pth" in refusal()


def test_a_dtype_that_is_no_float(source: Path, refusal: Callable[..., str]) -> None:
    for rank in (0, 1):
        change_rank(source, lambda t: t.update({"norm.weight": t["norm.weight"].to(torch.int8)}), rank)
    assert "norm.weight is I8" in refusal()


@pytest.mark.parametrize("stored", ["whole", "as a view"])
def test_ranks_that_disagree_on_a_replicated_value(
    source: Path,
    refusal: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stored: str,
) -> None:
    """However they store it; only a whole record's CRC tells without reading."""
    key = "layers.1.feed_forward.router_DE"

    def disagree(tensors: dict[str, Any]) -> None:
        other = tensors[key].clone()
        other[-1, -1] += 1
        tensors[key] = other if stored == "whole" else torch.cat([other, other])[: len(other)]

    change_rank(source, disagree)
    message = refusal()
    assert f"the ranks disagree: {key} differs between consolidated.00.pth and consolidated.01.pth" in message
    assert "--allow-rank-mismatch" in message

    outcome = commands.run(capsys, "convert", source, tmp_path / "out", "--allow-rank-mismatch")
    assert outcome.code == 0
    if stored == "whole":
        assert f"warning: {key} differs" in outcome.err
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model-00001-of-00001.safetensors", "pt") as file:
        found = file.get_tensor("language_model.model.layers.1.feed_forward.router.weight")
    assert torch.equal(found.T, torch.load(source / "consolidated.00.pth", weights_only=False)[key])


def test_copies_that_differ_only_in_how_they_are_stored_agree(source: Path, tmp_path: Path) -> None:
    key = "layers.1.feed_forward.router_DE"
    convert(source, tmp_path / "whole")
    change_rank(source, lambda t: t.update({key: t[key].T.contiguous().T}))
    convert(source, tmp_path / "strided")
    whole, strided = commands.digests(tmp_path / "whole"), commands.digests(tmp_path / "strided")
    assert {n for n in whole if whole[n] != strided[n]} == {"llama4-convert.json", "README.md"}


class _Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def test_a_hostile_pickle_is_named_and_not_executed(
    source: Path, refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(source / RANK_1, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"norm.weight": _Hostile()}, protocol=2))
    message = refusal()
    assert RANK_1 in message
    assert "system" in message
    assert "nothing was executed" in message
    assert not (tmp_path / "executed").exists()


def test_a_hostile_name_cannot_write_to_the_terminal(source: Path, refusal: Callable[..., str]) -> None:
    for rank in (0, 1):
        change_rank(source, lambda t: t.update({"\x1b[2J\nerror: " + "x" * 5000: torch.zeros(1)}), rank)
    message = refusal()
    assert "\x1b" not in message
    assert len(message) < 2100


# -------------------- tokenizer.model


@pytest.mark.parametrize("content", [b"", b"not a tokenizer", b"AA== 0\nAA== 1\n"])
def test_a_damaged_tokenizer(source: Path, refusal: Callable[..., str], content: bytes) -> None:
    (source / "tokenizer.model").write_bytes(content)
    assert "tokenizer.model" in refusal()


def test_damage_leaves_the_finished_files_and_the_repaired_source_goes_on(
    source: Path, refusal: Callable[..., str], tmp_path: Path
) -> None:
    """The third gigabyte of a download is bad: fetching that file again is all that is needed."""
    with zipfile.ZipFile(source / RANK_1) as archive:
        largest = max(archive.infolist(), key=lambda e: e.file_size).filename
    at = commands.data_offset(source / RANK_1, largest) + 9
    commands.flip(source / RANK_1, at)
    refusal("--shard-size", "100kB")
    commands.flip(source / RANK_1, at)
    result = convert(source, tmp_path / "out", shard_size=100_000)
    convert(source, tmp_path / "straight", shard_size=100_000)
    assert result.status == "converted"
    assert commands.digests(tmp_path / "out") == commands.digests(tmp_path / "straight")


def test_json_keeps_stdout_empty_on_an_error(source: Path, refusal: Callable[..., str]) -> None:
    (source / "params.json").write_text(json.dumps({}))
    refusal("--json")
