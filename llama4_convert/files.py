"""Small files: which names are safe, reading within bounds, JSON, the lock of a directory, and writing a file whole.

Names and contents may come from strangers: nothing is read without a bound, nothing is written through a link.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama4_convert.errors import BadInput, EnvironmentFailed, from_os_error

_SMALL_FILE_LIMIT_BYTES = 64 << 20
# The largest index or header of a Llama 4 (Maverick, each expert's matrix alone, in NF4) has some 5 MB and 80,000 values.
_MAX_JSON_BYTES = 24 << 20
_MAX_JSON_VALUES = 800_000
_MADE_BY_PROGRAMS = (".json", ".model")  # a licence may well be a page of HTML
_NOTICES = ("LICENSE", "USE_POLICY", "NOTICE")


START_BYTES = 4096  # of a file show what it is: pointers and pages say so in their first line

SAFETENSORS, TORCH_ZIP, GGUF = "safetensors", "torch zip", "GGUF"
_GET_FILE = "the file itself was not fetched"
_SAVE_AGAIN = "its weights may be good: torch.load(..., weights_only=True) it, and torch.save what comes"
_UNPACK = "unpack it, and give the directory that comes out"

# (format, how such a file begins, what it is, what to do next), the first that matches decides.
_BEGINNINGS = [
    ("Git LFS pointer", rb"version https://git-lfs\.github\.com/spec/", f"{_GET_FILE}: run `git lfs pull` there"),
    ("Xet pointer", rb"# xet version ", f"{_GET_FILE}: fetch it with `hf download`"),
    ("git-annex pointer", rb"/annex/objects/", f"{_GET_FILE}: run `git annex get` there"),
    ("link that was copied as text", rb"(\.\./)+[\w./-]+\s*\Z", "copy what it points to"),
    (
        "HTML page",
        rb"\s*<(!doctype html|html|head|body)\b",
        "a server answered so in its place: fetch it again, logged in",
    ),
    ("XML document", rb"\s*<(\?xml|error>)", "a server answered so in its place: fetch it again, logged in"),
    (
        "server's error message",
        rb'\s*(\{\s*"(error|message)"\s*:\s*"|(access to model|entry not found|repository not found|invalid username|not found\b|'
        rb"unauthorized|forbidden|access ?denied|too many requests|the requested))",
        "a server answered so in its place: fetch it again, logged in",
    ),
    (TORCH_ZIP, rb"PK\x03\x04", "torch.save and zip write such files"),
    (
        GGUF,
        rb"GGUF|ggjt|ggml|lmgg|tjgg",
        "llama.cpp's format, which cannot be turned back: take the model it was made of",
    ),
    ("file of torch before 1.6", rb"\x80.\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", _SAVE_AGAIN),
    ("bare pickle", rb"\x80[\x00-\x05]", _SAVE_AGAIN),
    ("tar archive", rb".{257}ustar", _UNPACK),
    (
        "compressed file",
        rb"\x1f\x8b|\x28\xb5\x2f\xfd|BZh\d|\xfd7zXZ\x00|7z\xbc\xaf\x27\x1c|Rar!|\x04\x22\x4d\x18",
        _UNPACK,
    ),
    ("HDF5 file", rb"\x89HDF\r\n", "Keras' format: save the model with Transformers as safetensors"),
    ("NumPy file", rb"\x93NUMPY", "save the model with Transformers as safetensors"),
    ("picture", rb"\x89PNG\r\n|\xff\xd8\xff|GIF8|RIFF....WEBP", "give another file"),
    ("program", rb"\x7fELF|MZ\x90|\xcf\xfa\xed\xfe", "give another file"),
]
_PATTERNS = [(kind, re.compile(start, re.DOTALL | re.IGNORECASE), advice) for kind, start, advice in _BEGINNINGS]


def foreign_content(start: bytes, expected: str = "") -> str | None:
    """What a file that begins with `start` (`START_BYTES` of it) is, and what to do about it: "a GGUF file: ...".

    None for what has no sign of its own, and for the format that is `expected`.
    """
    if start and not start.strip(b"\0"):
        return "nothing but zeros at its start: an interrupted download leaves that, fetch it again"
    length = int.from_bytes(start[:8], "little")
    if 2 <= length <= 100_000_000 and start[8:9] == b"{":  # asked first: any byte may stand in a length
        return None if expected == SAFETENSORS else "a safetensors file: its name should end in .safetensors"
    for kind, pattern, advice in _PATTERNS:
        if pattern.match(start):
            article = "an" if kind[0] in "HX" else "a"
            return None if kind == expected else f"{article} {kind}: {advice}"
    return None


def read_start(file: Path) -> bytes:
    """The first bytes of a file, by which `foreign_content` tells what it is. Raises EnvironmentFailed."""
    try:
        with open(file, "rb") as handle:
            return handle.read(START_BYTES)
    except OSError as error:
        raise from_os_error(error, f"reading {file.name}") from error


def is_file_name(name: str) -> bool:
    """Whether a name is one of a file beside another: no path, no control character, no longer than file systems take."""
    alone = Path(name).name == name and name not in ("", "..")
    return alone and not any(unicodedata.category(c) in ("Cc", "Cs") for c in name) and len(name.encode()) <= 255


def is_notice(name: str) -> bool:
    """Whether a file is a licence text by its name: Meta's licence asks that these go with every copy of the weights."""
    return name.split(".")[0].upper() in _NOTICES


