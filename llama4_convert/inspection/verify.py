"""`verify`: every byte of a directory, read again and held against what was promised for it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints.digests import Digest, Ids, digests, ids_of_download, read_ids
from llama4_convert.checkpoints.manifest import INDEX, NAME, Manifest
from llama4_convert.checkpoints.meta import inner_original, rank_files
from llama4_convert.checkpoints.meta_quantized import CODES
from llama4_convert.checkpoints.pth import PthIndex, check_records
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import is_file_name, read_small
from quant.formats.meta import FORMATS

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
    taken. An output is held against its manifest in any case. Returns {ok, files: [{file, sha256, ok, note, against}], advice}:
    `against` is the kinds of promise that there were. Raises UsageError if nothing tells what `path` should be.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory")
    is_source = any(path.glob("consolidated.*.pth"))
    listed = read_ids(Path(ids), path) if ids is not None else {}
    manifest = Manifest.read(path)
    if manifest is not None:
        return _output(path, manifest, listed, start, progress)
    if ids is not None:
        return _source(path, listed, start, progress) if is_source else _listed(path, listed, start, progress)
    left = ids_of_download(path)
    if is_source:
        return _source(path, left, start, progress)
    if left:
        return _listed(path, left, start, progress)
    if hint := inner_original(path):
        raise UsageError(f"{path} holds no checkpoint itself: did you mean {hint}?")
    raise UsageError(
        f"{path} has neither {NAME} (an output of this tool) nor consolidated.NN.pth (Meta's layout), nor what a download"
        " from the Hub leaves: give a list of its files' ids with --ids"
    )


def _output(path: Path, manifest: Manifest, ids: Ids, start: Start, progress: Progress) -> dict[str, Any]:
    unfinished = manifest.marker not in manifest.files
    start(sum(entry.size for entry in manifest.files.values()), 0)
    files = []
    for name in sorted({*manifest.files, *ids}):
        entry = manifest.files.get(name)
        expected = [("manifest", Digest("sha256", entry.sha256))] if entry else []
        expected += [("list", ids[name])] if name in ids else []
        files.append(_held_against(path / name, name, expected, progress))
    if unfinished:
        files.append(_bad(manifest.marker, "not written yet: the conversion is unfinished"))
    weights = "model*.safetensors" if manifest.marker == INDEX else "consolidated.*.pth"
    for stray in sorted(p.name for p in path.glob(weights) if p.name not in manifest.files):
        why = (
            "not recorded yet: the conversion is unfinished"
            if unfinished
            else "not of this conversion: readers may take it"
        )
        files.append(_bad(stray, why))
    advice = "run the conversion again: it goes on where it stopped" if unfinished else "convert again with --overwrite"
    return {"ok": all(f["ok"] for f in files), "files": files, "advice": advice}


def _bad(name: str, note: str) -> dict[str, Any]:
    return {"file": name, "sha256": None, "ok": False, "note": note, "against": []}


def _source(path: Path, ids: Ids, start: Start, progress: Progress) -> dict[str, Any]:
    promised = _checklist(path)
    ranks = rank_files(path)
    ranks += _scales(path, ranks)
    names = {file.name for file in ranks}
    others = [path / name for name in {**promised, **ids} if name not in names]
    start(2 * sum(f.stat().st_size for f in ranks if f.is_file()), 0)  # digests, then the CRCs inside
    files = []
    for file in [*ranks, *others]:
        name = file.relative_to(path).as_posix()
        expected = [(what, found[name]) for what, found in (("checklist", promised), ("list", ids)) if name in found]
        entry = _held_against(file, name, expected, progress if file in ranks else lambda n: None)
        if ids and file in ranks and name not in ids:
            entry |= {"ok": False, "note": "the list does not name it"}
        if entry["ok"] and file in ranks:
            entry["note"] = _damage(file, progress)
            entry["ok"] = not entry["note"]
            entry["against"].append("CRC")
        files.append(entry)
    return {"ok": all(f["ok"] for f in files), "files": files, "advice": "download it again"}


def _scales(path: Path, ranks: list[Path]) -> list[Path]:
    """Files of scales beside quantized rank files, one a rank: those that should be there, if one is or if there are codes."""
    names = [format.scales_file for format in FORMATS if any(path.glob(format.scales_file.format("*")))]
    if not names and _is_quantized(ranks[0]):
        names = [FORMATS[0].scales_file]  # the kind that is published
    return [path / name.format(rank) for name in names for rank in range(len(ranks))]


def _is_quantized(file: Path) -> bool:
    try:
        return any(tensor.dtype == CODES for tensor in PthIndex.read(file).tensors.values())
    except BadInput:  # which is told of this file, later
        return False


def _listed(path: Path, ids: Ids, start: Start, progress: Progress) -> dict[str, Any]:
    start(sum((path / name).stat().st_size for name in ids if (path / name).is_file()), 0)
    files = [_held_against(path / name, name, [("list", digest)], progress) for name, digest in sorted(ids.items())]
    for stray in sorted(path.iterdir()):
        if stray.name.endswith(_WEIGHTS) and stray.name not in ids:
            files.append(_bad(stray.name, "the list does not name it"))
    return {"ok": all(f["ok"] for f in files), "files": files, "advice": "download it again"}


def _held_against(file: Path, name: str, expected: list[tuple[str, Digest]], progress: Progress) -> dict[str, Any]:
    """`expected`: who promises which digest."""
    if not file.is_file():
        return _bad(name, "missing")
    found = digests(file, {"sha256", *(digest.algorithm for _, digest in expected)}, progress)
    wrong = [_CALLED[d.algorithm] for _, d in expected if found[d.algorithm] != d.value]
    note = f"its {' and its '.join(dict.fromkeys(wrong))} is another" if wrong else ""
    told = {"file": name, "sha256": found["sha256"], "ok": not wrong, "note": note}
    return {**told, "against": [what for what, _ in expected]}


def _damage(file: Path, progress: Progress) -> str:
    """What is wrong inside a rank file; empty if nothing."""
    try:
        index = PthIndex.read(file)
        check_records(index, index.records, progress)
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
