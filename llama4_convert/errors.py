"""What can go wrong, one type a kind, each with its exit code.

A message is one line: what is wrong, where, and what to do next. The command line prints it and ends with `exit_code`;
from Python the types are caught as usual. Anything else that escapes is our bug (exit code 1).
"""

from __future__ import annotations

import errno
import os


class ConvertError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class UsageError(ConvertError):
    """The command was asked for something that it must not do as it stands (exit code 2)."""

    exit_code = 2


class BadInput(ConvertError):
    """The source is damaged, incomplete, contradicts itself, or is not what it says it is (exit code 3)."""

    exit_code = 3


class EnvironmentFailed(ConvertError):
    """The machine refused: disk full, no permission, output directory busy (exit code 4)."""

    exit_code = 4


class CheckFailed(ConvertError):
    """A check ran to its end and the answer is no: verify, validate, diff (exit code 5)."""

    exit_code = 5


def printable(text: str, limit: int = 300, keep: str = "") -> str:
    """`text` cut and on one line; characters that do not show, or that turn the writing around, as their escapes.

    What comes from files, names or other programs goes through here on its way to a person. `keep`: characters that stay.
    """
    cut = text[:limit] + " ..." if len(text) > limit else text
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in cut)


def one_line(error: object, limit: int = 300) -> str:
    """The text of an error, another library's or our own, as a line."""
    return printable(" ".join(str(error).split()), limit)


def raise_if_out_of_memory(error: Exception) -> None:
    """Raises EnvironmentFailed if torch could not allocate memory: on the CPU it has no type of its own for that."""
    if "allocate memory" in str(error):
        raise EnvironmentFailed(one_line(error)) from error


_ADVICE = {
    errno.ENOSPC: "free some space, then run the same command again: it goes on where it stopped",
    errno.EDQUOT: "the quota is used up: free some space, then run the same command again",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "the file system is read-only: choose another directory",
    errno.ENOTDIR: "a part of that path is a file: choose another directory",
    errno.EIO: "the disk reports an error: check it, then run the same command again",
}


def from_os_error(error: OSError, doing: str) -> EnvironmentFailed:
    """The one-line form of an `OSError` met while `doing` something ("writing model-00001-of-00003.safetensors")."""
    what = os.strerror(error.errno) if error.errno else str(error)
    where = f" ({error.filename})" if error.filename and str(error.filename) not in doing else ""
    return EnvironmentFailed(f"{doing}: {what}{where}; {_ADVICE.get(error.errno or 0, 'run the same command again')}")
