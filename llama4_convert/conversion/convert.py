"""`convert` and `plan`: from a source in either layout to a Transformers directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4_convert.conversion.request import Request
from llama4_convert.errors import UsageError
from llama4_convert.progress import Callbacks, Progress, Start, Warn
from llama4_convert.streaming.bounds import DEFAULT_MEMORY_BYTES, Bounds
from llama4_convert.streaming.output_directory import output_directory

if TYPE_CHECKING:
    from llama4_convert.conversion.bound_request import BoundRequest
    from llama4_convert.conversion.results import Conversion, PlanSummary


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    max_memory: int = DEFAULT_MEMORY_BYTES,
    max_error: float | None = None,
    overwrite: bool = False,
    warn: Warn = lambda text: None,
    start: Start = lambda total, done: None,
    progress: Progress = lambda n: None,
    **options: Any,
) -> Conversion:
    """Convert Meta's checkpoint, or a fine-tune in Transformers' layout, at `source` to a Transformers directory at `target`.

    `options` are the fields of `Request`. `max_memory` (bytes) bounds the process's own memory above an idle interpreter.
    `start(total, done)` and `progress(n)` count bytes of tensor data; `progress` may be called from another thread.
    `max_error` bounds the relative squared error of every quantized matrix (CheckFailed beyond). An interrupted conversion is
    continued by the next call; a finished one is left alone. Raises a ConvertError; the target then holds nothing that loads as
    a model.
    """
    request = Request(Path(source), **options)
    bounds = Bounds(max_memory, max_error, overwrite)
    with output_directory(Path(target), request.sources) as output:
        # numpy and the readers are imported once the directory is locked, so that a second process fails at once.
        from llama4_convert.conversion.summaries import conversion_result
        from llama4_convert.streaming.execution import run

        bound = bind(request)
        finished = run(bound.job, output, bounds, Callbacks(warn, start, progress))
        return conversion_result(bound, finished)


def bind(request: Request) -> BoundRequest:
    """Open the source, bind it to the tables, and plan the output. Reads no tensor data.

    Raises UsageError, BadInput or EnvironmentFailed.
    """
    from llama4_convert.checkpoints.layouts import is_meta
    from llama4_convert.conversion.bound_request import bound_request
    from llama4_convert.conversion.from_meta import from_meta
    from llama4_convert.conversion.from_transformers import from_transformers
    from llama4_convert.conversion.with_vision import with_vision

    if request.vision_from is not None:
        source = with_vision(request)
    else:
        source = from_meta(request) if is_meta(request.source) else from_transformers(request)
    return bound_request(request, source)


def plan(
    source: str | os.PathLike[str],
    *,
    gpu: str | None = None,
    gpus: int = 1,
    context: int | None = None,
    **options: Any,
) -> PlanSummary:
    """Summarize what `convert` would write. `options` are the fields of `Request`. Reads no tensor data. Raises a ConvertError.

    With `gpu` ("h100-80gb"), `fit` says in which runtimes the result fits onto `gpus` of them with `context` tokens.
    """
    from llama4_convert.conversion.summaries import plan_summary

    bound = bind(Request(Path(source), **options))
    if gpu is None:
        if context is not None or gpus != 1:
            raise UsageError("--context and --gpus are for --gpu: name one")
        return plan_summary(bound)
    from llama4_convert.fitting.fit import fit_plan

    longest = bound.source.max_position_embeddings
    verdict = fit_plan(bound.job.plan, bound.recipe, gpu=gpu, gpus=gpus, context=context, max_context=longest)
    return plan_summary(bound, verdict)
