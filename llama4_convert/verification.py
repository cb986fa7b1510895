"""`verify`: every byte of a directory, read again and held against what was promised for it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints.meta import is_file_name, rank_files, read_small
from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.manifest import INDEX, NAME, Manifest
from llama4_convert.published import Digest, Ids, digests, ids_of_download, read_ids
from llama4_convert.run import Source

Progress = Callable[[int], None]
Start = Callable[[int, int], None]
_CHECKLIST_LINE = re.compile(r"([0-9a-f]{32}) [ *](\S+)")
_WEIGHTS = (".safetensors", ".pth", ".bin", ".pt")
_CALLED = {"md5": "MD5", "sha256": "SHA-256", "git": "git id"}


def verify(
    path: str | os.PathLike[str],
    *,
    ids: str | os.PathLike[str] | None = None,
    start: Start = lambda total, done: None,
    progress: Progress = lambda n: None,
) -> dict[str, Any]:
    """Check an output against its manifest, Meta's directory against its CRCs and checklist.chk, any against published ids.

    `ids` is a file that lists them (`published.read_ids`); without it, those that a download has left beside the files are
    taken. Returns {ok, files: [{file, sha256, ok, note}], advice}. Raises UsageError if nothing tells what `path` should be.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory")
    is_source = any(path.glob("consolidated.*.pth"))
    if ids is not None:
        listed = read_ids(Path(ids), path)
        return _source(path, listed, start, progress) if is_source else _listed(path, listed, start, progress)
    manifest = Manifest.read(path)
    if manifest is not None:
        return _output(path, manifest, start, progress)
    left = ids_of_download(path)
    if is_source:
        return _source(path, left, start, progress)
    if left:
        return _listed(path, left, start, progress)
    raise UsageError(
        f"{path} has neither {NAME} (an output of this tool) nor consolidated.NN.pth (Meta's layout), nor what a download"
        " from the Hub leaves: give a list of its files' ids with --ids"
    )


def _output(path: Path, manifest: Manifest, start: Start, progress: Progress) -> dict[str, Any]:
    start(sum(entry["size"] for entry in manifest.files.values()), 0)
    files = []
    for name, entry in sorted(manifest.files.items()):
        found = digests(path / name, {"sha256"}, progress)["sha256"] if (path / name).is_file() else None
        note = "missing" if found is None else "" if found == entry["sha256"] else "its SHA-256 is another"
        files.append({"file": name, "sha256": found, "ok": found == entry["sha256"], "note": note})
    if manifest.marker not in manifest.files:
        files.append({"file": manifest.marker, "sha256": None, "ok": False, "note": "the conversion is unfinished"})
    weights = "model*.safetensors" if manifest.marker == INDEX else "consolidated.*.pth"
    for stray in sorted(p.name for p in path.glob(weights) if p.name not in manifest.files):
        files.append(
            {"file": stray, "sha256": None, "ok": False, "note": "not of this conversion: readers may take it"}
        )
    advice = "convert again with --overwrite"
    if manifest.marker not in manifest.files:
        advice = "run the conversion again: it goes on where it stopped"
    return {"ok": all(f["ok"] for f in files), "files": files, "advice": advice}


def _source(path: Path, ids: Ids, start: Start, progress: Progress) -> dict[str, Any]:
    promised = _checklist(path)
    ranks = rank_files(path)
    names = {file.name for file in ranks}
    others = [path / name for name in {**promised, **ids} if name not in names]
    start(2 * sum(f.stat().st_size for f in ranks), 0)  # digests, then the CRCs inside
    files = []
    for file in [*ranks, *others]:
        name = file.relative_to(path).as_posix()
        expected = [found[name] for found in (promised, ids) if name in found]
        entry = _held_against(file, name, expected, progress if file in ranks else lambda n: None)
        if ids and file in ranks and name not in ids:
            entry |= {"ok": False, "note": "the list does not name it"}
        if entry["ok"] and file in ranks:
            entry["note"] = _damage(file, progress)
            entry["ok"] = not entry["note"]
        files.append(entry)
    return {"ok": all(f["ok"] for f in files), "files": files, "advice": "download it again"}


def _listed(path: Path, ids: Ids, start: Start, progress: Progress) -> dict[str, Any]:
    start(sum((path / name).stat().st_size for name in ids if (path / name).is_file()), 0)
    files = [_held_against(path / name, name, [digest], progress) for name, digest in sorted(ids.items())]
    for stray in sorted(path.iterdir()):
        if stray.name.endswith(_WEIGHTS) and stray.name not in ids:
            files.append({"file": stray.name, "sha256": None, "ok": False, "note": "the list does not name it"})
    return {"ok": all(f["ok"] for f in files), "files": files, "advice": "download it again"}


def _held_against(file: Path, name: str, expected: list[Digest], progress: Progress) -> dict[str, Any]:
    if not file.is_file():
        return {"file": name, "sha256": None, "ok": False, "note": "missing"}
    found = digests(file, {"sha256", *(digest.algorithm for digest in expected)}, progress)
    wrong = [_CALLED[d.algorithm] for d in expected if found[d.algorithm] != d.value]
    note = f"its {' and its '.join(wrong)} is another" if wrong else ""
    return {"file": name, "sha256": found["sha256"], "ok": not wrong, "note": note}


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


def _checklist(path: Path) -> dict[str, Digest]:
    """File name -> its MD5, from checklist.chk ("digest  name" a line); empty without one."""
    file = path / "checklist.chk"
    if not file.is_file():
        return {}
    found = {}
    for number, line in enumerate(read_small(file).decode(errors="replace").splitlines(), 1):
        match = _CHECKLIST_LINE.fullmatch(line.strip())
        if line.strip() and (not match or not is_file_name(match[2])):
            raise BadInput(f"checklist.chk line {number} is not an MD5 and a file name: download it again")
        if match:
            found[match[2]] = Digest.of(match[1])
    return found
