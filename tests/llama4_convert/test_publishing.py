"""`push` against a Hub on this machine: what is sent, in one commit, and what is refused."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import huggingface_hub.constants
import pytest

from llama4_convert import convert, push, synth
from llama4_convert.checkpoints.manifest import NAME
from llama4_convert.errors import CheckFailed, EnvironmentFailed, UsageError
from tests.support import commands, hub_stand_in

REPOSITORY = Path(__file__).resolve().parents[2]
NEW = "me/Llama-4-tiny"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made")
    synth(path / "meta", geometry="scout", tiny=True, ranks=2, layers=2)
    (path / "meta" / "LICENSE").write_text("as Meta wrote it")
    convert(path / "meta", path / "out", recipe="int4", shard_size=1_000_000)
    return path / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return commands.copy(made, tmp_path / "out")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub_stand_in.Hub]:
    with hub_stand_in.reached(monkeypatch) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's attempts
        yield hub


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., commands.Outcome]:
    return lambda *arguments: commands.run(capsys, *arguments)


Run = Callable[..., commands.Outcome]


def content(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def on(hub: hub_stand_in.Hub, repository: str = NEW, branch: str = "main") -> dict[str, bytes]:
    return {path: data for path, data in hub.repositories[repository][branch].items() if path != ".gitattributes"}


# -------------------- what arrives


def test_every_file_of_the_manifest_arrives_in_one_commit(made: Path, hub: hub_stand_in.Hub, run: Run) -> None:
    result = run("push", made, NEW, "--create", "--private", "--message", "the first", "--yes", "--json").json
    assert on(hub) == content(made)
    assert NEW in hub.private
    assert [(commit["summary"], commit["branch"]) for commit in hub.commits] == [("the first", "main")]
    assert result["commit"] == "c" * 40
    assert {file["file"]: file["size"] for file in result["files"]} == {n: len(d) for n, d in content(made).items()}
    assert result["bytes"] == sum(map(len, content(made).values()))
    assert result["warnings"] == []


def test_what_is_not_in_the_manifest_stays_here(out: Path, hub: hub_stand_in.Hub) -> None:
    (out / "notes.txt").write_text("mine")
    (out / ".env").write_text("secret")
    (out / "original" / "consolidated.00.pth").write_bytes(b"large")
    push(out, NEW, create=True)
    assert on(hub).keys() == content(out).keys() - {"notes.txt", ".env", "original/consolidated.00.pth"}


def test_what_is_there_is_not_sent_again(made: Path, hub: hub_stand_in.Hub) -> None:
    hub.failures["/commit/"] = 503
    with pytest.raises(EnvironmentFailed, match="answers 503"):
        push(made, NEW, create=True)
    sent = hub.uploads()
    assert sent == sum(name.endswith((".safetensors", "tokenizer.json")) for name in content(made))
    assert on(hub) == {}  # nothing is to be seen before all of it is
    hub.failures.clear()
    push(made, NEW)
    assert hub.uploads() == sent
    assert on(hub) == content(made)
    push(made, NEW)  # a third time there is nothing to commit
    assert len(hub.commits) == 1


def test_a_branch_of_its_own(made: Path, hub: hub_stand_in.Hub) -> None:
    push(made, NEW, create=True)
    with pytest.raises(UsageError, match="no such branch"):
        push(made, NEW, revision="next")
    push(made, NEW, revision="next", create=True)
    assert on(hub, branch="next") == content(made)


def test_from_a_shell(made: Path, hub: hub_stand_in.Hub, tmp_path: Path) -> None:
    """Address and token from the environment, as the client takes them."""
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "llama4_convert", "push", str(made), NEW, "--create", "--yes"]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub.address}/{NEW}/commit/")
    assert "on the Hub as the manifest says" in done.stdout
    assert on(hub) == content(made)


# -------------------- asked for, never by itself


def test_a_dry_run_says_what_and_asks_nobody(made: Path, hub: hub_stand_in.Hub, run: Run) -> None:
    told = run("push", made, NEW, "--dry-run", "--json").json
    assert {file["file"] for file in told["files"]} == content(made).keys()
    assert told["files"][-1]["file"] == NAME
    assert f"to {NEW}" in run("push", made, NEW, "--dry-run").out
    assert hub.requests == []


def test_without_a_terminal_it_wants_yes(made: Path, hub: hub_stand_in.Hub, run: Run) -> None:
    outcome = run("push", made, NEW, "--create")
    assert (outcome.code, "--yes" in outcome.error) == (2, True)
    assert hub.requests == []


@pytest.mark.parametrize(("answer", "code"), [("n", 2), ("y", 0)])
def test_on_a_terminal_it_asks(
    answer: str, code: int, made: Path, hub: hub_stand_in.Hub, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    stdin = mock.Mock(isatty=lambda: True, readline=lambda: f"{answer}\n")
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda prompt: answer)
    outcome = run("push", made, NEW, "--create")
    assert outcome.code == code
    assert f"to {NEW}" in outcome.err
    assert (NEW in hub.repositories) == (answer == "y")


def test_a_repository_that_is_not_there_is_not_made_unasked(made: Path, hub: hub_stand_in.Hub) -> None:
    with pytest.raises(UsageError, match="--create makes it"):
        push(made, NEW)
    with pytest.raises(UsageError, match="--private is for --create"):
        push(made, NEW, private=True)
    assert hub.repositories == {}


def test_names_and_licences_are_minded(out: Path, hub: hub_stand_in.Hub, run: Run) -> None:
    outcome = run("push", out, "me/my-model", "--dry-run")
    assert 'does not begin with "Llama"' in outcome.err
    body = json.loads((out / NAME).read_text())
    del body["files"]["LICENSE"]
    (out / NAME).write_text(json.dumps(body))
    assert "no LICENSE" in run("push", out, NEW, "--dry-run").err


# -------------------- what is refused


@pytest.mark.parametrize("repository", ["alone", "a/b/c", "a b/c", "", "../x/y"])
def test_what_is_no_repository(repository: str, made: Path) -> None:
    with pytest.raises(UsageError, match="OWNER/NAME"):
        push(made, repository)


def test_a_damaged_directory_is_not_pushed(out: Path, hub: hub_stand_in.Hub, run: Run) -> None:
    file = sorted(out.glob("*.safetensors"))[0]
    commands.flip(file, 5000)
    outcome = run("push", out, NEW, "--create", "--yes")
    assert (outcome.code, file.name in outcome.error) == (5, True)
    assert hub.repositories == {}
    # Unread it goes, and is found out by the id that the Hub has.
    outcome = run("push", out, NEW, "--create", "--yes", "--no-verify")
    assert (outcome.code, f"{file.name} is another than the manifest's" in outcome.error) == (5, True)


def test_what_is_not_finished_or_not_ours(out: Path, hub: hub_stand_in.Hub, tmp_path: Path) -> None:
    (out / "README.md").write_text("longer than it was" * 999)
    with pytest.raises(CheckFailed, match=r"README.md .* card --write"):
        push(out, NEW, create=True)
    body = json.loads((out / NAME).read_text())
    del body["files"][commands.INDEX]
    (out / NAME).write_text(json.dumps(body))
    with pytest.raises(UsageError, match="unfinished"):
        push(out, NEW, create=True)
    with pytest.raises(UsageError, match="is not a directory"):
        push(tmp_path / "meta", NEW, create=True)
    assert hub.requests == []


# -------------------- what the Hub does


@pytest.mark.parametrize("name", ["README.md", NAME, "model.safetensors.index.json"])
def test_a_file_that_arrives_as_another_is_found(name: str, made: Path, hub: hub_stand_in.Hub, run: Run) -> None:
    hub.damaged = name
    outcome = run("push", made, NEW, "--create", "--yes")
    assert (outcome.code, f"{NEW}: {name} is another than the manifest's" in outcome.error) == (5, True)


def test_a_file_that_the_hub_leaves_out_is_found(made: Path, hub: hub_stand_in.Hub) -> None:
    hub.ignored = "config.json"
    with pytest.raises(CheckFailed, match=r"config.json is not there"):
        push(made, NEW, create=True)


def test_weights_of_another_model_beside_ours_are_told_of(made: Path, hub: hub_stand_in.Hub, run: Run) -> None:
    hub.repositories[NEW] = {"main": {"model.safetensors": b"another", "old.txt": b"text"}}
    outcome = run("push", made, NEW, "--yes")
    assert outcome.code == 0
    assert "other weights, which readers may take: model.safetensors" in outcome.err
    assert hub.repositories[NEW]["main"]["model.safetensors"] == b"another"  # nobody's to remove


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("/api/models/", 500, "answers 500"),
        ("/api/models/", 403, "may not write"),
        ("/repos/create", 401, "hf auth login"),
        ("/preupload/", 500, "answers 500"),
        ("/objects/batch", 502, "answers 502"),
        ("/large/", 500, "answers 500"),
        ("/commit/", 409, "answers 409"),
        ("/tree/", 504, "answers 504"),
        ("/validate-yaml", 429, "wait"),
    ],
)
def test_a_hub_that_fails_is_one_line(
    where: str, status: int, words: str, made: Path, hub: hub_stand_in.Hub, run: Run
) -> None:
    hub.failures[where] = status
    outcome = run("push", made, NEW, "--create", "--yes")
    assert (outcome.code, words in outcome.error) == (4, True), outcome.err


def test_a_wrong_token(made: Path, hub: hub_stand_in.Hub, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    outcome = run("push", made, NEW, "--create", "--yes")
    assert (outcome.code, "answers 401: log in with `hf auth login`" in outcome.error) == (4, True)


def test_nobody_answers(made: Path, hub: hub_stand_in.Hub, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    outcome = run("push", made, NEW, "--create", "--yes")
    assert (outcome.code, "asking for me/Llama-4-tiny" in outcome.error) == (4, True)


def test_without_the_client(made: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.setitem(sys.modules, name, None)
    outcome = run("push", made, NEW, "--yes")
    assert (outcome.code, "pip install 'llama4-convert[hub]'" in outcome.error) == (4, True)


def test_nothing_else_loads_the_client() -> None:
    """Offline by default."""
    uses = re.compile(r"^\s*(from|import) huggingface_hub", re.MULTILINE)
    sources = [
        path
        for package in ("llama4_convert", "llama4", "quant", "mappings")
        for path in (REPOSITORY / package).rglob("*.py")
    ]
    assert [path.name for path in sources if uses.search(path.read_text())] == ["publishing.py"]
