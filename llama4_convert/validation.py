"""`validate`: whether a checkpoint computes what the original computes, and if not, which tensor or field is to blame.

Three questions, each answered for itself. What does the candidate *say*: its config.json against what params.json means, field
by field. What does it *hold*: every tensor bit by bit, each layout through its own binding. What does it *compute*: logits of
the same prompts, from our reference model on both sides or from Transformers on the candidate's. Logits alone would miss much:
at 256 tokens a wrong RoPE factor, chunk size or floor scale changes nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

from llama4.config import Difference, Llama4Config, differences
from llama4.weights import BindingError, parameter_shapes
from llama4_convert.checkpoints.transformers import ITEM_SIZES
from llama4_convert.errors import BadInput, UsageError, one_line, raise_if_out_of_memory
from llama4_convert.metrics import finite
from llama4_convert.parity import CandidateFailed, Parity, against_transformers, candidate_steps, side_by_side
from llama4_convert.prompts import Batch, Prompt, check_prompts, prompts_of_file, prompts_of_ids, random_prompts
from llama4_convert.reference import Checkpoint, model_of
from llama4_convert.weight_check import MatrixLoss, WeightFault, compare_weights, unexpected_tensors

RUNNERS = ("llama4", "transformers")

# Largest value that passes (of top1_agreement: smallest); docs/validate.md has the measurements behind them.
GATES: Mapping[str, Mapping[str, float]] = {
    "float32": {"top1_agreement": 0.999, "kl_mean": 1e-6, "kl_p999": 1e-5, "nmse": 1e-8},
    "bfloat16": {"top1_agreement": 0.9, "kl_mean": 5e-3, "kl_p999": 0.5, "nmse": 1e-2},
    "float16": {"top1_agreement": 0.97, "kl_mean": 3e-4, "kl_p999": 0.05, "nmse": 5e-4},
}
GATE_NAMES = ("top1_agreement", "kl_mean", "kl_p999", "nmse", "max_abs_diff")
DTYPES = tuple(GATES)
# Of a quantized candidate, by its coarsest scheme, whatever it computes in; the coarsest first.
QUANTIZED_GATES: Mapping[str, Mapping[str, float]] = {
    "int4": {"top1_agreement": 0.4, "kl_mean": 0.2, "kl_p999": 3.0, "nmse": 0.3},
    "nf4": {"top1_agreement": 0.4, "kl_mean": 0.2, "kl_p999": 3.0, "nmse": 0.3},
    "fp8": {"top1_agreement": 0.7, "kl_mean": 0.02, "kl_p999": 1.0, "nmse": 0.05},
}
_MODEL_BYTES = 1 << 30  # of weights that either model keeps: what is left of 4 GiB is the activations'


def validate(
    path: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str],
    tokens: int = 256,
    prompts: str | os.PathLike[str] | None = None,
    token_ids: str | os.PathLike[str] | None = None,
    images: Sequence[str | os.PathLike[str]] = (),
    runner: str = "llama4",
    dtype: str = "float32",
    gates: Mapping[str, float] | None = None,
    seed: int = 0,
    start: Callable[[int, int], None] = lambda total, done: None,
    progress: Callable[[int], None] = lambda n: None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Hold the checkpoint at `path` against `reference`; either may be in either layout.

    Prompts come from `prompts` (a file with one a line), `token_ids` (a file of ids) and `images`; without any, `tokens` random
    tokens and, for a model that sees, a tile of noise. `runner` "transformers" runs the candidate in Transformers. Both sides
    compute in `dtype`. `gates` replaces limits of `GATES`. The result's `passed` is true if no field differs, no tensor
    differs, and every metric is within its gate. Raises UsageError, BadInput or EnvironmentFailed.
    """
    _check_gates(dtype, gates or {})
    if runner not in RUNNERS:
        raise UsageError(f"unknown runner {runner!r}: choose one of {', '.join(RUNNERS)}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise UsageError("the seed must fit into 64 bits")
    original, candidate = Checkpoint.open(reference), Checkpoint.open(path)
    limits = {**_default_gates(dtype, original, candidate), **(gates or {})}
    if runner == "transformers" and candidate.layout != "transformers":
        raise UsageError(f"{path} is in Meta's layout, which Transformers does not read: leave --with out")
    if runner == "transformers" and dtype == "float32" and "nf4" in candidate.quantized.values():
        raise UsageError("bitsandbytes computes in bfloat16: add --dtype bfloat16")
    config = original.config
    if candidate.is_text_only and config.vision_config:
        warn(f"{path} is a text model: the vision tower of {reference} is left out of the comparison")
        config = replace(config, vision_config=None)
    said, batch = _batch(original, candidate, config, tokens, prompts, token_ids, images, seed)
    said += _said(original, candidate, config)

    sizes = {name: prod(shape) for name, shape in parameter_shapes(config).items()}
    try:
        total = sum(sizes.values()) * ITEM_SIZES[next(original.logical_tensors()).dtype]
        start(2 * total, 0)
        findings = list(compare_weights(original, candidate, config, progress))
    except BindingError as error:
        raise BadInput(f"{reference}: {error}: download it again") from error
    faults = [finding for finding in findings if isinstance(finding, WeightFault)]
    run = _run(original, candidate, config, batch, runner, dtype, lambda part: progress(int(part * total)))

    failed_gates = sorted(name for name, limit in limits.items() if not _within(name, run.metrics[name], limit))
    missing = next((fault for fault in faults if fault.is_missing), None)
    return {
        "passed": not (said or faults or failed_gates or run.failure),
        "path": str(path),
        "reference": str(reference),
        "runner": runner,
        "dtype": dtype,
        "config_differences": [difference._asdict() for difference in said],
        "tensors_compared": len(sizes) if missing is None else list(sizes).index(missing.name),
        "tensors_quantized": _quantized([finding for finding in findings if isinstance(finding, MatrixLoss)]),
        "tensors_different": [fault.to_json() for fault in faults],
        "tensors_unexpected": unexpected_tensors(candidate, config),
        **run.metrics,
        "gates": limits,
        "gates_failed": failed_gates,
        "layers": run.layers,
        "first_divergence": _first_divergence(faults, said, run),
        "candidate_failure": run.failure,
    }


def _quantized(losses: Sequence[MatrixLoss]) -> dict[str, Any]:
    """What became of the quantized matrices, by scheme: how many, and the mean and the largest of their relative errors."""
    told: dict[str, Any] = {}
    for kind in sorted({loss.kind for loss in losses}):
        group = [loss for loss in losses if loss.kind == kind]
        worst = max(group, key=lambda loss: loss.relative_mse)
        told[kind] = {
            "matrices": len(group),
            "relative_mse_mean": finite(sum(loss.relative_mse for loss in group) / len(group)),
            "relative_mse_largest": finite(worst.relative_mse),
            "worst": worst.key,
        }
    return told


def _check_gates(dtype: str, overrides: Mapping[str, float]) -> None:
    if dtype not in GATES:
        raise UsageError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    for name in overrides:
        if name not in GATE_NAMES:
            raise UsageError(f"unknown gate {name!r}: choose one of {', '.join(GATE_NAMES)}")
        if not math.isfinite(overrides[name]):
            raise UsageError(f"gate {name} must be a finite number, not {overrides[name]}")


def _default_gates(dtype: str, original: Checkpoint, candidate: Checkpoint) -> Mapping[str, float]:
    kinds = set(candidate.lossy_beside(original).values())
    return next((gates for kind, gates in QUANTIZED_GATES.items() if kind in kinds), GATES[dtype])


def _within(name: str, value: float | int | None, limit: float) -> bool:
    if value is None:  # NaN or infinite
        return False
    return value >= limit if name == "top1_agreement" else value <= limit


def _said(original: Checkpoint, candidate: Checkpoint, config: Llama4Config) -> list[Difference]:
    """Where the candidate's configuration contradicts the reference's."""
    found = list(differences(config, candidate.config))
    for name, expected, actual in (
        ("bos_token_id", original.bos_id, candidate.bos_id),
        ("pad_token_id", original.pad_id, candidate.pad_id),
    ):
        if expected is not None and actual != expected:
            found.append(Difference(name, expected, actual))
    found += [Difference(name, should, is_) for name, (should, is_) in candidate.wording.items() if should != is_]
    expected_stops, stops = original.stop_ids, candidate.stop_ids
    # Which of the three end a generation depends on the variant, but there must be one, and no other.
    if expected_stops and not (stops and set(stops) <= set(expected_stops)):
        found.append(Difference("eos_token_id", list(expected_stops), list(stops)))
    return found


def _batch(
    original: Checkpoint,
    candidate: Checkpoint,
    config: Llama4Config,
    n_tokens: int,
    prompts: str | os.PathLike[str] | None,
    token_ids: str | os.PathLike[str] | None,
    images: Sequence[str | os.PathLike[str]],
    seed: int,
) -> tuple[list[Difference], Batch]:
    """The prompts, and a difference if the candidate's tokenizer makes other tokens of them."""
    if n_tokens < 1:
        raise UsageError("--tokens must be at least 1")
    chosen: list[Prompt] = []
    said: list[Difference] = []
    if prompts is not None or images:
        from llama4_convert.generation import open_image, open_processor

        def encoded(checkpoint: Checkpoint) -> list[Prompt]:
            processor = open_processor(checkpoint, config)
            texts = prompts_of_file(Path(prompts), processor) if prompts is not None else []
            seen = [processor("<|image|>", [open_image(Path(image))]) for image in images]
            return [*texts, *(Prompt(inputs.tokens, inputs.pixel_values) for inputs in seen)]

        try:
            chosen += encoded(original)
            theirs = encoded(candidate)
        except ValueError as error:
            raise UsageError(f"the prompts do not fit {original.path}: {error}") from error
        for ours, other in zip(chosen, theirs, strict=True):
            if ours.tokens != other.tokens:
                at = next(i for i, (a, b) in enumerate(zip_longest(ours.tokens, other.tokens)) if a != b)
                said.append(Difference("tokenizer.json", ours.tokens[at : at + 8], other.tokens[at : at + 8]))
                break
    if token_ids is not None:
        chosen += prompts_of_ids(Path(token_ids))
    if not chosen:
        chosen = random_prompts(config, n_tokens, seed)
    check_prompts(chosen, config)
    return said, Batch.of(chosen, config)


def _run(
    original: Checkpoint,
    candidate: Checkpoint,
    config: Llama4Config,
    batch: Batch,
    runner: str,
    dtype: str,
    advance: Callable[[float], None],
) -> Parity:
    """Raises BadInput if it is the reference that does not run."""
    import torch

    kind = getattr(torch, dtype)
    with torch.inference_mode():
        try:
            ours = model_of(
                original,
                dtype=kind,
                keep_bytes=_MODEL_BYTES,
                config=config,
                rounded_to=_rounding(original, candidate, config),
            )
            if runner == "transformers":
                return against_transformers(ours, candidate.path, batch, dtype, advance)
            with candidate_steps():
                theirs = model_of(candidate, dtype=kind, keep_bytes=_MODEL_BYTES)
            is_lossy = bool(candidate.lossy_beside(original))
            return side_by_side(ours, theirs, batch, dtype, is_lossy, advance)
        except CandidateFailed as failure:
            return Parity(failure=str(failure))
        except (BindingError, RuntimeError, ValueError, IndexError) as error:
            raise_if_out_of_memory(error)
            raise BadInput(
                f"{original.path}: its weights and its configuration make no model: {one_line(error)}"
            ) from error


def _rounding(original: Checkpoint, candidate: Checkpoint, config: Llama4Config) -> dict[str, str]:
    """Tensors that `convert --dtype` has rounded: the reference is rounded alike, or rounding would be called a fault."""
    try:
        theirs = {tensor.name: tensor for tensor in candidate.logical_tensors(config)}
    except BindingError:
        return {}
    quantized = candidate.quantized
    return {
        ours.name: theirs[ours.name].dtype
        for ours in original.logical_tensors(config)
        if ours.dtype != theirs[ours.name].dtype and theirs[ours.name].keys[0] not in quantized
    }


def _first_divergence(faults: Sequence[WeightFault], said: Sequence[Difference], run: Parity) -> dict[str, Any] | None:
    if faults:
        return faults[0].to_json()
    if run.strayed is None:
        return None
    layer, module = run.strayed
    cause = "no tensor is to blame and no field: the two compute in different ways"
    if said:
        cause = f"the configuration says otherwise in {', '.join(difference.field for difference in said)}"
    return {"layer": layer, "module": module, "tensor": None, "cause": cause}
