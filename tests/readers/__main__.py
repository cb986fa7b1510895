"""Give what we write to other programs, each in an environment of its own, and hold their logits against the reference's.

python -m tests.readers [NAME ...]     all readers, or those whose names begin so
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np

from tests.readers import subjects
from tests.readers.table import HERE, Reader, Run, readers, record, surprises
from tests.support.torchvision_shim import OPERATORS

PINNED = ["numpy", "pillow", "safetensors", "torch==2.13.0"]
SCRIPTS = HERE / "scripts"
_MAX_SECONDS = 900  # that a reader takes for a directory
# torchvision's image transforms are plain Python; its operators may not fit the installed torch, and need a declaration only.
DECLARATIONS = f"""import torch
_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in {OPERATORS!r}:
    if not hasattr(torch.ops.torchvision, _name):
        _library.define(_name + "(Tensor unused) -> Tensor")
"""


def main() -> int:
    wanted = tuple(sys.argv[1:]) or ("",)
    table = {name: reader for name, reader in readers().items() if name.startswith(wanted)}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="readers-") as folder:
        for name, reader in table.items():
            try:
                run = tried(reader, Path(folder))
            except subprocess.CalledProcessError as error:
                print(f"{name}: not run: {error}", flush=True)
                failed += 1
                continue
            record(name, run)
            found = list(surprises(reader, run))
            print(f"{name}: {'as expected' if not found else '; '.join(found)}", flush=True)
            failed += len(found)
    return 5 if failed else 0


def tried(reader: Reader, folder: Path) -> Run:
    """A reader's run, in an environment that is removed behind it."""
    environment = folder / "environment"
    python = environment / "bin" / "python"
    try:
        venv.create(environment, with_pip=True)
        install(python, reader)
        found = {directory: answered(python, reader, folder, directory) for directory in reader.reads}
        return Run(date=datetime.date.today().isoformat(), versions=versions(python, reader), found=found)
    finally:
        shutil.rmtree(environment)


def install(python: Path, reader: Reader) -> None:
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = python.parents[1] / "source"
    if reader.source:
        plain = ["download", "--no-deps", "--no-binary", ":all:", "-d", source, reader.source]
        subprocess.run([*pip, *plain], check=True)
        [archive] = source.glob("*.tar.gz")
        shutil.unpack_archive(archive, source, filter="data")
    subprocess.run([*pip, "install", *PINNED, *reader.requires], check=True)
    subprocess.run([*pip, "install", "--no-deps", "torchvision==0.28.0"], check=True)
    [registrations] = python.parents[1].glob("lib/python*/site-packages/torchvision/_meta_registrations.py")
    registrations.write_text(DECLARATIONS + registrations.read_text())
    if reader.without:
        subprocess.run([*pip, "uninstall", "--yes", *reader.without], check=True)


def versions(python: Path, reader: Reader) -> dict[str, str]:
    """Of the packages that the table names."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, check=True)
    installed = {one["name"].lower().replace("_", "-"): one["version"] for one in json.loads(listed.stdout)}
    names = [package.partition("=")[0].partition("<")[0].partition("[")[0] for package in reader.requires]
    return {name: installed[name] for name in names}


def answered(python: Path, reader: Reader, folder: Path, directory: str) -> dict[str, float | str]:
    """prompt -> KL to the reference's logits, or the error."""
    path = folder / directory
    if not path.exists():
        subjects.SUBJECTS[directory](path)
    asked = subjects.prompts(path)
    prompts, answers = folder / "prompts.npz", folder / "answers.npz"
    subjects.store(asked, prompts)
    answers.unlink(missing_ok=True)
    start = [python]
    if reader.processes > 1:
        start = [python, "-m", "torch.distributed.run", "--nproc-per-node", str(reader.processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*start, SCRIPTS / reader.script, path, prompts, answers]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_MAX_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return dict.fromkeys(asked, f"no answer within {_MAX_SECONDS} s")
    if not answers.exists():
        last = done.stderr.strip().rpartition("\n")[2][:300]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}: {last}"
        return dict.fromkeys(asked, f"ended with {ended}")
    expected = subjects.expected(path, asked)
    with np.load(answers) as made:
        return {
            prompt: subjects.kl(expected[prompt], made[prompt])
            if prompt in made
            else str(made[f"{prompt}.error"]).partition("\n")[0][:300]
            for prompt in asked
            if prompt in made or f"{prompt}.error" in made
        }


if __name__ == "__main__":
    sys.exit(main())
