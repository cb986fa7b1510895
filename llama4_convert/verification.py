"""`verify`: every byte of a directory, read again and held against what was promised for it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints.meta import is_file_name, rank_files, read_small
from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.errors import BadInput, UsageError, from_os_error
from llama4_convert.manifest import INDEX, NAME, Manifest
from llama4_convert.run import Source

Progress = Callable[[int], None]
Start = Callable[[int, int], None]
_CHECKLIST_LINE = re.compile(r"([0-9a-f]{32}) [ *](\S+)")


def verify(
    path: str | os.PathLike[str],
    *,
    start: Start = lambda total, done: None,
    progress: Progress = lambda n: None,
) -> dict[str, Any]:
    """Check an output directory against its manifest, or Meta's directory against its CRCs and checklist.chk.

    Returns {ok, files: [{file, sha256, ok, note}], advice}. Raises UsageError if `path` is neither.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    if manifest is not None:
        return _output(path, manifest, start, progress)
    if path.is_dir() and any(path.glob("consolidated.*.pth")):
        return _source(path, start, progress)
    raise UsageError(f"{path} has neither {NAME} (an output of this tool) nor consolidated.NN.pth (Meta's layout)")


def _output(path: Path, manifest: Manifest, start: Start, progress: Progress) -> dict[str, Any]:
    start(sum(entry["size"] for entry in manifest.files.values()), 0)
    files = []
    for name, entry in sorted(manifest.files.items()):
        found = _digest(path / name, "sha256", progress) if (path / name).is_file() else None
        note = "missing" if found is None else "" if found == entry["sha256"] else "its SHA-256 is another"
        files.append({"file": name, "sha256": found, "ok": found == entry["sha256"], "note": note})
    if INDEX not in manifest.files:
        files.append({"file": INDEX, "sha256": None, "ok": False, "note": "the conversion is unfinished"})
    for stray in sorted(p.name for p in path.glob("model*.safetensors") if p.name not in manifest.files):
        files.append(
            {"file": stray, "sha256": None, "ok": False, "note": "not of this conversion: readers may take it"}
        )
    advice = "convert again with --overwrite"
    if INDEX not in manifest.files:
        advice = "run the conversion again: it goes on where it stopped"
    return {"ok": all(f["ok"] for f in files), "files": files, "advice": advice}


def _source(path: Path, start: Start, progress: Progress) -> dict[str, Any]:
    promised = _checklist(path)
    ranks = rank_files(path)
    others = [path / name for name in promised if path / name not in ranks]
    passes = 2  # digests, then the CRCs inside
    start(passes * sum(f.stat().st_size for f in ranks), 0)
    files = []
    for file in [*ranks, *others]:
        note, sha256 = "", None
        if not file.is_file():
            note = "missing"
        else:
            sha256 = _digest(file, "sha256", progress)
            if file.name in promised and _digest(file, "md5", lambda n: None) != promised[file.name]:
                note = "its MD5 is not the one in checklist.chk"
            elif file in ranks:
                note = _damage(file, progress)
        files.append({"file": file.name, "sha256": sha256, "ok": not note, "note": note})
    return {"ok": all(f["ok"] for f in files), "files": files, "advice": "download it again"}


def _damage(file: Path, progress: Progress) -> str:
    """What is wrong inside a rank file; empty if nothing."""
    try:
        index = PthIndex.read(file)
        with Source([index]) as source:
            for record in index.records:
                source.check_whole(0, record, progress)
    except BadInput as error:
        return str(error)
    return ""


def _checklist(path: Path) -> dict[str, str]:
    """File name -> MD5, from checklist.chk ("digest  name" a line); empty without one."""
    file = path / "checklist.chk"
    if not file.is_file():
        return {}
    found = {}
    for number, line in enumerate(read_small(file).decode(errors="replace").splitlines(), 1):
        match = _CHECKLIST_LINE.fullmatch(line.strip())
        if line.strip() and (not match or not is_file_name(match[2])):
            raise BadInput(f"checklist.chk line {number} is not an MD5 and a file name: download it again")
        if match:
            found[match[2]] = match[1]
    return found


def _digest(path: Path, algorithm: str, progress: Progress) -> str:
    digest = hashlib.new(algorithm)
    try:
        with open(path, "rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
                progress(len(data))
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}") from error
    return digest.hexdigest()
