"""The command line's contract: exit codes, one JSON object on stdout, messages on stderr, bounded memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from safetensors.numpy import load_file

from llama4_convert import convert, formatting, plan, synth
from llama4_convert.commands import cli
from llama4_convert.errors import UsageError
from tests.support import HANG_SECONDS, commands

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "scout"
    synth(path, geometry="scout", tiny=True, ranks=2, layers=2)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., commands.Outcome]:
    return lambda *arguments: commands.run(capsys, *arguments)


Run = Callable[..., commands.Outcome]


# -------------------- json


def test_plan_prints_what_convert_will_write(run: Run, source: Path, tmp_path: Path) -> None:
    outcome = run("plan", source, "--json")
    assert outcome.code == 0
    assert outcome.err == ""
    said = outcome.json
    assert {"tensors", "files", "output_bytes", "peak_memory_bytes", "dropped"} <= said.keys()
    convert(source, tmp_path / "out")
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert {f["file"]: f["bytes"] for f in said["files"]} == sizes
    assert said["output_bytes"] == sum(sizes.values())
    index = json.loads((tmp_path / "out" / commands.INDEX).read_text())
    assert {t["name"]: t["file"] for t in said["tensors"]} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t["bytes"] for t in said["tensors"])


def test_a_dry_run_is_the_plan_and_writes_nothing(run: Run, source: Path, tmp_path: Path) -> None:
    outcome = run("convert", source, tmp_path / "out", "--dry-run", "--json")
    assert outcome.json == msgspec.to_builtins(plan(source))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_what_the_run_would(run: Run, source: Path, tmp_path: Path) -> None:
    for option in (("--max-memory", "1MB"), ("--recipe", "int4", "--device", "gpu")):
        outcome = run("convert", source, tmp_path / "out", "--dry-run", *option)
        assert (outcome.code, outcome.out) == (2, "")


def test_convert_verify_inspect_print_one_object(run: Run, source: Path, tmp_path: Path) -> None:
    converted = run("convert", source, tmp_path / "out", "--json")
    assert converted.err == ""
    assert converted.json["status"] == "converted"
    files = {f["file"]: f["sha256"] for f in converted.json["files"]}
    found = commands.digests(tmp_path / "out")
    assert files == {name: digest for name, digest in found.items() if name != "llama4-convert.json"}

    verified = run("verify", tmp_path / "out", "--json")
    assert verified.json["ok"] is True
    assert {f["file"]: f["sha256"] for f in verified.json["files"]} == files
    assert all(f["ok"] for f in verified.json["files"])

    for path, layout in ((source, "meta"), (tmp_path / "out", "transformers")):
        inspected = run("inspect", path, "--json").json
        assert inspected["layout"] == layout
        assert {"geometry", "parameters", "bytes", "tensors"} <= inspected.keys()
        assert {"name", "dtype", "shape"} <= inspected["tensors"][0].keys()


def test_both_layouts_are_inspected_alike(run: Run, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    meta, transformers = (run("inspect", p, "--json").json for p in (source, tmp_path / "out"))
    assert meta["geometry"] == transformers["geometry"] | {"no_rope_layer_interval": 4}
    assert meta["parameters"] == transformers["parameters"]


def test_warnings_go_to_stderr(run: Run, source: Path, tmp_path: Path) -> None:
    bare = commands.copy(source, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    outcome = run("convert", bare, tmp_path / "out", "--json")
    assert outcome.code == 0
    assert outcome.err.startswith("warning: the source has no tokenizer.model")
    assert outcome.json["warnings"]


# -------------------- exit codes


def test_a_failed_check_is_5(run: Run, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    file = next((tmp_path / "out").glob("*.safetensors"))
    commands.flip(file, 5000)
    outcome = run("verify", tmp_path / "out", "--json")
    assert outcome.code == 5
    assert outcome.json["ok"] is False
    assert [f["file"] for f in outcome.json["files"] if not f["ok"]] == [file.name]
    assert "convert again with --overwrite" in outcome.error


def test_verify_reads_a_source_against_its_crcs_and_its_checklist(run: Run, source: Path, tmp_path: Path) -> None:
    assert run("verify", source).code == 0
    damaged = commands.copy(source, tmp_path / "damaged")
    commands.flip(damaged / "consolidated.01.pth", commands.data_offset(damaged / "consolidated.01.pth", "/data/3"))
    assert "consolidated.01.pth" in run("verify", damaged).error
    (damaged / "checklist.chk").unlink()
    outcome = run("verify", damaged)
    assert outcome.code == 5
    assert "fetch it again" in outcome.error


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert"],
        ["convert", "SRC", "OUT", "--dtype", "int8"],
        ["convert", "SRC", "OUT", "--shard-size", "0"],
        ["convert", "SRC", "OUT", "--shard-size", "lots"],
        ["convert", "SRC", "OUT", "--shard-size", "9" * 400],
        ["convert", "SRC", "OUT", "--max-memory", "1MB"],
        ["convert", "SRC", "OUT", "--max-position-embeddings", "0"],
        ["convert", "no-such-directory", "OUT"],
        ["convert", "SRC", "SRC"],
        ["convert", "SRC", "SRC/params.json"],
        ["plan", "SRC/params.json"],
        ["inspect", "no-such-directory"],
        ["verify", "no-such-directory"],
        ["no-such-command"],
    ],
    ids=lambda a: " ".join(a)[:60],
)
def test_usage_is_2(run: Run, source: Path, tmp_path: Path, arguments: list[str]) -> None:
    places = {"SRC": str(source), "OUT": str(tmp_path / "out"), "SRC/params.json": str(source / "params.json")}
    outcome = run(*(places.get(a, a) for a in arguments))
    assert outcome.code == 2
    assert outcome.out == ""
    assert "error: " in outcome.err.lower()
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["{", "[]", '{"text_config": 3}'])
def test_a_damaged_output_is_bad_input_to_inspect(run: Run, source: Path, tmp_path: Path, damage: str) -> None:
    convert(source, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(damage)
    outcome = run("inspect", tmp_path / "out")
    assert outcome.code == 3
    assert "config.json" in outcome.error


def test_an_output_that_lacks_a_file_is_bad_input_to_inspect(run: Run, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    next((tmp_path / "out").glob("*.safetensors")).unlink()
    outcome = run("inspect", tmp_path / "out")
    assert outcome.code == 3
    assert "is missing" in outcome.error


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (MemoryError, 4), (PermissionError, 4)])
def test_what_can_happen_anywhere(run: Run, raised: type[BaseException], code: int) -> None:
    with mock.patch("llama4_convert.inspection.inspect.inspect", side_effect=raised):
        outcome = run("inspect", ".")
    assert outcome.code == code
    assert outcome.err.strip().count("\n") == 0


def test_a_package_that_is_missing(run: Run) -> None:
    with mock.patch("llama4_convert.inspection.inspect.inspect", side_effect=ModuleNotFoundError(name="numpy.linalg")):
        outcome = run("inspect", ".")
    assert (outcome.code, outcome.err.count("\n")) == (4, 1)
    assert "package numpy is missing" in outcome.error


@pytest.mark.parametrize("bug", [ZeroDivisionError(), ModuleNotFoundError(name="llama4_convert.inspektion")])
def test_our_own_bugs_are_not_hidden(bug: Exception) -> None:
    with (
        mock.patch("llama4_convert.inspection.inspect.inspect", side_effect=bug),
        mock.patch("sys.argv", ["llama4-convert", "inspect", "."]),
        pytest.raises(type(bug)),
    ):
        cli.main()


def test_a_reader_that_goes_away(source: Path) -> None:
    command = [sys.executable, "-m", "llama4_convert.commands.cli", "inspect", str(source), "--tensors"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(HANG_SECONDS) == 0


@pytest.mark.parametrize("command", sorted(cli.cli.commands))
def test_every_command_has_help_with_an_example(run: Run, command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.code == 0
    assert re.search(rf"Examples?:\n    llama4-convert {command}", outcome.out)


def test_without_a_command_there_is_help(run: Run) -> None:
    outcome = run()
    assert outcome.code == 2
    assert outcome.err.startswith("Usage: ")
    assert "\n  convert " in outcome.err


def test_the_list_of_commands_tells_whole_sentences(run: Run) -> None:
    assert "..." not in run("--help").out.partition("Commands:")[2]


# -------------------- sizes


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1GiB", 1 << 30), ("1.5 kb", 1500), ("12", 12), ("3m", 3_000_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert formatting.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "1PB", "9" * 400])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError):
        formatting.parse_size(text)


@pytest.mark.parametrize("shard_size", [1, 100_000, 1_000_000])
def test_the_shard_size_changes_no_tensor(source: Path, tmp_path: Path, shard_size: int) -> None:
    def tensors(folder: Path) -> dict[str, bytes]:
        files = sorted(folder.glob("*.safetensors"))
        names = json.loads((folder / commands.INDEX).read_text())["weight_map"].values()
        assert sorted(set(names)) == [f.name for f in files]
        assert all(f.name.endswith(f"-of-{len(files):05d}.safetensors") for f in files)
        return {n: t.tobytes() for f in files for n, t in load_file(f).items()}

    synth(tmp_path / "src", geometry="maverick", tiny=True, ranks=2, dtype="float16")
    convert(tmp_path / "src", tmp_path / "one")
    convert(tmp_path / "src", tmp_path / "many", shard_size=shard_size)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert tensors(tmp_path / "many") == tensors(tmp_path / "one")


# -------------------- memory

_PEAK = """
import sys
from llama4_convert import convert
options = eval(sys.argv[1])
if options is not None:
    convert(*sys.argv[2:4], **options)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux' count of a process's memory")
def test_memory_stays_within_the_bound(tmp_path: Path) -> None:
    synth(tmp_path / "src", geometry="scout", tiny=True, ranks=2, experts=64)
    size = sum(p.stat().st_size for p in (tmp_path / "src").iterdir())
    assert size > 90 << 20

    def peak(options: dict[str, Any] | None, target: str) -> int:
        arguments = [sys.executable, "-c", _PEAK, repr(options), str(tmp_path / "src"), str(tmp_path / target)]
        return int(subprocess.check_output(arguments, cwd=REPOSITORY)) << 10

    idle = peak(None, "none")
    for bound in (64 << 20, 256 << 20):
        assert peak({"max_memory": bound}, f"{bound}") - idle < bound
    assert peak({"max_memory": 64 << 20, "dtype": "float32"}, "cast") - idle < 64 << 20
    one, other = (commands.digests(tmp_path / f"{bound}") for bound in (64 << 20, 256 << 20))
    assert one == other
