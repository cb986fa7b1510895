"""What the command line prints: sizes, progress and summaries. Library code never prints; it is called back from here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama4_convert.formatting import counted, gigabytes, parameters

if TYPE_CHECKING:  # `--help` loads none of the result types
    from llama4_convert.checkpoints.manifest import DroppedKey
    from llama4_convert.conversion.results import Conversion, Export, PlannedQuantization, PlanSummary
    from llama4_convert.inspection.verify import Verification


def plan_summary(plan: PlanSummary) -> str:
    lines = [
        f"{plan.source}: {counted(plan.ranks, 'rank')}, {parameters(plan.parameters)}, {plan.dtype}",
        f"variant  {plan.variant} ({plan.variant_reason}), context {plan.max_position_embeddings:,} tokens",
        f"output   {counted(len(plan.tensors), 'tensor')} in {counted(len(plan.files), 'file')},"
        f" {gigabytes(plan.output_bytes)}",
        f"memory   {plan.peak_memory_bytes / (1 << 20):.0f} MiB of its own",
    ]
    lines += dropped_lines(plan.dropped)
    lines += fine_tune_lines(plan)
    if plan.quantization:
        lines += quantization_summary(plan.quantization)
    if plan.fit:
        from llama4_convert.fitting.table import fit_summary

        lines.append(fit_summary(plan.fit))
    return "\n".join(lines)


def dropped_lines(dropped: Sequence[DroppedKey]) -> list[str]:
    """A line a reason."""
    reasons: dict[str, list[str]] = {}
    for entry in dropped:
        reasons.setdefault(entry.why, []).append(entry.name)
    more = {why: f" and {len(names) - 1} more" if len(names) > 1 else "" for why, names in reasons.items()}
    return [f"dropped  {names[0]}{more[why]}: {why}" for why, names in reasons.items()]


def convert_summary(result: Conversion) -> str:
    if result.status == "already complete":
        return f"{result.output} is complete already: nothing was touched"
    weights = [f for f in result.files if f.file.startswith("model-")]
    kept = result.files_kept_from_earlier_run
    resumed = f" ({kept} kept from the run before)" if kept else ""
    dropped = dropped_lines(result.dropped)
    line = (
        f"{result.output}: {parameters(result.parameters)}, {gigabytes(result.output_bytes)} in"
        f" {counted(len(weights), 'file')}{resumed}, variant {result.variant} ({result.variant_reason})"
    )
    recipe = quantization_summary(result.quantization) if result.quantization else []
    return "\n".join([line, *dropped, *fine_tune_lines(result), *recipe])


def fine_tune_lines(result: PlanSummary | Conversion) -> list[str]:
    """What an adapter does, and how much of a config.json was repaired (the warnings say what)."""
    lines = []
    if adapter := result.adapter:
        ranks = ", ".join(map(str, adapter.ranks))
        merged = f"{adapter.matrices_merged:,} matrices of rank {ranks}" if adapter.ranks else "no matrices"
        replaced = len(adapter.tensors_replaced)
        lines.append(f"adapter  {merged} merged" + (f", {replaced} tensors replaced" if replaced else ""))
    if repaired := result.repaired:
        lines.append(f"repaired {', '.join(one.field for one in repaired)}")
    return lines


def export_summary(result: Export) -> str:
    if result.status == "already complete":
        return f"{result.output} is complete already: nothing was touched"
    kept = result.files_kept_from_earlier_run
    resumed = f" ({kept} kept from the run before)" if kept else ""
    size = f"{parameters(result.parameters)}, {gigabytes(result.output_bytes)}"
    line = f"{result.output}: {size} in {counted(result.ranks, 'rank file')}{resumed}"
    lines = [line, *dropped_lines(result.dropped)]
    if made := result.quantization:
        own = f", {made.kept_bits} with the source's own codes and scales" if made.kept_bits else ""
        error = f"relative squared error {made.relative_mse:.4g}"
        lines.append(f"recipe   {made.recipe}: {made.matrices} matrices quantized, {error}{own}")
    return "\n".join(lines)


def quantization_summary(quantization: PlannedQuantization) -> list[str]:
    """What a recipe does to the bytes, and, once it is done, the error that it made."""
    kinds = ", ".join(
        f"{kind.replace('_', ' ')} {gigabytes(quantization.bytes_before[kind])} to {gigabytes(size)}"
        for kind, size in quantization.bytes_after.items()
        if kind != "other"
    )
    lines = [
        f"recipe   {quantization.recipe}: {kinds}; {quantization.bits_per_quantized_weight:.3g} bits a quantized weight"
    ]
    if quantization.kept_bits:
        lines.append(f"kept     {quantization.kept_bits} matrices have the source's codes and scales, bit by bit")
    from llama4_convert.conversion.results import Quantization

    if isinstance(quantization, Quantization) and quantization.families:
        families = ", ".join(
            f"{family.replace('_', ' ')} {summed.relative_mse:.4g}" for family, summed in quantization.families.items()
        )
        lines.append(f"error    relative squared error {families}; of single matrices the largest:")
        lines += [f"         {w.relative_mse:<8.4g}  {w.module}" for w in quantization.worst]
    return lines


def verify_summary(result: Verification) -> str:
    lines = []
    for file in result.files:
        status = "ok" if file.ok else "MISSING" if file.note.startswith(("missing", "not written")) else "DAMAGED"
        if not file.ok and file.note.startswith("not recorded"):
            status = "UNKNOWN"
        lines.append(f"{status:7}  {file.file}" + (f"  ({file.note})" if file.note else ""))
    reasons = Counter(" and ".join(_PROMISES[what] for what in file.against) for file in result.files if file.ok)
    lines += [f"{counted(n, 'file')} as {why or 'nothing tells: they were only read'}" for why, n in reasons.items()]
    return "\n".join(lines)


_PROMISES = {
    "manifest": "the SHA-256 in llama4-convert.json says",
    "checklist": "the MD5 in checklist.chk says",
    "CRC": "the CRCs inside say",
    "list": "the published ids say",
}
