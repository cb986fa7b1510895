"""Results of `convert`, `plan` and `export`, made of a bound request and of what a run wrote."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET, UnsetType

from llama4_convert.checkpoints.manifest import DroppedKey, Manifest, describe_errors
from llama4_convert.checkpoints.meta_quantized import CODES
from llama4_convert.conversion.bound_request import BoundRequest
from llama4_convert.conversion.results import (
    Conversion,
    ExportQuantization,
    PlannedFileSummary,
    PlannedQuantization,
    PlannedTensorSummary,
    PlanSummary,
    Quantization,
    Repaired,
    WrittenFile,
)
from llama4_convert.fitting.results import FitVerdict
from llama4_convert.metadata.config_repair import Repair
from llama4_convert.planning.plan import Plan
from llama4_convert.streaming.bounds import DEFAULT_MEMORY_BYTES
from llama4_convert.streaming.memory import peak_memory
from quant.error import relative_mse, sqnr_db
from quant.recipe import Recipe

if TYPE_CHECKING:  # `plan` runs nothing
    from llama4_convert.streaming.job import Run


def plan_summary(bound: BoundRequest, fit: FitVerdict | UnsetType = UNSET) -> PlanSummary:
    job, plan = bound.job, bound.job.plan
    return PlanSummary(
        source=str(bound.request.source),
        ranks=bound.ranks,
        variant=bound.source.variant,
        variant_reason=bound.source.variant_reason,
        dtype=plan.main_dtype,
        parameters=plan.parameters,
        output_bytes=plan.output_bytes,
        peak_memory_bytes=peak_memory(DEFAULT_MEMORY_BYTES, job.tokenizer_bytes, plan),
        max_position_embeddings=bound.source.max_position_embeddings,
        files=[PlannedFileSummary(file=f.name, bytes=f.size, tensors=len(f.tensors)) for f in plan.files],
        tensors=[
            PlannedTensorSummary(
                name=t.name,
                dtype=t.dtype,
                shape=list(t.shape),
                file=f.name,
                offset=t.offset,
                bytes=t.nbytes,
                sources=sorted({piece.key for piece in t.pieces}),
            )
            for f in plan.files
            for t in f.tensors
        ],
        dropped=dropped(plan),
        warnings=list(job.warnings),
        quantization=planned_quantization(bound.recipe, plan) if bound.recipe else UNSET,
        adapter=bound.adapter.summary(plan) if bound.adapter else UNSET,
        repaired=_repaired(bound.source.repaired),
        fit=fit,
    )


def conversion_result(bound: BoundRequest, run: Run) -> Conversion:
    plan = bound.job.plan
    return Conversion(
        status="already complete" if run.was_complete else "converted",
        output=str(run.output),
        variant=bound.source.variant,
        variant_reason=bound.source.variant_reason,
        parameters=plan.parameters,
        output_bytes=plan.output_bytes,
        dropped=dropped(plan),
        adapter=bound.adapter.summary(plan) if bound.adapter else UNSET,
        repaired=_repaired(bound.source.repaired),
        files=written_files(run.manifest),
        files_kept_from_earlier_run=run.kept_weights,
        warnings=list(bound.job.warnings),
        nonfinite=run.nonfinite,
        quantization=_quantization(bound.recipe, plan, run.manifest) if bound.recipe else UNSET,
    )


def dropped(plan: Plan) -> list[DroppedKey]:
    return [DroppedKey(name=name, why=why) for name, why in plan.dropped.items()]


def written_files(manifest: Manifest) -> list[WrittenFile]:
    return [
        WrittenFile(file=name, sha256=entry.sha256, size=entry.size) for name, entry in sorted(manifest.files.items())
    ]


def _repaired(repairs: Sequence[Repair] | None) -> list[Repaired] | UnsetType:
    return UNSET if repairs is None else [Repaired(**one._asdict()) for one in repairs]


def planned_quantization(recipe: Recipe, plan: Plan) -> PlannedQuantization:
    """Sizes before and after. Before encoding a matrix counts as it is gathered: codes of a quantized source in bf16."""
    before: dict[str, int] = defaultdict(int)
    after: dict[str, int] = defaultdict(int)
    weights = quantized_bytes = 0
    kept = [encoded for encoded in plan.matrices if encoded.keeps_bits]
    scales = {f"{encoded.matrix.module}.weight_scale": encoded for encoded in kept}  # copied, so they are no parts
    for tensor in plan.tensors:
        encoded = tensor.part.matrix if tensor.part else scales.get(tensor.name)
        if encoded is None:
            before["other"] += tensor.nbytes
            after["other"] += tensor.nbytes
            continue
        after[encoded.matrix.family] += tensor.nbytes
        if encoded.scheme:
            quantized_bytes += tensor.nbytes
    for encoded in plan.matrices:
        numbers = encoded.matrix.n * encoded.matrix.k
        before[encoded.matrix.family] += 2 * numbers if encoded.keeps_bits else encoded.gathered.nbytes
        if encoded.scheme:
            weights += numbers
    return PlannedQuantization(
        recipe=recipe.name,
        kept_bits=len(kept),
        bytes_before=dict(sorted(before.items())),
        bytes_after=dict(sorted(after.items())),
        bits_per_quantized_weight=8 * quantized_bytes / weights if weights else None,
    )


def _quantization(recipe: Recipe, plan: Plan, manifest: Manifest) -> Quantization:
    sizes = msgspec.to_builtins(planned_quantization(recipe, plan))
    return msgspec.convert({**sizes, **msgspec.to_builtins(describe_errors(manifest.errors))}, Quantization)


def export_quantization(recipe: Recipe, plan: Plan, errors: Mapping[str, Sequence[float]]) -> ExportQuantization:
    codes = [tensor for tensor in plan.tensors if tensor.dtype == CODES]
    made = [tensor.scales.experts for tensor in codes if tensor.scales]
    relative = relative_mse(math.fsum(e for e, _ in errors.values()), math.fsum(p for _, p in errors.values()))
    return ExportQuantization(
        recipe=recipe.name,
        matrices=sum(made),
        kept_bits=(len(codes) - len(made)) * (plan.geometry.n_experts or 0),
        relative_mse=relative,
        sqnr_db=sqnr_db(relative),
    )
