"""Digests that files should have: lists of ids as hubs and `sha256sum` write them, what downloads leave behind, manifests.

On the Hugging Face Hub the id of a large file is the SHA-256 of its bytes, and that of a small one git's: the SHA-1 of
"blob", its size and its bytes. MD5 stands in Meta's checklist.chk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct, field

from llama4_convert.checkpoints.manifest import NAME, Manifest
from llama4_convert.errors import BadInput, UsageError, from_os_error
from llama4_convert.files import is_file_name, parse_json, read_small
from llama4_convert.progress import Progress
from quant.typed import decode

_ALGORITHMS = {32: "md5", 40: "git", 64: "sha256"}  # by the number of hexadecimal digits
_LINE = re.compile(r"([0-9a-fA-F]{32}|[0-9a-fA-F]{40}|[0-9a-fA-F]{64})\s+[*-]?\s*(\S.*)")
_ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MAX_PATH_LENGTH = 1000  # characters; systems end at 1,024 or 4,096 bytes, the directory's own path included
_DOWNLOAD_METADATA = Path(".cache", "huggingface", "download")


class Digest(NamedTuple):
    """`algorithm`: "sha256", "git" (the SHA-1 of a blob) or "md5"; `value` in hexadecimal digits."""

    algorithm: str
    value: str

    @staticmethod
    def from_hex(value: str) -> Digest:
        """The number of digits decides the algorithm."""
        return Digest(_ALGORITHMS[len(value)], value)


Ids = Mapping[str, Digest]  # relative path -> what it must be


def read_ids(file: Path, folder: Path) -> Ids:
    """Reads a list of ids for the files of `folder`, which may be a folder of the listed repository (`original`).

    JSON as the Hub's API gives it (`/api/models/NAME/tree/main?recursive=1`, or `/api/models/NAME?blobs=1`), or lines of a digest
    and a path. Raises UsageError, BadInput or EnvironmentFailed.
    """
    if not file.is_file():
        raise UsageError(f"{file} is no file: give a list of ids as the Hub's API or sha256sum writes it")
    try:
        listed = list(_listed(read_small(file).decode("utf-8-sig")))
        found = dict(listed)
        if twice := next((name for name, digest in listed if found[name] != digest), None):
            raise ValueError(f"{twice!r:.80} has two different ids")
    except ValueError as error:
        raise BadInput(f"{file.name} is no list of ids ({error!s:.200})") from error
    prefix = f"{folder.resolve().name}/"
    inside = {name.removeprefix(prefix): digest for name, digest in found.items() if name.startswith(prefix)}
    if inside and not any((folder / name).exists() for name in found):
        found = inside
    if not found:
        raise BadInput(f"{file.name} names no file")
    return found


class _LargeFile(Struct):
    """What the Hub's API says of a file that lies in its large storage: one endpoint says `oid`, the other `sha256`."""

    oid: str | None = None
    sha256: str | None = None


class _Entry(Struct):
    """A file as the Hub's API lists it: `path` and `oid` in one endpoint, `rfilename` and `blobId` in the other."""

    type: str = "file"
    path: str | None = None
    rfilename: str | None = None
    oid: str | None = None
    blob_id: str | None = field(name="blobId", default=None)
    lfs: _LargeFile | None = None

    def __post_init__(self) -> None:
        if not (self.path or self.rfilename):
            raise ValueError("a file has no path")

    @property
    def name(self) -> str:
        return self.path or self.rfilename or ""

    @property
    def id(self) -> str:
        large = self.lfs or _LargeFile()
        return large.oid or large.sha256 or self.oid or self.blob_id or ""


class _Model(Struct):
    """A repository as the Hub's API describes it."""

    siblings: list[_Entry]


def _listed(text: str) -> Iterator[tuple[str, Digest]]:
    """(path, id) of each file. Raises ValueError."""
    try:
        body = parse_json(text)
    except json.JSONDecodeError:
        yield from _from_lines(text)
        return
    is_model = isinstance(body, dict)
    for entry in decode(body, _Model, "JSON").siblings if is_model else decode(body, list[_Entry], "JSON"):
        if entry.type == "file":
            yield _checked(entry.name, entry.id)


