"""Two checkpoints, what runs each of them, and what both compute of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llama4.config import Llama4Config
from llama4.loading import DTYPES
from llama4.weights import BindingError
from llama4_convert.errors import BadInput, UsageError, one_line, raise_if_out_of_memory
from llama4_convert.reference.checkpoint import Checkpoint, model_of
from llama4_convert.validation.parity import gates
from llama4_convert.validation.parity.memory import Budget
from llama4_convert.validation.parity.module_split import split, split_of_record
from llama4_convert.validation.parity.prompts import Batch
from llama4_convert.validation.parity.stages import Live
from llama4_convert.validation.parity.transformers_runner import TransformersRecord
from llama4_convert.validation.parity.walk import CandidateFailed, Journal, Parity, Side, Walk, candidate_steps

RUNNERS = ("llama4", "transformers")


@dataclass(frozen=True)
class Models:
    """The reference and the candidate, each with its runner, one of RUNNERS."""

    original: Checkpoint
    candidate: Checkpoint
    config: Llama4Config  # what is compared: the original's, without the tower that a text model lacks
    reference_runner: str
    runner: str
    dtype_name: str  # what both compute in: "float32"

    def check(self) -> None:
        """Raises UsageError for a runner that is unknown, or that cannot run its checkpoint."""
        for checkpoint, runner in self._sides:
            if runner not in RUNNERS:
                raise UsageError(f"unknown runner {runner!r}: choose one of {', '.join(RUNNERS)}")
            if runner != "transformers":
                continue
            if checkpoint.layout != "transformers":
                raise UsageError(
                    f"{checkpoint.path} is in Meta's layout, which Transformers does not read: leave Transformers out there"
                )
            if self.dtype_name == "float32" and "nf4" in checkpoint.quantized.values():
                raise UsageError("bitsandbytes computes in bfloat16: add --dtype bfloat16")

    @property
    def _sides(self) -> tuple[tuple[Checkpoint, str], ...]:
        return (self.candidate, self.runner), (self.original, self.reference_runner)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @cached_property
    def kind(self) -> tuple[str, gates.Kind]:
        """The limits that hold for the candidate, and their name."""
        return gates.kind_of(self.dtype_name, set(self.candidate.lossy_beside(self.original).values()))

    @property
    def why_weights_are_not_compared(self) -> str | None:
        """Only of what Transformers runs: what our own model cannot read it does not run either, which is an error."""
        for checkpoint, runner in self._sides:
            if checkpoint.unknown_quantization is not None and runner == "transformers":
                return (
                    f"{checkpoint.path} is quantized as {checkpoint.unknown_quantization}, which we cannot read: only what it"
                    " computes is compared"
                )
        return None

    @cached_property
    def rounded_tensors(self) -> dict[str, str]:
        """Tensors that `convert --dtype` has rounded -> their dtype: the reference is rounded alike, for rounding is no fault."""
        try:
            theirs = {tensor.name: tensor for tensor in self.candidate.logical_tensors(self.config)}
        except BindingError:
            return {}
        quantized = self.candidate.quantized
        return {
            ours.name: theirs[ours.name].dtype
            for ours in self.original.logical_tensors(self.config)
            if theirs[ours.name].dtype in DTYPES.keys() - {ours.dtype} and theirs[ours.name].keys[0] not in quantized
        }


def compare_logits(
    models: Models,
    batch: Batch,
    room: Budget,
    journal: Journal | None,
    advance: Callable[[float], None],
    at: Callable[[str], None],
) -> Parity:
    """Run both models on a batch; a candidate that does not run is a result.

    `advance` takes the parts that are done, which sum to 1, and `at` the name of what begins. Raises BadInput if it is the
    reference that does not run.
    """
    with torch.inference_mode():
        try:
            return _walk(models, batch, room, journal, advance, at)
        except CandidateFailed as failure:
            return Parity(failure=str(failure))
        except (RuntimeError, ValueError, IndexError) as error:
            raise_if_out_of_memory(error)
            raise BadInput(
                f"{models.original.path}: its weights and its configuration make no model: {one_line(error)}"
            ) from error


def _walk(
    models: Models,
    batch: Batch,
    room: Budget,
    journal: Journal | None,
    advance: Callable[[float], None],
    at: Callable[[str], None],
) -> Parity:
    def live(checkpoint: Checkpoint, **options: Any) -> Live:
        model = model_of(checkpoint, dtype=models.dtype, keep_bytes=room.keep, ahead_bytes=room.ahead, **options)
        return Live(model, batch)

    def recorded(checkpoint: Checkpoint) -> Side:
        at(f"Transformers on {checkpoint.path.name}")
        record = TransformersRecord(checkpoint.path, batch, models.dtype)
        return Side(record=record, logits=record.logits)

    if models.reference_runner == "transformers":
        try:
            ours = recorded(models.original)
        except CandidateFailed as failure:
            raise BadInput(f"{models.original.path}: {failure}") from failure
    else:
        ours = Side(live(models.original, config=models.config, rounded_to=models.rounded_tensors), journal)
    if models.runner == "transformers":
        theirs = recorded(models.candidate)
    else:
        with candidate_steps():
            theirs = Side(live(models.candidate))

    def split_layer(layer: int, before: Tensor, chosen: Tensor | None) -> dict[str, float]:
        if ours.live and theirs.live:
            return split(ours.live.model, theirs.live.model, layer, before, chosen)
        own, other = (ours, theirs) if ours.live else (theirs, ours)
        assert own.live
        assert isinstance(other.record, TransformersRecord)
        return split_of_record(own.live.model, other.record, layer)

    kind = models.kind[1]
    return Walk(
        ours,
        theirs,
        batch,
        models.config,
        kind.local_nmse,
        kind.near_tie,
        modules=split_layer,
        journal=journal,
        advance=advance,
        at=at,
    ).run()
