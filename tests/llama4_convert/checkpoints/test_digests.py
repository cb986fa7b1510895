"""`verify` against ids that others have published: lists, and what the Hub's downloader leaves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama4_convert import convert, synth, verify
from llama4_convert.errors import BadInput, UsageError
from tests.support import commands

NAMES = ("config.json", "model-00001-of-00001.safetensors", "original/params.json")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A directory that no tool of ours has made."""
    path = tmp_path / "repo"
    (path / "original").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        (path / name).write_bytes(bytes([i]) * (100 + i))
    return path


def git_id(path: Path) -> str:
    """git's own word."""
    return subprocess.run(["git", "hash-object", path], check=True, capture_output=True, text=True).stdout.strip()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(repo: Path) -> list[dict[str, Any]]:
    """As the Hub's API answers at tree/main?recursive=1."""
    found: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "original"}]
    for name in NAMES:
        entry: dict[str, Any] = {"type": "file", "oid": git_id(repo / name), "size": 1, "path": name}
        if name.endswith(".safetensors"):
            entry |= {"oid": "1" * 40, "lfs": {"oid": sha256(repo / name), "size": 1, "pointerSize": 134}}
        found.append(entry)
    return found


def siblings(repo: Path) -> dict[str, Any]:
    """As it answers at ?blobs=1."""
    return {
        "siblings": [
            {"rfilename": entry["path"], "blobId": entry["oid"]}
            | ({"lfs": {"sha256": entry["lfs"]["oid"], "size": 1}} if "lfs" in entry else {})
            for entry in tree(repo)
            if entry["type"] == "file"
        ]
    }


def lines(repo: Path) -> str:
    return subprocess.run(["sha256sum", *NAMES], cwd=repo, check=True, capture_output=True, text=True).stdout


LISTS: dict[str, Callable[[Path], str]] = {
    "tree": lambda repo: json.dumps(tree(repo)),
    "siblings": lambda repo: json.dumps(siblings(repo)),
    "sha256sum": lines,
    "git lfs": lambda repo: "".join(f"{sha256(repo / name)} * {name}\n" for name in NAMES),
    "md5": lambda repo: "".join(f"{hashlib.md5((repo / n).read_bytes()).hexdigest()}  ./{n}\n" for n in NAMES),
}


