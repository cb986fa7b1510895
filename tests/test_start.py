"""What is heavy is imported late: a plain conversion needs no torch, Transformers, numba or matplotlib."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "numba", "matplotlib"}
# What computes with torch or compiles with numba, and may import it: the model, parity with it, the kernels and what calls them.
MODEL = "loading text cache vision image chat model generate"
TORCH = {
    *(f"llama4/{name}.py" for name in MODEL.split()),
    "quant/torch_backend/",
    *(f"llama4_convert/validation/{name}" for name in ("parity/", "validate.py", "cache.py")),
}
NUMBA = {"quant/kernels/", "quant/schemes/", "quant/encoders.py", "quant/formats/bitsandbytes.py"}


def modules() -> list[str]:
    """Paths of all modules but those that may import something heavy."""
    paths = [
        p.relative_to(REPOSITORY)
        for package in ("mappings", "llama4", "quant", "llama4_convert")
        for p in (REPOSITORY / package).rglob("*.py")
    ]
    return [str(path) for path in sorted(paths) if not str(path).startswith(tuple(TORCH | NUMBA))]


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


def test_importing_a_module_that_computes_nothing_loads_nothing_heavy() -> None:
    names = [name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in modules()]
    assert "llama4_convert.commands.cli" in names
    script = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    assert heavy_after(script, *(name for name in names if not name.endswith("__main__"))) == "loaded: []"


def test_a_conversion_takes_its_lock_before_it_loads_numpy() -> None:
    assert heavy_after("import llama4_convert.conversion.convert", heavy={"numpy"}) == "loaded: []"


def test_a_conversion_loads_nothing_heavy(tmp_path: Path) -> None:
    """From the command line, checkpoint to finished directory, tokenizer included."""
    script = """if True:
        import pathlib, sys
        import llama4_convert.commands.cli
        from llama4_convert import convert, synth
        folder = pathlib.Path(sys.argv[1])
        synth(folder / "meta", geometry="scout", tiny=True, ranks=2)
        try:
            llama4_convert.commands.cli.cli(["convert", str(folder / "meta"), str(folder / "out")])
        except SystemExit as done:
            assert not done.code, done.code
        assert (folder / "out" / "config.json").exists()
        assert list((folder / "out").glob("*.safetensors"))
    """
    assert heavy_after(script, str(tmp_path)) == "loaded: []"


def test_help_loads_no_numbers_and_no_result_types() -> None:
    script = "import sys\nsys.argv = ['llama4-convert', '--help']\nimport llama4_convert.commands.cli"
    assert (
        heavy_after(script, heavy={"numpy", "msgspec", "jinja2", "safetensors", "tokenizers"} | HEAVY) == "loaded: []"
    )


def test_dir_lists_what_the_package_exports() -> None:
    import llama4_convert

    assert dir(llama4_convert) == sorted(llama4_convert.__all__)
    assert {"__version__", "convert", "validate"} <= set(dir(llama4_convert))
