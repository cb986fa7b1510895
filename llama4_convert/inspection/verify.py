"""`verify`: every byte of a directory, read again and compared with the digests that were recorded or published for it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from msgspec import Struct, field

from llama4_convert.checkpoints.digests import Digest, Ids, digests, ids_of_download, read_ids
from llama4_convert.checkpoints.layouts import RANK_FILE, directory_names, is_checkpoint, no_checkpoint
from llama4_convert.checkpoints.manifest import INDEX, NAME, Manifest
from llama4_convert.checkpoints.meta import MetaCheckpoint, rank_files
from llama4_convert.checkpoints.meta_quantized import CODES
from llama4_convert.checkpoints.pth import PthIndex, check_records
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import is_file_name, read_small
from llama4_convert.planning.binding import MissingRanks, check_ranks
from llama4_convert.progress import Progress, Start
from quant.formats.meta import FORMATS

_CHECKLIST_LINE = re.compile(r"([0-9a-f]{32}) [ *](\S+)")
_WEIGHTS = (".safetensors", ".pth", ".bin", ".pt")
_DIGEST_NAMES = {"md5": "MD5", "sha256": "SHA-256", "git": "git id"}
_DOWNLOAD_AGAIN = "fetch it again"


Authority = Literal["manifest", "checklist", "list", "CRC"]
Expected = dict[Authority, Digest]


class FileVerification(Struct, kw_only=True):
    """Whether a file is what it should be."""

    file: str
    """its path in the directory"""
    sha256: str | None = None
    """of its bytes; null where they were not read"""
    ok: bool
    """whether the file is there, and every digest is the one that was expected"""
    note: str = ""
    """what is wrong; empty where nothing is"""
    against: list[Authority] = field(default_factory=list)
    """what says how the file should be: the manifest, checklist.chk, published ids, the checksums inside it"""


class Verification(Struct, frozen=True, kw_only=True):
    """Whether the files of a directory are what they should be."""

    ok: bool
    """whether every file is what it should be"""
    files: list[FileVerification]
    """every file that was checked"""
    advice: str
    """what to do if not"""


def verify(
    path: str | os.PathLike[str],
    *,
    ids: str | os.PathLike[str] | None = None,
    start: Start = lambda total, done: None,
    progress: Progress = lambda n: None,
) -> Verification:
    """Compare an output with its manifest, Meta's directory with its CRCs and checklist.chk, any directory with published ids.

    `ids` is a file that lists them (`digests.read_ids`); without it, those that a download has left beside the files are
    taken. An output is compared with its manifest in any case. `start(total, done)` and `progress(n)` count the bytes read.
    Raises UsageError if nothing says what the files of `path` should be, BadInput or EnvironmentFailed.
    """
    path = Path(path)
    is_source = any(map(RANK_FILE.fullmatch, directory_names(path)))
    listed = read_ids(Path(ids), path) if ids is not None else {}
    manifest = Manifest.read(path)
    if manifest is not None:
        return _verify_output(path, manifest, listed, start, progress)
    if ids is None:
        listed = ids_of_download(path)
    if is_source:
        return _verify_source(path, listed, start, progress)
    if listed:
        return _verify_listed(path, listed, start, progress)
    if not is_checkpoint(path):
        raise no_checkpoint(path)
    raise UsageError(
        f"{path} has neither {NAME} (an output of this tool) nor consolidated.NN.pth (Meta's layout), nor what a download"
        " from the Hub leaves: give a list of its files' ids with --ids"
    )


def _result(files: list[FileVerification], advice: str) -> Verification:
    return Verification(ok=all(file.ok for file in files), files=files, advice=advice)


def _verify_output(path: Path, manifest: Manifest, ids: Ids, start: Start, progress: Progress) -> Verification:
    unfinished = manifest.marker not in manifest.files
    start(sum(entry.size for entry in manifest.files.values()), 0)
    files = []
    for name in sorted({*manifest.files, *ids}):
        expected: Expected = {}
        if name in manifest.files:
            expected["manifest"] = Digest("sha256", manifest.files[name].sha256)
        if name in ids:
            expected["list"] = ids[name]
        files.append(_verify_file(path / name, name, expected, progress))
    if unfinished:
        note = "not written yet: the conversion is unfinished"
        files.append(FileVerification(file=manifest.marker, ok=False, note=note))
    weights = "model*.safetensors" if manifest.marker == INDEX else "consolidated.*.pth"
    for stray in sorted(p.name for p in path.glob(weights) if p.name not in manifest.files):
        why = (
            "not recorded yet: the conversion is unfinished"
            if unfinished
            else "not of this conversion: readers may take it"
        )
        files.append(FileVerification(file=stray, ok=False, note=why))
    advice = "run the conversion again: it goes on where it stopped" if unfinished else "convert again with --overwrite"
    return _result(files, advice)


def _verify_source(path: Path, ids: Ids, start: Start, progress: Progress) -> Verification:
    checklist, ranks = _checklist(path), rank_files(path)
    ranks += [path / name for name in _missing_ranks(path)]
    ranks += _scales(path, ranks)
    names = {file.name for file in ranks}
    others = [path / name for name in {**checklist, **ids} if name not in names]
    start(2 * sum(f.stat().st_size for f in ranks if f.is_file()), 0)  # digests, then the CRCs inside
    files = []
    for file in [*ranks, *others]:
        name = file.relative_to(path).as_posix()
        expected: Expected = {}
        if name in checklist:
            expected["checklist"] = checklist[name]
        if name in ids:
            expected["list"] = ids[name]
        found = _verify_file(file, name, expected, progress if file in ranks else lambda n: None)
        if ids and file in ranks and name not in ids:
            found.ok, found.note = False, "the list does not name it"
        if found.ok and file in ranks:
            found.note = _damage(file, progress)
            found.ok = not found.note
            found.against.append("CRC")
        files.append(found)
    return _result(files, _DOWNLOAD_AGAIN)


def _missing_ranks(path: Path) -> list[str]:
    """The rank files that are missing at the end, by the shapes of the others."""
    try:
        check_ranks(MetaCheckpoint.open(path))
    except MissingRanks as error:
        return error.names
    except BadInput:  # what else is wrong is no matter of whole files
        pass
    return []


def _scales(path: Path, ranks: list[Path]) -> list[Path]:
    """Files of scales beside quantized rank files, one a rank: those that should be there, if one is or if there are codes."""
    names = [format.scales_file for format in FORMATS if any(path.glob(format.scales_file.format("*")))]
    if not names and _is_quantized(ranks[0]):
        names = [FORMATS[0].scales_file]  # the kind that is published
    return [path / name.format(rank) for name in names for rank in range(len(ranks))]


def _is_quantized(file: Path) -> bool:
    try:
        return any(tensor.dtype == CODES for tensor in PthIndex.read(file).tensors.values())
    except BadInput:  # which `_damage` reports of this file, later
        return False


def _verify_listed(path: Path, ids: Ids, start: Start, progress: Progress) -> Verification:
    start(sum((path / name).stat().st_size for name in ids if (path / name).is_file()), 0)
    files = [_verify_file(path / name, name, {"list": digest}, progress) for name, digest in sorted(ids.items())]
    for stray in sorted(path.iterdir()):
        if stray.name.endswith(_WEIGHTS) and stray.name not in ids:
            files.append(FileVerification(file=stray.name, ok=False, note="the list does not name it"))
    return _result(files, _DOWNLOAD_AGAIN)


def _verify_file(file: Path, name: str, expected: Expected, progress: Progress) -> FileVerification:
    if not file.is_file():
        return FileVerification(file=name, ok=False, note="missing")
    found = digests(file, {"sha256", *(digest.algorithm for digest in expected.values())}, progress)
    wrong = [_DIGEST_NAMES[d.algorithm] for d in expected.values() if found[d.algorithm] != d.value]
    note = f"its {' and its '.join(dict.fromkeys(wrong))} is another" if wrong else ""
    return FileVerification(file=name, sha256=found["sha256"], ok=not wrong, note=note, against=list(expected))


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
            raise BadInput(f"checklist.chk line {number} is not an MD5 and a file name: fetch it again")
        if match:
            found[match[2]] = Digest.from_hex(match[1])
    return found
