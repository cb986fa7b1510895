"""The directory that a run writes to: made, and locked before numpy is imported, so that a second process fails at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama4_convert.checkpoints.manifest import INDEX, NAME
from llama4_convert.errors import UsageError, from_os_error
from llama4_convert.files import PARTIAL_SUFFIX, locked

# The file, of either layout, that makes a directory a model -> the names that readers may take for its weights.
WEIGHTS = {INDEX: "model*.safetensors*", "params.json": "consolidated.*.pth"}


class NeedsOverwrite(UsageError):
    """The output directory holds something else. `--overwrite` replaces it."""


@contextlib.contextmanager
def output_directory(target: Path, sources: Sequence[Path]) -> Iterator[Path]:
    """Own `target` inside the block: made if need be, locked, and removed again if it is left empty.

    `sources` are directories that are only read. Raises UsageError where the output would overwrite one of them or is no
    directory, and EnvironmentFailed where another process owns it or the system fails.
    """
    # `original` is where a Transformers directory keeps params.json.
    for source in sources:
        for ours, theirs in ((target, source), (target / "original", source), (target, source / "original")):
            if ours.exists() and theirs.exists() and os.path.samefile(ours, theirs):
                raise UsageError(f"the output would overwrite the source in {theirs}: choose another directory")
    is_new = _make_folder(target)
    try:
        with locked(target):
            yield target
    except OSError as error:
        raise from_os_error(error, f"writing {target}") from error
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # not empty, or gone: another process uses it
                target.rmdir()


def _make_folder(target: Path) -> bool:
    """Make `target` if need be; returns whether it did."""
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file: give a directory to write to")
    if target.is_symlink() and not target.exists():
        raise UsageError(f"{target} is a link to nothing: remove it, or choose another directory")
    try:
        target.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise from_os_error(error, f"making {target}") from error
    return True


def check_no_obstacle(target: Path) -> None:
    """Refuse an output in which a link or a directory has the name of a file that will be written. Raises UsageError."""
    if (target / "original").is_symlink():
        raise UsageError(f"{target / 'original'} is a link: remove it, or choose another directory")
    for path in target.iterdir():
        is_ours = any(path.match(pattern) for pattern in (*WEIGHTS.values(), *WEIGHTS, NAME, f"*{PARTIAL_SUFFIX}"))
        if is_ours and path.is_dir() and not path.is_symlink():
            raise UsageError(f"{path} is a directory, where a file will be: remove it, or choose another directory")
