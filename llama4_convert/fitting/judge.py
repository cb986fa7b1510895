"""The verdict on a deployment: what each runtime makes of it, and what fits instead where none holds it."""

from __future__ import annotations

from dataclasses import replace

from msgspec import structs

from llama4_convert.errors import UsageError
from llama4_convert.fitting.advice import advice, best_recipe, gpus_that_fit, recipes_that_fit
from llama4_convert.fitting.deployment import Deployment, has_fp8_kv, largest_context, memory_use, refusal
from llama4_convert.fitting.gpus import allowances
from llama4_convert.fitting.memory import layer_counts
from llama4_convert.fitting.results import FamilySizes, FitVerdict, GpuMemory, RuntimeVerdict
from llama4_convert.fitting.runtimes import FORMATS, Runtime, runtimes
from llama4_convert.fitting.serving import command, notes

_LARGEST_NUMBER = 1 << 40  # of GPUs, sequences or tokens: sizes stay within what a float holds


def judge(deployment: Deployment) -> FitVerdict:
    """The verdict of every runtime, and what would fit. Raises UsageError where numbers of GPUs or tokens are out of bounds."""
    if deployment.format is not None and deployment.format not in FORMATS:
        raise ValueError(f"format must be None or one of {', '.join(FORMATS)}, not {deployment.format!r}")
    for what, value in (
        ("number of GPUs", deployment.n_gpus),
        ("number of sequences", deployment.sequences),
        ("context", deployment.context),
    ):
        if value is not None and value < 1:
            raise UsageError(f"the {what} must be at least 1, not {value}")
        if value is not None and value > _LARGEST_NUMBER:
            raise UsageError(f"the {what} must be at most {_LARGEST_NUMBER:,}")
    verdicts = tuple(_verdict(deployment, runtime) for runtime in runtimes())
    fits = any(v.fits for v in verdicts)
    recipes = recipes_that_fit(deployment)
    elsewhere = () if fits else tuple(gpus_that_fit(deployment))
    first = memory_use(deployment, runtimes()[0])
    full, chunked = layer_counts(deployment.geometry)
    return FitVerdict(
        gpu=deployment.gpu.key,
        n_gpus=deployment.n_gpus,
        gpu_bytes=deployment.gpu.nbytes,
        weight_bytes=deployment.weights.total,
        weight_bytes_by_kind=FamilySizes(*structs.astuple(deployment.weights)),
        format=deployment.format,
        context=deployment.context,
        sequences=deployment.sequences,
        fits=fits,
        weights=first.weights,
        kv_cache=max(0, deployment.usable_bytes - first.activations() - first.weights),
        activations=first.activations(),
        context_overhead=allowances().overhead.nbytes,
        kv_bytes_per_token_per_layer=first.cache.token_bytes,
        kv_bytes_per_token=first.cache.token_bytes * full,
        kv_bytes_of_chunked_layers=first.cache.token_bytes * chunked * (deployment.geometry.chunk_size or 0),
        runtimes=verdicts,
        best_recipe=best_recipe(deployment, recipes),
        elsewhere=elsewhere,
        advice="" if fits else advice(deployment, recipes, elsewhere),
    )


def _verdict(deployment: Deployment, runtime: Runtime) -> RuntimeVerdict:
    if reason := refusal(deployment, runtime):
        return RuntimeVerdict(
            runtime=runtime.name,
            fits=False,
            max_context=0,
            max_context_fp8_kv=None,
            command="",
            note=reason,
            memory=None,
        )
    largest = largest_context(deployment, runtime)
    fits = largest >= deployment.needed_context
    served = deployment.context if fits and deployment.context is not None else largest
    with_fp8_kv = replace(deployment, fp8_kv=True)
    use = memory_use(deployment, runtime)
    return RuntimeVerdict(
        runtime=runtime.name,
        fits=fits,
        max_context=largest,
        max_context_fp8_kv=largest_context(with_fp8_kv, runtime) if has_fp8_kv(with_fp8_kv, runtime) else None,
        command=command(deployment, runtime, served) if largest else "",
        note="; ".join(notes(deployment, runtime, largest)),
        memory=GpuMemory(
            weights=use.weights,
            kv_cache=use.cache.nbytes(served, deployment.sequences),
            activations=use.activations(served),
            context_overhead=allowances().overhead.nbytes,
        ),
    )
