"""`convert` and `plan`: from a source in either layout to a Transformers directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4_convert.conversion.request import Request
from llama4_convert.errors import UsageError
from llama4_convert.progress import Progress, Start, Warn
from llama4_convert.streaming.bounds import DEFAULT_MEMORY, Bounds
from llama4_convert.streaming.execution import execute

if TYPE_CHECKING:
    from llama4_convert.conversion.job import ConversionJob


def job_of(request: Request) -> ConversionJob:
    """The job for the layout that the source is in. Raises UsageError, BadInput or EnvironmentFailed."""
    # The readers import numpy; taking the lock must not wait for that.
    from llama4_convert.checkpoints import is_meta

    if request.vision_from is not None:
        from llama4_convert.conversion.with_vision import VisionJob

        return VisionJob(request)
    if not is_meta(request.source):
        from llama4_convert.conversion.from_transformers import TransformersJob

        return TransformersJob(request)
    if request.config_from is not None:
        raise UsageError(f"{request.source} has a params.json: --config-from repairs a Transformers directory")
    from llama4_convert.conversion.from_meta import MetaJob

    return MetaJob(request)


def plan(
    source: str | os.PathLike[str],
    *,
    gpu: str | None = None,
    gpus: int = 1,
    context: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What `convert` would write, as the JSON of the design says. Options: those of `Request`. Reads no tensor data.

    With `gpu` ("h100-80gb"), `fit` says in which runtimes the result fits onto `gpus` of them with `context` tokens.
    """
    job = job_of(Request(Path(source), **options))
    described = job.describe()
    if gpu is None:
        if context is not None or gpus != 1:
            raise UsageError("--context and --gpus are for --gpu: name one")
        return described
    from llama4_convert.fitting.fit import fit_plan

    longest = job.max_position_embeddings
    verdict = fit_plan(job.plan, job.recipe, gpu=gpu, gpus=gpus, context=context, max_context=longest)
    return {**described, "fit": verdict}


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    max_memory: int = DEFAULT_MEMORY,
    max_error: float | None = None,
    overwrite: bool = False,
    warn: Warn = lambda text: None,
    start: Start = lambda total, done: None,
    progress: Progress = lambda n: None,
    **options: Any,
) -> dict[str, Any]:
    """Convert Meta's checkpoint, or a fine-tune in Transformers' layout, at `source` to a Transformers directory at `target`.

    `options` are the fields of `Request`. `max_memory` (bytes) bounds the process's own memory above an idle interpreter.
    `start(total, done)` and `progress(n)` count bytes of tensor data; `progress` may be called from another thread.
    An interrupted conversion goes on when called again; a finished one is left alone.
    `max_error` bounds the relative squared error of every quantized matrix (CheckFailed beyond).
    Raises a ConvertError; the target then holds nothing that loads as a model.
    """
    request = Request(Path(source), **options)
    bounds = Bounds(max_memory, max_error, overwrite)
    others = (request.adapter, request.vision_from, request.config_from)
    sources = [Path(path) for path in (source, *others) if path is not None]
    return execute(lambda: job_of(request), sources, Path(target), bounds, warn, start, progress)
