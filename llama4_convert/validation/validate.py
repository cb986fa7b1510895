"""`validate`: whether a checkpoint computes what the original computes, and if not, which tensor or field is to blame.

Three questions, each answered for itself. What does the candidate *say*: its config.json against what params.json means, field
by field. What does it *hold*: every tensor bit by bit, each layout through its own binding. What does it *compute*: logits of
the same prompts, layer by layer, from our reference model or from Transformers on either side. Logits alone would miss much:
at 256 tokens a wrong RoPE factor, chunk size or floor scale changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4.config import Llama4Config
from llama4.config_differences import Difference
from llama4.weights import BindingError, parameter_shapes
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.errors import BadInput, UsageError, one_line, raise_if_out_of_memory
from llama4_convert.reference.checkpoint import Checkpoint, model_of
from llama4_convert.validation.config_check import said, told
from llama4_convert.validation.parity import gates as limits
from llama4_convert.validation.parity.memory import INTERPRETER, Budget, budget
from llama4_convert.validation.parity.metrics import finite
from llama4_convert.validation.parity.prompts import (
    Batch,
    Prompt,
    check_prompts,
    prompts_of_file,
    prompts_of_ids,
    random_prompts,
)
from llama4_convert.validation.parity.walk import CandidateFailed, Parity, Side, Walk, candidate_steps
from llama4_convert.validation.weight_check import (
    Compared,
    MatrixLoss,
    WeightFault,
    compare_weights,
    losses_by_scheme,
    unexpected_tensors,
)
from llama4_convert.version import VERSION

if TYPE_CHECKING:
    from llama4.model import Llama4ForCausalLM
    from llama4_convert.validation.cache import CandidateNotes

RUNNERS = ("llama4", "transformers")
MAX_MEMORY = 4 << 30


def validate(
    path: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str],
    tokens: int = 256,
    prompts: str | os.PathLike[str] | None = None,
    token_ids: str | os.PathLike[str] | None = None,
    images: Sequence[str | os.PathLike[str]] = (),
    runner: str = "llama4",
    reference_runner: str = "llama4",
    dtype: str = "float32",
    gates: Mapping[str, float] | None = None,
    seed: int = 0,
    max_memory: int = MAX_MEMORY,
    cache: str | os.PathLike[str] | None = None,
    start: Callable[[int, int], None] = lambda total, done: None,
    progress: Callable[[int], None] = lambda n: None,
    at: Callable[[str], None] = lambda what: None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Hold the checkpoint at `path` against `reference`; either may be in either layout.

    Prompts come from `prompts` (a file with one a line), `token_ids` (a file of ids) and `images`; without any, `tokens` random
    tokens and, for a model that sees, a tile of noise. `runner` and `reference_runner` say what runs the candidate and the
    reference: our reference model, in no more than `max_memory` bytes, or "transformers". Both compute in `dtype`. `gates`
    replaces limits of `parity.gates`. With a folder `cache` an interrupted run goes on where it stopped, and what the reference
    computes is kept for the next candidate. `at` is told what is under way. The result's `passed` is true if no field
    differs, no tensor differs, and every metric is within its gate. Raises UsageError, BadInput or EnvironmentFailed.
    """
    limits.check(dtype, gates or {})
    for name in (runner, reference_runner):
        if name not in RUNNERS:
            raise UsageError(f"unknown runner {name!r}: choose one of {', '.join(RUNNERS)}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise UsageError("the seed must fit into 64 bits")
    original, candidate = Checkpoint.open(reference), Checkpoint.open(path)
    _check_runners(((candidate, runner), (original, reference_runner)), dtype)
    kind_name, kind = limits.kind_of(dtype, set(candidate.lossy_beside(original).values()))
    config = original.config
    if candidate.is_text_only and config.vision_config:
        warn(f"{path} is a text model: the vision tower of {reference} is left out of the comparison")
        config = replace(config, vision_config=None)
    elif original.is_text_only and candidate.config.vision_config:
        warn(f"{reference} is a text model: the vision tower of {path} is left out of the comparison")
    differences, batch = _batch(original, candidate, config, tokens, prompts, token_ids, images, seed)
    differences += said(original, candidate, config)
    comparison = _Comparison(original, candidate, config, batch, runner, reference_runner, dtype, kind)
    room = comparison.budget(max_memory)

    sizes = {name: prod(shape) for name, shape in parameter_shapes(config).items()}
    with comparison.notes(cache, warn) as notes:
        try:
            total = sum(sizes.values()) * ITEM_SIZES[next(original.logical_tensors()).dtype]
            start(2 * total, 0)
            at("weights")
            uncompared = _uncompared(((candidate, runner), (original, reference_runner)))
            findings = [] if uncompared else comparison.weights(notes, progress, max_memory - INTERPRETER)
        except BindingError as error:
            raise BadInput(f"{reference}: {error}: download it again") from error
        run = comparison.run(room, notes, lambda part: progress(int(part * total)), at)
        if notes:
            notes.finished()
    faults = [finding for finding in findings if isinstance(finding, WeightFault)]
    losses = [finding for finding in findings if isinstance(finding, MatrixLoss)]

    chosen = {**kind.gates, **(gates or {})}
    failed = sorted(name for name, limit in chosen.items() if not limits.within(name, run.metrics[name], limit))
    length = max(len(prompt.tokens) for prompt in batch.prompts)
    sees = batch.pixel_values is not None
    options: dict[str, tuple[Any, Any]] = {
        "tokens": (tokens, 256),
        "prompts": (prompts, None),
        "token-ids": (token_ids, None),
        "image": (images, ()),
        "with": (runner, "llama4"),
        "reference-with": (reference_runner, "llama4"),
        "dtype": (dtype, "float32"),
        "gate": ([f"{name}={limit:g}" for name, limit in (gates or {}).items()], []),
        "seed": (seed, 0),
    }
    return {
        "passed": not (differences or faults or failed or run.failure),
        "path": str(path),
        "reference": str(reference),
        "version": VERSION,
        "command": _command(path, reference, options),
        "runner": runner,
        "reference_runner": reference_runner,
        "dtype": dtype,
        "kind": kind_name,
        "config_differences": [told(one, config, candidate.config, length, sees) for one in differences],
        "weights_not_compared": uncompared,
        "tensors_compared": 0 if uncompared else len(sizes) - sum(fault.is_missing for fault in faults),
        "tensors_quantized": losses_by_scheme(losses),
        "tensors_different": [fault.to_json() for fault in faults],
        "tensors_unexpected": [] if uncompared else unexpected_tensors(original, candidate, config),
        **run.metrics,
        "gates": chosen,
        "gates_failed": failed,
        "forced_routing": run.forced,
        "layers": run.layers,
        "vision": run.vision,
        "modules": run.modules,
        "first_divergence": _first_divergence(faults, differences, run),
        "candidate_failure": run.failure,
        "pictures": {**run.pictures, "quantization_error": _error_by_expert(losses)},
    }


def _check_runners(sides: Sequence[tuple[Checkpoint, str]], dtype: str) -> None:
    for checkpoint, runner in sides:
        if runner != "transformers":
            continue
        if checkpoint.layout != "transformers":
            raise UsageError(
                f"{checkpoint.path} is in Meta's layout, which Transformers does not read: leave Transformers out there"
            )
        if dtype == "float32" and "nf4" in checkpoint.quantized.values():
            raise UsageError("bitsandbytes computes in bfloat16: add --dtype bfloat16")


def _uncompared(sides: Sequence[tuple[Checkpoint, str]]) -> str | None:
    """Why the weights cannot be compared; only for what Transformers runs, since otherwise nothing could be said at all."""
    for checkpoint, runner in sides:
        if checkpoint.unknown_quantization is not None and runner == "transformers":
            return (
                f"{checkpoint.path} is quantized as {checkpoint.unknown_quantization}, which we cannot read: only what it"
                " computes is compared"
            )
    return None


def _command(
    path: str | os.PathLike[str], reference: str | os.PathLike[str], options: Mapping[str, tuple[Any, Any]]
) -> str:
    """The command line that repeats this."""
    words = ["llama4-convert", "validate", str(path), "--reference", str(reference)]
    for name, (value, default) in options.items():
        if value == default:
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            words += [f"--{name}", str(one)]
    return shlex.join(words)


_EXPERT = re.compile(r"layers\.(\d+)\.feed_forward\.experts\.(\d+)\.")


def _error_by_expert(losses: Sequence[MatrixLoss]) -> dict[str, Any] | None:
    """Relative squared error, the mean of an expert's matrices, a row a layer."""
    sums: dict[int, dict[int, list[float]]] = {}
    for loss in losses:
        if found := _EXPERT.search(loss.key):
            sums.setdefault(int(found[1]), {}).setdefault(int(found[2]), []).append(loss.relative_mse)
    if not sums:
        return None
    n = 1 + max(expert for row in sums.values() for expert in row)
    rows = [
        [finite(sum(row[e]) / len(row[e])) if e in row else None for e in range(n)] for _, row in sorted(sums.items())
    ]
    return {"layers": sorted(sums), "relative_mse": rows}


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
        from llama4_convert.reference.generation import open_image, open_processor

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


@dataclass(frozen=True)
class _Comparison:
    """What is run against what."""

    original: Checkpoint
    candidate: Checkpoint
    config: Llama4Config  # what is compared: the original's, without the tower that a text model lacks
    batch: Batch
    runner: str
    reference_runner: str
    dtype: str
    kind: limits.Kind

    def budget(self, max_memory: int) -> Budget:
        import torch

        tiles = 0 if self.batch.pixel_values is None else len(self.batch.pixel_values)
        itemsize = getattr(torch, self.dtype).itemsize
        return budget(self.config, self.batch.tokens.numel(), tiles, itemsize, max_memory)

    def weights(
        self, notes: CandidateNotes | None, progress: Callable[[int], None], memory: int
    ) -> list[WeightFault | MatrixLoss]:
        begun = notes.compared() if notes else Compared()
        if begun.done:
            sizes = [prod(shape) for shape in parameter_shapes(self.config).values()]
            progress(sum(sizes[: begun.done]) * ITEM_SIZES[next(self.original.logical_tensors()).dtype])
        found = compare_weights(
            self.original,
            self.candidate,
            self.config,
            progress,
            memory=memory,
            begun=begun,
            note=notes.note if notes else lambda compared: None,
            equal=notes.equal if notes else None,
        )
        findings = list(found)
        if notes:
            notes.note(begun, is_last=True)
        return findings

    @contextlib.contextmanager
    def notes(
        self, folder: str | os.PathLike[str] | None, warn: Callable[[str], None]
    ) -> Iterator[CandidateNotes | None]:
        """Kept of our own model only: what Transformers runs is small."""
        if folder is None or self.reference_runner != "llama4":
            yield None
            return
        import torch

        from llama4_convert.validation.cache import content_key, opened, run_key

        rounded = sorted(self._rounding().items())
        key = run_key(self.original, self.batch, self.dtype, self.config, rounded)
        with opened(Path(folder), key, getattr(torch, self.dtype), warn) as cache:
            yield cache.candidate(content_key(self.candidate) + self.runner) if cache else None

    def run(
        self,
        room: Budget,
        notes: CandidateNotes | None,
        advance: Callable[[float], None],
        at: Callable[[str], None],
    ) -> Parity:
        """Raises BadInput if it is the reference that does not run."""
        import torch

        with torch.inference_mode():
            try:
                return self._walk(room, notes, advance, at)
            except CandidateFailed as failure:
                return Parity(failure=str(failure))
            except (BindingError, RuntimeError, ValueError, IndexError) as error:
                raise_if_out_of_memory(error)
                raise BadInput(
                    f"{self.original.path}: its weights and its configuration make no model: {one_line(error)}"
                ) from error

    def _walk(
        self,
        room: Budget,
        notes: CandidateNotes | None,
        advance: Callable[[float], None],
        at: Callable[[str], None],
    ) -> Parity:
        import torch

        from llama4_convert.validation.parity.module_split import split, split_of_record
        from llama4_convert.validation.parity.stages import Live
        from llama4_convert.validation.parity.transformers_runner import TransformersRecord

        kind = getattr(torch, self.dtype)

        def model(checkpoint: Checkpoint, **more: Any) -> Llama4ForCausalLM:
            return model_of(checkpoint, dtype=kind, keep_bytes=room.keep, ahead_bytes=room.ahead, **more)

        def recorded(checkpoint: Checkpoint) -> Side:
            at(f"Transformers on {checkpoint.path.name}")
            record = TransformersRecord(checkpoint.path, self.batch, kind)
            return Side(record=record, logits=record.logits)

        def split_layer(layer: int, before: Any, chosen: Any) -> dict[str, float]:
            if ours.live and theirs.live:
                return split(ours.live.model, theirs.live.model, layer, before, chosen)
            own, other = (ours, theirs) if ours.live else (theirs, ours)
            assert own.live
            assert isinstance(other.record, TransformersRecord)
            return split_of_record(own.live.model, other.record, layer)

        if self.reference_runner == "transformers":
            try:
                ours = recorded(self.original)
            except CandidateFailed as failure:
                raise BadInput(f"{self.original.path}: {failure}") from failure
        else:
            reference = model(self.original, config=self.config, rounded_to=self._rounding())
            ours = Side(Live(reference, self.batch), notes.cache if notes else None)
        if self.runner == "transformers":
            theirs = recorded(self.candidate)
        else:
            with candidate_steps():
                theirs = Side(Live(model(self.candidate), self.batch))
        return Walk(
            ours,
            theirs,
            self.batch,
            self.config,
            self.kind.local_nmse,
            self.kind.near_tie,
            modules=split_layer,
            journal=notes,
            advance=advance,
            at=at,
        ).run()

    def _rounding(self) -> dict[str, str]:
        """Tensors that `convert --dtype` has rounded: the reference is rounded alike, or rounding would be called a fault."""
        from llama4.loading import DTYPES

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


def _first_divergence(faults: Sequence[WeightFault], said: Sequence[Difference], run: Parity) -> dict[str, Any] | None:
    if faults:
        return faults[0].to_json()
    if run.strayed is None:
        return None
    layer, module = run.strayed
    cause = "no tensor is to blame and no field: the two compute in different ways"
    if said:
        cause = f"the configuration says otherwise in {', '.join(difference.field for difference in said)}"
    return {"layer": layer, "module": module, "tensor": None, "cause": cause, "kind": None}