def notices(folder: Path) -> dict[str, bytes]:
    """The licence texts of a directory, by their names. Raises BadInput or EnvironmentFailed."""
    names = (path.name for path in sorted(folder.iterdir()) if path.is_file())
    return {name: read_small(folder / name) for name in names if is_notice(name) and is_file_name(name)}


def read_at_most(file: Path, limit_bytes: int = _SMALL_FILE_LIMIT_BYTES) -> bytes | None:
    """The bytes of a file; None if there are more than `limit_bytes`. Raises EnvironmentFailed."""
    try:
        with open(file, "rb") as handle:
            data = handle.read(limit_bytes + 1)
    except OSError as error:
        raise from_os_error(error, f"reading {file.name}") from error
    return data if len(data) <= limit_bytes else None


def read_small(file: Path) -> bytes:
    """The bytes of a file that is read whole (JSON, tokenizer, licence). Raises BadInput or EnvironmentFailed."""
    if not file.is_file():
        raise BadInput(f"{file.name} is no file, or a link to nothing: fetch it again")
    data = read_at_most(file)
    if data is None:
        raise BadInput(
            f"{file.name} is larger than {_SMALL_FILE_LIMIT_BYTES >> 20} MiB, which it never is: wrong file?"
        )
    if file.suffix in _MADE_BY_PROGRAMS and (found := foreign_content(data[:START_BYTES])):
        raise BadInput(f"{file.name} is {found}")
    return data


def parse_json(data: bytes | str) -> Any:
    """The value that JSON text spells. Raises ValueError if it is no JSON, or if a key of an object occurs twice."""
    try:
        check_json_bounds(data)
        return json.loads(data, object_pairs_hook=_without_duplicates, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_json_bounds(data: bytes | str) -> None:
    """Raises ValueError for JSON that would take too much memory, before it takes any: the values are counted by their commas."""
    comma, bracket, brace = (",", "[", "{") if isinstance(data, str) else (b",", b"[", b"{")
    if len(data) > _MAX_JSON_BYTES:
        raise ValueError(f"more than {_MAX_JSON_BYTES >> 20} MiB")
    if data.count(comma) + data.count(bracket) + data.count(brace) > _MAX_JSON_VALUES:  # type: ignore[arg-type]
        raise ValueError(f"more than {_MAX_JSON_VALUES:,} values")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r:.80} occurs twice")
    return found


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a small file holds. Raises BadInput or EnvironmentFailed, naming the file."""
    return parse_object(read_small(path), path.name)


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `data`, the content of the file `name`. Raises BadInput."""
    try:
        body = parse_json(data)
    except ValueError as error:
        raise BadInput(f"{name} is not valid JSON ({error}): fetch it again, or correct it") from error
    if not isinstance(body, dict):
        raise BadInput(f"{name} holds no JSON object: fetch it again, or correct it")
    return body


LOCK_NAME = ".llama4-convert.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` (which must exist). Raises EnvironmentFailed, naming the owner, if another process does."""
    path = folder / LOCK_NAME
    fd = _acquire(path)
    try:
        yield
    finally:
        # Removed while still held: whoever waits on this file finds it gone and makes a new one (see _acquire).
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(fd)


def _acquire(path: Path) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise from_os_error(error, f"taking the lock of {path.parent}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(fd)
            raise EnvironmentFailed(
                f"{path.parent} is being written by {owner}: wait for it, or choose another directory"
            ) from None
        except OSError as error:
            os.close(fd)
            raise from_os_error(error, f"taking the lock of {path.parent}") from error
        if _is_file_at(path, fd):
            with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return fd
        os.close(fd)  # the owner that we waited for has just removed this file


def _is_file_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


PARTIAL_SUFFIX = ".partial"


def write_small(path: Path, data: bytes) -> str:
    """Write a small file atomically: temporary name, fsync, rename, fsync the folder. Returns its SHA-256 in hex."""
    temporary = path.with_name(path.name + PARTIAL_SUFFIX)
    # What is there may be a link that somebody planted: never write through it.
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return hashlib.sha256(data).hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames in `path` durable, where the system can fsync a folder."""
    with contextlib.suppress(OSError):  # FUSE and network file systems refuse; the rename itself has happened
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