@pytest.mark.parametrize("form", LISTS)
def test_a_list(form: str, repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tmp_path / "ids"
    ids.write_text(LISTS[form](repo))
    outcome = commands.run(capsys, "verify", repo, "--ids", ids, "--json")
    assert outcome.code == 0
    assert {one["file"]: one["sha256"] for one in outcome.json["files"]} == {n: sha256(repo / n) for n in NAMES}
    for name in NAMES:
        whole = (repo / name).read_bytes()
        for bit in (0, 8 * len(whole) - 1):
            commands.flip(repo / name, bit // 8)
            found = {one.file: one for one in verify(repo, ids=ids).files}
            assert [n for n, one in found.items() if not one.ok] == [name]
            assert "is another" in found[name].note
            (repo / name).write_bytes(whole)
        (repo / name).unlink()
        missing = commands.run(capsys, "verify", repo, "--ids", ids)
        assert missing.code == 5
        assert f"{name}  (missing)" in missing.out
        (repo / name).write_bytes(whole)
    (repo / "model-00002.safetensors").write_bytes(b"x")
    assert [one.note for one in verify(repo, ids=ids).files if not one.ok] == ["the list does not name it"]


def test_a_list_of_the_whole_repository_for_its_original(meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    source = commands.copy(meta_checkpoint("scout", 2).src, tmp_path / "original")
    ids = tmp_path / "ids"
    ids.write_text(
        "".join(f"{sha256(path)}  original/{path.name}\n" for path in source.iterdir()) + f"{'0' * 40}  config.json\n"
    )
    assert verify(source, ids=ids).ok
    params = source / "params.json"
    params.write_text(params.read_text() + " ")
    assert [one.file for one in verify(source, ids=ids).files if not one.ok] == ["params.json"]
    (source / "consolidated.01.pth").unlink()
    found = {one.file: one.note for one in verify(source, ids=ids).files}
    assert found["consolidated.01.pth"] == "missing"


def test_what_a_download_into_a_directory_leaves(repo: Path) -> None:
    from huggingface_hub._local_folder import write_download_metadata

    with pytest.raises(UsageError, match="--ids"):
        verify(repo)
    for name in NAMES:
        etag = sha256(repo / name) if name.endswith(".safetensors") else git_id(repo / name)
        write_download_metadata(repo, name, "a" * 40, etag)
    assert verify(repo).ok
    assert [one.file for one in verify(repo / "original").files] == ["params.json"]
    commands.flip(repo / NAMES[1], 50)
    assert [one.file for one in verify(repo).files if not one.ok] == [NAMES[1]]
    (repo / NAMES[2]).write_bytes(b"")
    assert not verify(repo / "original").ok


def test_a_snapshot_in_the_hubs_cache(repo: Path, tmp_path: Path) -> None:
    """Files are links to blobs, which are named by their id."""
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "abc", tmp_path / "models--x--y" / "blobs"
    blobs.mkdir(parents=True)
    for name in NAMES:
        etag = sha256(repo / name) if name.endswith(".safetensors") else git_id(repo / name)
        shutil.copy(repo / name, blobs / etag)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / etag, (snapshot / name).parent))
    assert verify(snapshot).ok
    assert len(verify(snapshot).files) == len(NAMES)
    commands.flip((snapshot / NAMES[1]).resolve(), 3)
    assert [one.file for one in verify(snapshot).files if not one.ok] == [NAMES[1]]
    (snapshot / NAMES[1]).resolve().unlink()
    assert [one.note for one in verify(snapshot).files if not one.ok] == ["missing"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "[1]",
        '{"siblings": 3}',
        '[{"path": "x"}]',
        '[{"path": "../x", "oid": "' + "0" * 40 + '"}]',
        '[{"path": "x", "oid": "zz"}]',
        '[{"path": 3, "oid": "' + "0" * 40 + '"}]',
        "0" * 64,
        "0" * 64 + "  ../../etc/passwd",
        "0" * 64 + "  /etc/passwd",
        "0" * 63 + "  config.json",
        "not a list",
        "[" * 100_000,
        "\udcff\x00",
    ],
)
def test_lists_that_are_none(text: str, repo: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    ids.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BadInput, match=r"no list of ids|names no file"):
        verify(repo, ids=ids)


def test_no_such_list(repo: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no file"):
        verify(repo, ids=tmp_path / "absent")


@pytest.mark.parametrize("run", ["export", "recipe"])
def test_a_source_without_checksums_is_held_against_what_is_promised_of_it(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By our manifest, by what a download has left; and where there is neither, that is said."""
    from huggingface_hub._local_folder import write_download_metadata

    synth(tmp_path / "meta", tiny=True, ranks=2)
    source = tmp_path / "source"
    convert(tmp_path / "meta", source, shard_size=4_000_000)
    command = ["export"] if run == "export" else ["convert", "--recipe", "int4"]
    weights = sorted(source.glob("*.safetensors"))
    assert len(weights) > 2
    wholes = {path: path.read_bytes() for path in weights}

    def tried(name: str) -> commands.Outcome:
        return commands.run(capsys, command[0], source, tmp_path / name, *command[1:])

    assert tried("whole").code == 0
    for kind in ("manifest", "download"):
        if kind == "download":
            (source / "llama4-convert.json").unlink()
            for path in weights:
                write_download_metadata(source, path.name, "a" * 40, sha256(path))
        for path, whole in wholes.items():
            commands.flip(path, len(whole) - 1)
            outcome = tried(f"{kind}-{path.name}")
            assert outcome.code == 3
            assert f"{path.name} is damaged" in outcome.error
            path.write_bytes(whole)
        assert "no checksums" not in tried(f"{kind}-whole").err
    shutil.rmtree(source / ".cache")
    assert "nothing says what its files should be" in tried("unknown").err
