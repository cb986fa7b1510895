"""`completion`: real shells, on a terminal of their own, complete what is typed."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama4_convert import synth
from tests.support import HANG_SECONDS, commands

REPOSITORY = Path(__file__).resolve().parents[3]
PROGRAM = "import sys; sys.argv[0] = 'llama4-convert'; from llama4_convert.commands.cli import main; main()"
START = {
    "bash": ["bash", "--noprofile", "--norc", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config"],
}
SET_UP = {
    "bash": 'eval "$(llama4-convert completion bash)"',
    "zsh": 'autoload -U compinit; compinit -u -D; eval "$(llama4-convert completion zsh)"',
}
# What is typed, and what the tab makes of it.
CASES = {
    "llama4-convert compl": "llama4-convert completion",
    "llama4-convert convert SRC DST --max-m": "llama4-convert convert SRC DST --max-memory",
    "llama4-convert convert SRC DST --variant g": "llama4-convert convert SRC DST --variant guard",
    "llama4-convert convert SRC DST --recipe int4-e": "llama4-convert convert SRC DST --recipe int4-experts",
    "llama4-convert convert SRC DST --recipe mine": "llama4-convert convert SRC DST --recipe mine.toml",
    "llama4-convert convert SRC DST --recipe meta-f": "llama4-convert convert SRC DST --recipe meta-f",
    "llama4-convert export SRC DST --recipe meta-f": "llama4-convert export SRC DST --recipe meta-fp8",
    "llama4-convert fit PATH --gpu h200": "llama4-convert fit PATH --gpu h200-141gb",
    "llama4-convert plan SRC --gpu h200": "llama4-convert plan SRC --gpu h200-141gb",
    "llama4-convert explain meta tok": "llama4-convert explain meta tok_embeddings.weight",
    "llama4-convert explain nothing tok": "llama4-convert explain nothing tok",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the program in bin/, a checkpoint and a recipe of one's own."""
    path = tmp_path_factory.mktemp("home")
    (path / "bin").mkdir()
    program = path / "bin" / "llama4-convert"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{PROGRAM}" "$@"\n')
    program.chmod(0o755)
    synth(path / "meta", geometry="guard", tiny=True, ranks=1, layers=1)
    (path / "mine.toml").write_text("")
    return path


def environment(home: Path) -> dict[str, str]:
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    kept = {name: os.environ[name] for name in ("LANG", "LC_ALL") if name in os.environ}
    return kept | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "HOME": str(home), "TERM": "dumb"}


def typed(home: Path, shell: str, lines: dict[str, str]) -> list[str]:
    """What a shell makes of each line with a tab behind it; the shell itself says so, by `echo`."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(home)
        os.execvpe(START[shell][0], START[shell], environment(home))
    seen = b""

    def wait_for(text: str) -> None:
        nonlocal seen
        end = time.monotonic() + HANG_SECONDS
        while text.encode() not in seen:
            assert select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0], f"no {text}: {seen!r}"
            seen += os.read(terminal, 65536)

    try:
        os.write(terminal, f"{SET_UP[shell]}; echo rea''dy\n".encode())
        wait_for("ready")
        for number, line in enumerate(lines):
            # Back to the beginning of the line (Ctrl-A), and what stands there is printed, not run.
            os.write(terminal, f"{line}\t\x01echo line''{number}: \n".encode())
            wait_for(f"line{number}: ")
            os.write(terminal, f"echo end''{number}\n".encode())
            wait_for(f"end{number}")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(terminal)
    text = seen.decode(errors="replace").replace("\r", "")
    return [text.rpartition(f"line{n}: ")[2].partition("\n")[0].strip() for n in range(len(lines))]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_tab_completes(home: Path, shell: str) -> None:
    if shell != "bash" and not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    assert typed(home, shell, CASES) == list(CASES.values())


def test_fish_completes(home: Path) -> None:
    if not shutil.which("fish"):
        pytest.skip("fish is not installed")
    questions = "; ".join(f"complete -C {shlex.quote(line)}; echo ---" for line in CASES)
    done = subprocess.run(
        [*START["fish"], "-c", f"llama4-convert completion fish | source; {questions}"],
        cwd=home,
        env=environment(home),
        capture_output=True,
        text=True,
        check=True,
    )
    found = [[line.split("\t")[0] for line in answer.splitlines()] for answer in done.stdout.split("---\n")]
    for (line, expected), answer in zip(CASES.items(), found, strict=False):
        wanted = expected.split()[-1]
        assert answer == ([] if wanted == line.split()[-1] else [wanted]), line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_is_that_of_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    outcome = commands.run(capsys, "completion")
    assert outcome.code == 0
    assert outcome.out == commands.run(capsys, "completion", shell).out
    assert commands.run(capsys, "completion", "--json").json == {"shell": shell, "script": outcome.out[:-1]}


@pytest.mark.parametrize(("value", "said"), [("/bin/tcsh", "$SHELL is tcsh"), (None, "$SHELL is not set")])
def test_another_shell_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: str | None, said: str
) -> None:
    monkeypatch.delenv("SHELL", raising=False)
    if value:
        monkeypatch.setenv("SHELL", value)
    outcome = commands.run(capsys, "completion")
    assert outcome.code == 2
    assert outcome.error.startswith(said)