def _from_lines(text: str) -> Iterator[tuple[str, Digest]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if not match:
            raise ValueError(f"line {number} is not a digest and a path, as sha256sum writes them")
        yield _checked(match[2], match[1])


def _checked(name: str, value: str) -> tuple[str, Digest]:
    value = value.lower()
    if not re.fullmatch(r"[0-9a-f]+", value) or len(value) not in _ALGORITHMS:
        raise ValueError(f"{value!r:.80} is no id")
    name = name.removeprefix("./")
    if len(name) > _MAX_PATH_LENGTH or not all(map(is_file_name, name.split("/"))):
        raise ValueError(f"{name!r:.80} is no path in the directory: list them from inside it")
    return name, Digest.from_hex(value)


def ids_of_download(folder: Path) -> dict[str, Digest]:
    """Path -> the id that the Hub's downloader has recorded: in a local directory in files of metadata, in its cache as links.

    Raises BadInput or EnvironmentFailed.
    """
    found: dict[str, Digest] = {}
    for root, prefix in ((folder, ""), (folder.resolve().parent, f"{folder.resolve().name}/")):
        for path in sorted((root / _DOWNLOAD_METADATA / prefix).rglob("*.metadata")):
            if not path.is_file():
                continue
            name = path.relative_to(root / _DOWNLOAD_METADATA).as_posix().removesuffix(".metadata")
            lines = read_small(path).decode(errors="replace").split()
            if len(lines) < 2 or not _ID.fullmatch(lines[1].strip('"')):  # the commit, the id, when
                raise BadInput(
                    f"{_DOWNLOAD_METADATA / (name + '.metadata')} is damaged: remove it, or download {name} again"
                )
            found[name.removeprefix(prefix)] = Digest.from_hex(lines[1].strip('"'))
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            target = Path(os.readlink(path))
            if target.parent.name == "blobs" and _ID.fullmatch(target.name):
                found[path.relative_to(folder).as_posix()] = Digest.from_hex(target.name)
    return found


def digests(path: Path, algorithms: Collection[str], progress: Progress) -> dict[str, str]:
    """Algorithm -> the hexadecimal digest of a file, all in one pass; `progress` counts bytes. Raises EnvironmentFailed."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            running = {name: hashlib.new("sha1" if name == "git" else name) for name in algorithms}
            if "git" in running:
                running["git"].update(b"blob %d\0" % size)
            while data := file.read(1 << 20):
                for digest in running.values():
                    digest.update(data)
                progress(len(data))
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}") from error
    return {name: digest.hexdigest() for name, digest in running.items()}


def check_digests(
    expected: Mapping[Path, Digest], progress: Progress, threads: int = min(4, os.cpu_count() or 1)
) -> None:
    """Compare files with their `expected` digests; `progress` counts bytes. Raises BadInput, naming the first damaged file."""

    def damage(path: Path) -> str:
        digest = expected[path]
        return "" if digests(path, {digest.algorithm}, progress)[digest.algorithm] == digest.value else path.name

    with ThreadPoolExecutor(threads, "digest") as pool:
        if bad := [name for name in pool.map(damage, expected) if name]:
            raise BadInput(
                f"{bad[0]} is damaged, its digest is not the one that it was made or downloaded with: make or download it"
                f" again; if you changed it yourself, remove {NAME} or .cache/huggingface beside it"
            )


def expected_digests(files: Sequence[Path]) -> dict[Path, Digest]:
    """The digests that `files` should have, as far as a manifest or a download beside the first of them has recorded any."""
    folder = files[0].parent
    manifest, left = Manifest.read(folder), ids_of_download(folder)
    names = {path: path.relative_to(folder).as_posix() for path in files}
    made = manifest.files if manifest else {}
    found = {path: Digest("sha256", made[name].sha256) for path, name in names.items() if name in made}
    return found or {path: left[name] for path, name in names.items() if name in left}
