"""The small files of a directory that somebody else has made: which names are taken, and how much is read of one."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from llama4_convert.errors import BadInput, from_os_error

_SMALL_FILE_LIMIT = 64 << 20


def is_file_name(name: str) -> bool:
    """Whether a name is one of a file beside another: no path, no control character, no longer than file systems take."""
    alone = Path(name).name == name and name not in ("", "..")
    return alone and not any(unicodedata.category(c) in ("Cc", "Cs") for c in name) and len(name.encode()) <= 255


def read_small(file: Path) -> bytes:
    """The bytes of a file that is read whole (JSON, tokenizer, licence)."""
    if not file.is_file():
        raise BadInput(f"{file.name} is no file, or a link to nothing: download it again")
    try:
        with open(file, "rb") as handle:
            data = handle.read(_SMALL_FILE_LIMIT + 1)
    except OSError as error:
        raise from_os_error(error, f"reading {file.name}") from error
    if len(data) > _SMALL_FILE_LIMIT:
        raise BadInput(f"{file.name} is larger than {_SMALL_FILE_LIMIT >> 20} MiB, which it never is: wrong file?")
    return data
