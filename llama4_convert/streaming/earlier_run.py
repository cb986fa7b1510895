"""The output directory before a run: an earlier run of the same job is continued, anything else refused or cleared."""

from __future__ import annotations

from pathlib import Path

from msgspec import structs

from llama4_convert.checkpoints.manifest import NAME, Manifest
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.files import LOCK_NAME
from llama4_convert.streaming.job import Job, Run
from llama4_convert.streaming.output_directory import WEIGHTS, NeedsOverwrite


def take_over(job: Job, target: Path, *, overwrite: bool) -> Run:
    """A run of `job` that goes on with the files which an earlier one has finished in `target`.

    With `overwrite` a model there is removed, unless it is the unfinished output of this very job. Raises NeedsOverwrite where
    `target` holds something else, and UsageError where it holds weights that are not ours to remove.
    """
    manifest = structs.replace(job.manifest, files={}, errors={}, records={})
    if overwrite:
        found = _readable(target)
        if not (found and _is_interrupted(job, found, target)):
            listed = set(found.files) if found else set()
            _refuse_other_layout(job, target, listed)
            _clear(job, target, listed)
            return Run(job, target, manifest)
    old = Manifest.read(target)
    if old is None:
        foreign = [p.name for p in target.iterdir() if p.name != LOCK_NAME and not p.name.endswith(".partial")]
        if foreign:
            raise NeedsOverwrite(f"{target} is not empty ({sorted(foreign)[0]}) and not an output of this tool")
        return Run(job, target, manifest)
    if differences := old.differences(job.manifest):
        raise NeedsOverwrite(f"{target} holds another conversion: {', '.join(differences)}")
    weights = {file.name for file in job.plan.files}
    kept = old.intact(target, old.files)
    # A small file that somebody has edited is left alone. Where one is missing, all are made again.
    lost_small_files = any(not (target / name).is_file() for name in old.files.keys() - weights)
    if lost_small_files:
        kept &= weights
    manifest.files = {name: old.files[name] for name in kept}
    manifest.records = old.records
    manifest.errors = old.errors  # a file that is made again replaces its errors
    marker = target / manifest.marker
    is_marked = marker.is_file() and marker.read_bytes() == job.marker_content
    return Run(job, target, manifest, len(weights & kept), is_marked and not lost_small_files and weights <= kept)


def _readable(target: Path) -> Manifest | None:
    """The manifest of `target`; None if it has none that can be read."""
    try:
        return Manifest.read(target)
    except BadInput:
        return None


def _is_interrupted(job: Job, old: Manifest, target: Path) -> bool:
    """Whether `target`, with the manifest `old`, holds the unfinished output of this job: --overwrite has begun, and goes on."""
    return not (target / old.marker).exists() and not old.differences(job.manifest)


def _refuse_other_layout(job: Job, target: Path, listed: set[str]) -> None:
    """Weights in the other layout that this tool did not write are not its to remove, and readers would take them if left."""
    others = [pattern for marker, pattern in WEIGHTS.items() if marker != job.manifest.marker]
    for path in sorted(path for pattern in others for path in target.glob(pattern)):
        if path.name not in listed:
            raise UsageError(
                f"{target} holds a checkpoint in the other layout ({path.name}), which --overwrite does not remove:"
                " choose another directory"
            )


def _clear(job: Job, target: Path, listed: set[str]) -> None:
    """Remove a model from `target`: first the marker, so that it never points at files of another conversion."""
    for marker in WEIGHTS:
        if marker == job.manifest.marker or marker in listed:
            (target / marker).unlink(missing_ok=True)
    for name in listed:
        if (target / name).parent.resolve() in (target.resolve(), (target / "original").resolve()):
            (target / name).unlink(missing_ok=True)
    (target / NAME).unlink(missing_ok=True)
    # Readers prefer a bare model.safetensors to an index, and take every rank file that they find.
    for path in target.glob(WEIGHTS[job.manifest.marker]):
        path.unlink()
