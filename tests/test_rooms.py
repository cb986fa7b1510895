"""The import arrows: tables, model and quantization know nobody; a plain conversion needs no torch, Transformers or numba."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("mappings", "llama4", "quant", "llama4_convert")
HEAVY = {"torch", "transformers", "numba"}


def modules(room: str) -> list[Path]:
    found = sorted((REPOSITORY / room).rglob("*.py"))
    assert found
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """The top-level package of every import statement, wherever it stands; relative imports stay in their room."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def at_module_level(tree: ast.Module) -> Iterator[str]:
    """What importing the module imports: not what stands inside functions or under `if TYPE_CHECKING`."""

    def statements(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                yield from statements(node.orelse)
                continue
            yield node
            for name in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)

    for statement in statements(tree.body):
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            yield from imports(ast.Module([statement], []))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


# The model computes with torch, and parity with the model; what describes it and binds its layouts does not.
MODEL = {"loading", "text", "cache", "moe", "vision", "image", "chat", "model", "generate"}


def may_import(path: Path) -> set[str]:
    """The heavy packages that importing this module may load."""
    if path.parent.name == "llama4" and path.stem in MODEL:
        return {"torch"}
    parts = path.relative_to(REPOSITORY).parts
    if parts[:2] in {("quant", "torch_backend"), ("llama4_convert", "parity")}:
        return {"torch"}
    compiled = parts[:2] in {("quant", "kernels"), ("quant", "schemes")} or parts[:2] == ("quant", "encoders.py")
    return {"numba"} if compiled or parts == ("quant", "formats", "bitsandbytes.py") else set()


@pytest.mark.parametrize("room", ["mappings", "llama4", "quant"])
def test_tables_model_and_quantization_import_nothing_of_the_other_rooms(room: str) -> None:
    others = (set(ROOMS) | HEAVY | {"tests"}) - {room}
    found = [
        (path.name, name)
        for path in modules(room)
        for name in imports(parse(path))
        if name in others - may_import(path)
    ]
    assert found == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_module_imports_what_is_heavy_but_the_model_torch_and_the_kernels_numba(room: str) -> None:
    found = [
        (path.name, name)
        for path in modules(room)
        for name in at_module_level(parse(path))
        if name in HEAVY - may_import(path)
    ]
    assert found == []


def test_the_check_above_sees_through_try_and_if_but_not_into_functions() -> None:
    source = """
try:
    import torch
except ImportError:
    from transformers import x
if TYPE_CHECKING:
    import numpy
else:
    import json.decoder
class A:
    import os
    def f(self):
        import re
"""
    assert sorted(at_module_level(ast.parse(source))) == ["json", "os", "torch", "transformers"]


def heavy_after(script: str, *arguments: str, heavy: set[str] = HEAVY) -> str:
    """The heavy modules that a fresh interpreter has loaded once it has run `script`."""
    tail = f"\nimport sys\nprint('loaded:', sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script + tail, *arguments], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_the_probe_notices_torch() -> None:
    assert heavy_after("import sys, types\nsys.modules['torch'] = types.ModuleType('torch')") == "loaded: ['torch']"


def test_importing_every_module_loads_neither() -> None:
    names = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for room in ROOMS
        for path in modules(room)
        if not may_import(path)
    ]
    assert "llama4_convert.cli" in names
    script = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    assert heavy_after(script, *(name for name in names if not name.endswith("__main__"))) == "loaded: []"


def test_a_conversion_takes_its_lock_before_it_loads_numpy() -> None:
    assert heavy_after("import llama4_convert.conversion", heavy={"numpy"}) == "loaded: []"


def test_a_conversion_loads_neither(tmp_path: Path) -> None:
    """From the command line, checkpoint to finished directory, tokenizer included."""
    script = """if True:
        import pathlib, sys
        import llama4_convert.cli
        from llama4_convert import convert, synth
        folder = pathlib.Path(sys.argv[1])
        synth(folder / "meta", geometry="scout", tiny=True, ranks=2)
        try:
            llama4_convert.cli.cli(["convert", str(folder / "meta"), str(folder / "out")])
        except SystemExit as done:
            assert not done.code, done.code
        assert (folder / "out" / "config.json").exists()
        assert list((folder / "out").glob("*.safetensors"))
    """
    assert heavy_after(script, str(tmp_path)) == "loaded: []"
