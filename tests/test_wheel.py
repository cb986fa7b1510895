"""The wheel carries everything it needs: installed alone, away from the repository, it does the whole demo."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_works_from_any_directory(tmp_path: Path) -> None:
    # Built from a copy: setuptools leaves build/ behind where it builds.
    tree = tmp_path / "tree"
    for name in subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split(
        "\n"
    ):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree]
    subprocess.run(pip, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("llama4_convert-*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    program = "import sys; sys.argv[0] = 'llama4-convert'; from llama4_convert.commands.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", program, "demo", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "tensors are equal bit by bit" in run.stdout
    assert "both layouts and Transformers agree" in run.stdout
    assert "A red circle on a white ground." in run.stdout
