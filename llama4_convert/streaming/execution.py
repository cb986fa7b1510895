"""Carries a job out: small files, weights file by file, the model card, and last the file that makes the directory a model.

Every finished file is entered into the manifest, so that the same command continues an interrupted run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama4_convert.checkpoints.digests import check_digests
from llama4_convert.checkpoints.families import active_parameters
from llama4_convert.checkpoints.manifest import Manifest
from llama4_convert.checkpoints.numbers import NonFinite
from llama4_convert.checkpoints.pth import DamagedRecord
from llama4_convert.errors import CheckFailed, EnvironmentFailed, UsageError
from llama4_convert.files import PARTIAL_SUFFIX, write_small
from llama4_convert.metadata.model_card import CARD, Facts, render
from llama4_convert.progress import Callbacks, Warn
from llama4_convert.streaming.bounds import LEAST_MEMORY_BYTES, Bounds
from llama4_convert.streaming.earlier_run import take_over
from llama4_convert.streaming.fill import Findings
from llama4_convert.streaming.job import Job, Run
from llama4_convert.streaming.memory import BUFFERS, buffer_bytes, peak_memory
from llama4_convert.streaming.output_directory import check_no_obstacle
from llama4_convert.streaming.resume import first_reads, left_to_do
from llama4_convert.streaming.source import Source
from llama4_convert.streaming.write_file import check_beforehand, write_file
from llama4_convert.streaming.writer import Buffers, FileWriter
from quant.error import relative_mse

_SMALL_FILES_BYTES, _MAX_SMALL_FILES = 64 << 20, 32  # space for the tokenizer and the other small files
_NAMED_TENSORS = 3  # in a warning


def run(job: Job, output: Path, bounds: Bounds, callbacks: Callbacks) -> Run:
    """Write `job` to `output`, an owned directory; continue an interrupted run, and leave a finished output alone.

    Raises a ConvertError; `output` then holds nothing that loads as a model.
    """
    for text in job.warnings:
        callbacks.warn(text)
    small_files = job.contents()
    _check_memory(job, bounds)
    check_no_obstacle(output)
    found = take_over(job, output, overwrite=bounds.overwrite)
    manifest = found.manifest
    if not found.was_complete:
        (output / manifest.marker).unlink(missing_ok=True)
        manifest.files.pop(manifest.marker, None)
        _check_space(job, output, manifest)
        manifest.write(output)
        _write_small_files(job, small_files, output, manifest)
        overflows = _write_weights(job, output, manifest, bounds, callbacks)
        _warn_of_numbers(found, overflows, callbacks.warn)
        if (
            "config.json" in small_files
        ):  # Meta's layout has no card. It states the errors of the weights: written behind them
            card = model_card(job, json.loads(small_files["config.json"]), manifest)
            _write_small(output, CARD, card.encode(), manifest)
        _commit(job, output, manifest)
    return found


def _check_memory(job: Job, bounds: Bounds) -> None:
    needed = peak_memory(LEAST_MEMORY_BYTES, job.tokenizer_bytes, job.plan)
    if needed <= max(bounds.max_memory, 2 * LEAST_MEMORY_BYTES):
        return
    if job.plan.changed:
        reason = "an adapter's matrix is multiplied whole"
    else:
        reason = "a matrix is quantized whole" if job.plan.linear_layers else "the source's tokenizer takes that"
    raise UsageError(f"max-memory must be at least {(needed >> 20) + 1} MiB: {reason}")


def _check_space(job: Job, output: Path, manifest: Manifest) -> None:
    left = [file for file in job.plan.files if file.name not in manifest.files]
    for file in left:  # a killed run's partial file may hold the very space that is needed
        (output / (file.name + PARTIAL_SUFFIX)).unlink(missing_ok=True)
    needed = sum(file.size for file in left) + _SMALL_FILES_BYTES
    system = os.statvfs(output)
    free = system.f_bavail * system.f_frsize
    if free < needed:
        raise EnvironmentFailed(
            f"{output} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed: free some space or choose another disk"
        )
    inodes = len(left) + _MAX_SMALL_FILES
    if system.f_files and system.f_favail < inodes:
        raise EnvironmentFailed(
            f"{output} has {system.f_favail:,} inodes free, {inodes:,} are needed: remove some files, or choose another disk"
        )


def _write_small_files(job: Job, small_files: Mapping[str, bytes], output: Path, manifest: Manifest) -> None:
    for name, data in small_files.items():
        if name not in manifest.files:
            _write_small(output, name, data, manifest)
    if job.tokenizer and job.tokenizer.first_file not in manifest.files:
        for name, data in job.tokenizer.files().items():
            _write_small(output, name, data, manifest)


def _write_small(output: Path, name: str, data: bytes, manifest: Manifest) -> None:
    path = output / name
    path.parent.mkdir(exist_ok=True)
    manifest.add(name, write_small(path, data), len(data))


def _write_weights(job: Job, output: Path, manifest: Manifest, bounds: Bounds, callbacks: Callbacks) -> dict[str, int]:
    """Write every weight file that is not finished. Returns the numbers that a cast made infinite, by tensor."""
    plan, left, running = left_to_do(job.plan, manifest.files, manifest.records)
    for file in left:
        manifest.files.pop(file.name, None)
    checks = sum(record.size for _, record in plan.checked_beforehand)
    checks += sum(path.stat().st_size for path in job.expected_digests)
    total = sum(file.work for file in plan.files) + checks
    callbacks.start(total, total - sum(file.work for file in left) - checks)
    findings = Findings()
    try:
        with (
            Source(job.source_files, running) as source,
            Buffers(BUFFERS, buffer_bytes(bounds.max_memory)) as buffers,
        ):
            check_beforehand(plan, source, callbacks.progress)
            check_digests(job.expected_digests, callbacks.progress)
            for file in left:
                with FileWriter(output / file.name, file.size, buffers) as writer:
                    write_file(plan, file, source, writer, findings, callbacks.progress, job.allow_nonfinite)
                    _check_errors(findings.errors, bounds.max_error)
                    digest = writer.commit()
                manifest.add(file.name, digest, file.size, findings.nonfinite)
                manifest.errors |= {module: list(sums) for module, sums in findings.errors.items()}
                manifest.records = dict(source.running)
                manifest.write(output)
                findings.nonfinite, findings.errors = {}, {}
    except DamagedRecord as damage:
        _forget_damaged(damage, job, output, manifest)
        raise
    return findings.overflows


def _forget_damaged(damage: DamagedRecord, job: Job, output: Path, manifest: Manifest) -> None:
    """Have finished files that the damaged record went into made again.

    So are those of other records of the same file that were read in part: a new download must not continue them.
    """
    number = [file.path for file in job.source_files].index(damage.path)
    suspect = {(number, damage.record), *(key for key in manifest.records if key[0] == number)}
    used = [f.name for f in job.plan.files if f.name in manifest.files and suspect & first_reads(f).keys()]
    for name in used:
        del manifest.files[name]
    manifest.records = {key: state for key, state in manifest.records.items() if key not in suspect}
    if used:
        manifest.write(output)


def _check_errors(errors: Mapping[str, tuple[float, float]], max_error: float | None) -> None:
    """Raises CheckFailed for a matrix whose relative error is beyond `max_error`."""
    for module, (error, power) in errors.items():
        if max_error is not None and not relative_mse(error, power) <= max_error:
            raise CheckFailed(
                f"{module}: a relative squared error of {relative_mse(error, power):.4g} is more than the"
                f" {max_error:g} that --max-error allows"
            )


def _warn_of_numbers(found: Run, overflows: Mapping[str, int], warn: Warn) -> None:
    for name, n in overflows.items():
        warn(f"{name}: {n} numbers were too large for {found.job.dtype or 'its dtype'} and became infinite")
    for replaced, treatment in ((False, "kept as they are"), (True, "quantized as 0 and as the largest magnitude")):
        named = [f"{one.tensor} ({NonFinite(one.nan, one.inf)})" for one in found.nonfinite if one.replaced == replaced]
        if named:
            left = len(named) - _NAMED_TENSORS
            more = f" and {left} more tensors, which inspect lists" if left > 0 else ""
            warn(f"numbers that are not finite, {treatment}: {', '.join(named[:_NAMED_TENSORS])}{more}")


def model_card(job: Job, config: Mapping[str, Any], manifest: Manifest) -> str:
    """README.md of an output with this config.json and `manifest`."""
    counts, g = job.plan.parameters_by_kind(), job.plan.geometry
    return render(Facts(manifest, config, sum(counts.values()), active_parameters(counts, g.n_experts, g.top_k)))


def _commit(job: Job, output: Path, manifest: Manifest) -> None:
    """The manifest lists the marker before it is written: with the marker the directory is a model, and complete."""
    manifest.add(manifest.marker, hashlib.sha256(job.marker_content).hexdigest(), len(job.marker_content))
    manifest.write(output)
    write_small(output / manifest.marker, job.marker_content)
