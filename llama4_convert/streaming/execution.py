"""Carries a job out: one owner of the output, file by file, resumable, committed by the file that makes it a model."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4_convert.checkpoints.manifest import Manifest
from llama4_convert.errors import BadInput, CheckFailed, EnvironmentFailed, UsageError, from_os_error
from llama4_convert.files import LOCK_NAME, PARTIAL_SUFFIX, locked
from llama4_convert.progress import Progress, Start, Warn
from llama4_convert.streaming.bounds import LEAST_MEMORY, Bounds
from llama4_convert.streaming.output_directory import (
    NeedsOverwrite,
    check_no_obstacle,
    clear,
    make_folder,
    refuse_other_kind,
)

if TYPE_CHECKING:
    from llama4_convert.streaming.job import Job
    from llama4_convert.streaming.run_result import RunResult


_SHOWN = 3  # tensors that a warning names


def execute(
    make_job: Callable[[], Job],
    sources: Sequence[Path],
    target: Path,
    bounds: Bounds,
    warn: Warn,
    start: Start,
    progress: Progress,
) -> dict[str, Any]:
    """Own `target`, plan, and write; what was interrupted goes on, what is finished is left alone.

    `sources` are directories that are only read. `make_job` is called once the lock is held, so that who comes second is told
    at once. Raises a ConvertError; the target then holds nothing that loads as a model.
    """
    # `original` is where a Transformers directory keeps params.json.
    for source in sources:
        for ours, theirs in ((target, source), (target / "original", source), (target, source / "original")):
            if ours.exists() and theirs.exists() and os.path.samefile(ours, theirs):
                raise UsageError(f"the output would overwrite the source in {theirs}: choose another directory")
    made_folder = make_folder(target)
    try:
        with locked(target):
            return _Execution(make_job(), target, bounds, warn, start, progress).run()
    except OSError as error:
        raise from_os_error(error, f"writing {target}") from error
    finally:
        if made_folder:
            with contextlib.suppress(OSError):  # not empty, or gone: somebody else is at work there
                target.rmdir()


class _Execution:
    def __init__(
        self,
        job: Job,
        target: Path,
        bounds: Bounds,
        warn: Warn,
        start: Start,
        progress: Progress,
    ) -> None:
        self.job, self.target, self.bounds = job, target, bounds
        self.warn, self.start, self.progress = warn, start, progress
        self.manifest = job.manifest()
        self.marker, self.marker_content = job.marker, job.marker_content()
        self.lost_small_files = False

    def run(self) -> dict[str, Any]:
        for text in self.job.warnings:
            self.warn(text)
        contents = self.job.contents()
        if (needed := self.job.peak_memory(LEAST_MEMORY)) > max(self.bounds.max_memory, 2 * LEAST_MEMORY):
            raise UsageError(f"max-memory must be at least {(needed >> 20) + 1} MiB: " + self._what_takes_memory())
        check_no_obstacle(self.target)
        resumed = self._look_at_target()
        if self._is_finished():
            return self._result("already complete", resumed)
        (self.target / self.marker).unlink(missing_ok=True)
        self.manifest.files.pop(self.marker, None)
        self._check_space()
        self.manifest.write(self.target)
        for first, make in contents.items():
            if first not in self.manifest.files:
                for name, data in make().items():
                    self._write_small(name, data)
        overflows = self._write_weights()
        for name, n in overflows.items():
            self.warn(f"{name}: {n} numbers were too large for {self.job.dtype or 'its dtype'} and became infinite")
        self._warn_of_nonfinite()
        for name, data in self.job.closing(self.manifest).items():
            self._write_small(name, data)
        self.manifest.add(self.marker, hashlib.sha256(self.marker_content).hexdigest(), len(self.marker_content))
        self.manifest.write(self.target)
        self._write_small(self.marker, self.marker_content)
        return self._result("converted", resumed)

    def _what_takes_memory(self) -> str:
        if self.job.plan.changed:
            return "an adapter's matrix is multiplied whole"
        return "a matrix is quantized whole" if self.job.recipe else "the source's tokenizer takes that"

    def _look_at_target(self) -> int:
        """Take over what an earlier run of the same conversion finished; refuse or clear anything else."""
        old = None
        if self.bounds.overwrite and not self._is_interrupted():
            refuse_other_kind(self.target, self.job)
            clear(self.target, self.job)
        else:
            old = Manifest.read(self.target)
            foreign = [p.name for p in self.target.iterdir() if p.name != LOCK_NAME and not p.name.endswith(".partial")]
            if old is None and foreign:
                raise NeedsOverwrite(
                    f"{self.target} is not empty ({sorted(foreign)[0]}) and not an output of this tool"
                )
        if old is None:
            return 0
        if differences := old.differences(self.manifest):
            raise NeedsOverwrite(f"{self.target} holds another conversion: {', '.join(differences)}")
        kept = old.intact(self.target, old.files)
        weights = {f.name for f in self.job.plan.files}
        # One that somebody has edited is left alone; one that is missing is made again, with its whole group.
        self.lost_small_files = any(not (self.target / name).is_file() for name in old.files.keys() - weights)
        if self.lost_small_files:
            kept &= weights
        self.manifest.files = {name: old.files[name] for name in kept}
        self.manifest.records = old.records
        self.manifest.errors = old.errors  # of files that are made again they are made again too
        return len(self._weights_done())

    def _is_interrupted(self) -> bool:
        """Whether the target holds the unfinished output of this very conversion: --overwrite has begun, and goes on."""
        try:
            old = Manifest.read(self.target)
        except BadInput:
            return False
        return old is not None and not (self.target / self.marker).exists() and not old.differences(self.manifest)

    def _weights_done(self) -> set[str]:
        return {f.name for f in self.job.plan.files} & self.manifest.files.keys()

    def _is_finished(self) -> bool:
        marker = self.target / self.marker
        names = {f.name for f in self.job.plan.files}
        return (
            not self.lost_small_files
            and marker.is_file()
            and marker.read_bytes() == self.marker_content
            and names <= self.manifest.files.keys()
        )

    def _check_space(self) -> None:
        left = [f for f in self.job.plan.files if f.name not in self.manifest.files]
        for file in left:  # what a killed run left may hold the very space that is needed
            (self.target / (file.name + PARTIAL_SUFFIX)).unlink(missing_ok=True)
        needed = sum(f.size for f in left) + (64 << 20)  # and room for the tokenizer and other small files
        system = os.statvfs(self.target)
        free = system.f_bavail * system.f_frsize
        if free < needed:
            raise EnvironmentFailed(
                f"{self.target} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed: free some space or choose"
                " another disk"
            )
        files = len(left) + 32  # and small ones
        if system.f_files and system.f_favail < files:
            raise EnvironmentFailed(
                f"{self.target} has {system.f_favail:,} inodes free, {files:,} are needed: remove some files, or choose another"
                " disk"
            )

    def _write_small(self, name: str, data: bytes) -> None:
        from llama4_convert.files import write_small

        path = self.target / name
        path.parent.mkdir(exist_ok=True)
        self.manifest.add(name, write_small(path, data), len(data))

    def _write_weights(self) -> dict[str, int]:
        from llama4_convert.checkpoints.digests import check_promised
        from llama4_convert.checkpoints.pth import DamagedRecord
        from llama4_convert.streaming.memory import planned_buffers
        from llama4_convert.streaming.resume import resumed
        from llama4_convert.streaming.run_result import RunResult
        from llama4_convert.streaming.source import Source
        from llama4_convert.streaming.write_file import check_unread, write_file
        from llama4_convert.streaming.writer import FileWriter, Workers

        going_on = resumed(self.job.plan, self._weights_done(), self.manifest.records)
        plan, left = going_on.plan, going_on.left
        for file in left:
            self.manifest.files.pop(file.name, None)
        promised = self.job.promised
        checks = sum(record.size for _, record in plan.unread) + sum(path.stat().st_size for path in promised)
        total = sum(f.work for f in plan.files) + checks
        self.start(total, total - sum(f.work for f in left) - checks)
        result, allow_nonfinite = RunResult(), self.job.allow_nonfinite
        buffers = planned_buffers(self.bounds.max_memory)
        try:
            with Source(self.job.source.archives, going_on.running) as source, Workers() as workers:
                check_unread(plan, source, self.progress)
                check_promised(promised, self.progress)
                for file in left:
                    with FileWriter(self.target / file.name, file.size, buffers, workers) as writer:
                        write_file(plan, file, source, writer, result, self.progress, allow_nonfinite)
                        self._take_errors(result)
                        digest = writer.commit()
                    self.manifest.add(file.name, digest, file.size, result.taken_nonfinite())
                    self.manifest.records = dict(source.running)
                    self.manifest.write(self.target)
        except DamagedRecord as damage:
            rank = [archive.path for archive in self.job.source.archives].index(damage.path)
            self._disown((rank, damage.record))
            raise
        return result.overflows

    def _disown(self, key: tuple[int, str]) -> None:
        """Finished files that the damaged record went into are made again.

        So are those of other records of the same rank that were read in part: of a new download they must not be continued.
        """
        from llama4_convert.streaming.resume import first_reads

        suspect = {key, *(other for other in self.manifest.records if other[0] == key[0])}
        used = [
            f.name for f in self.job.plan.files if f.name in self.manifest.files and suspect & first_reads(f).keys()
        ]
        for name in used:
            del self.manifest.files[name]
        self.manifest.records = {k: state for k, state in self.manifest.records.items() if k not in suspect}
        if used:
            self.manifest.write(self.target)

    def _take_errors(self, result: RunResult) -> None:
        """Into the manifest, with the file that they belong to. Raises CheckFailed beyond what was allowed."""
        from quant.error import relative_mse

        for module, (error, power) in result.errors.items():
            if self.bounds.max_error is not None and not relative_mse(error, power) <= self.bounds.max_error:
                raise CheckFailed(
                    f"{module}: a relative squared error of {relative_mse(error, power):.4g} is more than the"
                    f" {self.bounds.max_error:g} that --max-error allows"
                )
            self.manifest.errors[module] = [error, power]
        result.errors.clear()

    def _nonfinite(self) -> list[dict[str, Any]]:
        """Where NaN and infinities are, how many, and whether they were replaced because they were quantized."""
        replaced = {
            planned.gathered.name for planned in self.job.plan.matrices if planned.scheme and not planned.keeps_bits
        }
        return [
            {"tensor": name, "nan": nan, "inf": inf, "replaced": name in replaced}
            for name, (nan, inf) in sorted(self.manifest.nonfinite().items())
        ]

    def _warn_of_nonfinite(self) -> None:
        from llama4_convert.checkpoints.numbers import NonFinite

        found = self._nonfinite()
        for replaced, what in ((False, "kept as they are"), (True, "quantized as 0 and as the largest magnitude")):
            named = [
                f"{one['tensor']} ({NonFinite(one['nan'], one['inf'])})" for one in found if one["replaced"] == replaced
            ]
            if named:
                more = f" and {len(named) - _SHOWN} more tensors, which inspect lists" if len(named) > _SHOWN else ""
                self.warn(f"numbers that are not finite, {what}: {', '.join(named[:_SHOWN])}{more}")

    def _result(self, status: str, resumed: int) -> dict[str, Any]:
        files = [{"file": name, "sha256": e.sha256, "size": e.size} for name, e in sorted(self.manifest.files.items())]
        return {
            "status": status,
            "output": str(self.target),
            **self.job.told(),
            "files": files,
            "files_kept_from_earlier_run": resumed,
            "warnings": self.job.warnings,
            "nonfinite": self._nonfinite(),
            **self._quantization(),
        }

    def _quantization(self) -> dict[str, Any]:
        if self.job.recipe is None:
            return {}
        errors = {module: (pair[0], pair[1]) for module, pair in self.manifest.errors.items()}
        return {"quantization": self.job.quantization(errors)}
