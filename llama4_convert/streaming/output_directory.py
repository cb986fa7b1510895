"""The directory that a job writes to: what may stand there, and what of it is ours to remove."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llama4_convert.checkpoints.manifest import NAME, Manifest
from llama4_convert.errors import BadInput, UsageError, from_os_error
from llama4_convert.files import PARTIAL_SUFFIX

if TYPE_CHECKING:
    from llama4_convert.streaming.job import Job

# Of either layout: what makes a directory a model, and what readers may take for its weights.
_MARKERS = ("model.safetensors.index.json", "params.json")
_WEIGHTS = ("model*.safetensors*", "consolidated.*.pth")


class NeedsOverwrite(UsageError):
    """The output directory holds something else. `--overwrite` replaces it."""


def make_folder(target: Path) -> bool:
    """Make `target` if need be; says whether it did."""
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
    """Refuse an output where something stands in the way that is not to be removed, or written through."""
    if (target / "original").is_symlink():
        raise UsageError(f"{target / 'original'} is a link: remove it, or choose another directory")
    for path in target.iterdir():
        is_ours = any(path.match(pattern) for pattern in (*_WEIGHTS, *_MARKERS, NAME, f"*{PARTIAL_SUFFIX}"))
        if is_ours and path.is_dir() and not path.is_symlink():
            raise UsageError(f"{path} is a directory, where a file will be: remove it, or choose another directory")


def refuse_other_kind(target: Path, job: Job) -> None:
    """Weights in the other layout that we did not make are nobody's to remove, and left there would be read."""
    ours = _listed(target)
    for pattern in _WEIGHTS:
        for path in sorted(target.glob(pattern)) if pattern != job.weights else ():
            if path.name not in ours:
                raise UsageError(
                    f"{target} holds a checkpoint in the other layout ({path.name}), which --overwrite does not remove:"
                    " choose another directory"
                )


def _listed(target: Path) -> set[str]:
    """What the manifest of `target` lists, if it has one that can be read."""
    try:
        old = Manifest.read(target)
    except BadInput:
        return set()
    return set(old.files) if old else set()


def clear(target: Path, job: Job) -> None:
    """Remove a model from `target`: first what makes it one, so that it never points at files of another conversion."""
    listed = _listed(target)
    for marker in _MARKERS:
        if marker == job.marker or marker in listed:
            (target / marker).unlink(missing_ok=True)
    for name in listed:
        if (target / name).parent.resolve() in (target.resolve(), (target / "original").resolve()):
            (target / name).unlink(missing_ok=True)
    (target / NAME).unlink(missing_ok=True)
    # Readers prefer a bare model.safetensors to an index, and take every rank file that they find.
    for path in target.glob(job.weights):
        path.unlink()
