"""`validate`: whether a checkpoint computes what the original computes, and if not, which tensor or field is to blame.

Three questions, each with an answer of its own. What does the candidate *say*: its config.json beside what params.json means,
field by field. What does it *hold*: every tensor bit by bit, each layout through its own binding. What does it *compute*: the
logits of the same prompts, layer by layer, from our reference model or from Transformers on either side. Logits alone would miss
much: at 256 tokens a wrong RoPE factor, chunk size or floor scale changes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

from msgspec import structs

from llama4.config_differences import Difference
from llama4.weights import BindingError, parameter_shapes
from llama4_convert.checkpoints.tensors import ITEM_SIZES
from llama4_convert.errors import BadInput
from llama4_convert.reference.checkpoint import Checkpoint
from llama4_convert.validation.cache import CandidateJournal, open_journal
from llama4_convert.validation.command_line import command_line
from llama4_convert.validation.config_check import compare_configs, field_fault
from llama4_convert.validation.parity import gates as limits
from llama4_convert.validation.parity.memory import INTERPRETER_BYTES, budget
from llama4_convert.validation.parity.models import Models, compare_logits
from llama4_convert.validation.parity.prompts import Batch, PromptOptions, make_batch
from llama4_convert.validation.parity.walk import Parity
from llama4_convert.validation.results import TensorFault, Validation
from llama4_convert.validation.weight_check import (
    WeightComparison,
    compare_weights,
    error_by_expert,
    losses_by_scheme,
    pairs_with_reference,
)
from llama4_convert.version import VERSION

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
) -> Validation:
    """Compare the checkpoint at `path` with `reference`; either may be in either layout.

    Prompts come from `prompts` (a file with one a line), `token_ids` (a file of ids) and `images`; without any, `tokens` random
    tokens and, for a model that sees, a tile of noise. `runner` and `reference_runner` say what runs the candidate and the
    reference: our reference model, in no more than `max_memory` bytes, or "transformers". Both compute in `dtype`. `gates`
    replaces limits of `parity.gates`. With a folder `cache` an interrupted run goes on where it stopped, and what the reference
    computes is kept for the next candidate. `start(total, done)` and `progress(n)` count bytes, `at` takes the name of what
    begins. The result's `passed` is true if no field differs, no tensor differs, and every metric is within its gate. Raises
    UsageError, BadInput or EnvironmentFailed.
    """
    limits.check(dtype, gates or {})
    options = PromptOptions(tokens, prompts, token_ids, images, seed)
    options.check()
    models = _models(Checkpoint.open(reference), Checkpoint.open(path), reference_runner, runner, dtype, warn)
    batch, differences = make_batch(options, models.original, models.candidate, models.config)
    differences += compare_configs(models.original, models.candidate, models.config)
    room = budget(models.config, batch.tokens.numel(), batch.tiles, models.dtype.itemsize, max_memory)
    with open_journal(cache, models, batch, warn) as journal:
        with _faults_of_reference(models.original):
            total = _nbytes(models)
            start(2 * total, 0)
            at("weights")
            weights = _compare_weights(models, journal, progress, max_memory - INTERPRETER_BYTES)
        parity = compare_logits(models, batch, room, journal, lambda part: progress(int(part * total)), at)
        if journal:
            journal.finish()
    given = {"tokens": tokens, "prompts": prompts, "token-ids": token_ids, "image": tuple(images)}
    given |= {"with": runner, "reference-with": reference_runner, "dtype": dtype, "seed": seed}
    given["gate"] = tuple(f"{name}={limit:g}" for name, limit in (gates or {}).items())
    command = command_line(path, reference, given)
    names = str(path), str(reference)
    return _judge(models, batch, differences, weights, parity, gates or {}, names, command)


def _models(
    original: Checkpoint,
    candidate: Checkpoint,
    reference_runner: str,
    runner: str,
    dtype: str,
    warn: Callable[[str], None],
) -> Models:
    """What is compared: the whole original, or its text where one side is a text model."""
    config = original.config
    for note in (*original.notes, *candidate.notes):
        warn(note)
    for text_model, other in ((candidate, original), (original, candidate)):
        if text_model.is_text_only and other.config.vision_config:
            warn(f"{text_model.path} is a text model: the vision tower of {other.path} is left out of the comparison")
            config = replace(config, vision_config=None)
    models = Models(original, candidate, config, reference_runner, runner, dtype)
    models.check()
    return models


def _nbytes(models: Models) -> int:
    """Bytes of the original's tensors."""
    item = ITEM_SIZES[next(models.original.logical_tensors()).dtype]
    return item * sum(map(prod, parameter_shapes(models.config).values()))


@contextlib.contextmanager
def _faults_of_reference(original: Checkpoint) -> Iterator[None]:
    try:
        yield
    except BindingError as error:
        raise BadInput(f"{original.path}: {error}: fetch it again") from error


def _compare_weights(
    models: Models, journal: CandidateJournal | None, advance: Callable[[int], None], memory: int
) -> WeightComparison | None:
    """From where the journal has come. None if what Transformers runs cannot be read."""
    if models.why_weights_are_not_compared:
        return None
    pairs = pairs_with_reference(models.original, models.candidate, models.config)
    if journal is None:
        return compare_weights(pairs, advance, memory=memory)
    progress = journal.comparison()
    advance(sum(map(pairs.nbytes, pairs.names[: progress.done])))
    found = compare_weights(
        pairs, advance, memory=memory, progress=progress, save=journal.save_comparison, matching=journal.matching
    )
    journal.save_comparison(progress, is_last=True)
    return found


def _judge(
    models: Models,
    batch: Batch,
    differences: Sequence[Difference],
    weights: WeightComparison | None,
    parity: Parity,
    own_gates: Mapping[str, float],
    names: tuple[str, str],
    command: str,
) -> Validation:
    """The result: `passed` if none of the three parts is wrong. `names`: candidate and reference, as they were given."""
    kind_name, kind = models.kind
    gates = {**kind.gates, **own_gates}
    failed = sorted(name for name, limit in gates.items() if not limits.within(name, parity.metrics.get(name), limit))
    fields = [
        field_fault(difference, models.config, models.candidate.config, batch.longest, batch.tiles > 0)
        for difference in differences
    ]
    faults = [fault.result() for fault in weights.faults] if weights else []
    losses = weights.losses if weights else []
    return Validation(
        passed=not (fields or faults or failed or parity.failure),
        path=names[0],
        reference=names[1],
        version=VERSION,
        command=command,
        runner=models.runner,
        reference_runner=models.reference_runner,
        dtype=models.dtype_name,
        kind=kind_name,
        config_differences=fields,
        weights_not_compared=models.why_weights_are_not_compared,
        tensors_compared=weights.compared if weights else 0,
        tensors_quantized=losses_by_scheme(losses),
        tensors_different=faults,
        tensors_unexpected=list(weights.unexpected) if weights else [],
        **parity.metrics,
        gates=gates,
        gates_failed=failed,
        forced_routing=parity.forced,
        layers=parity.layers,
        vision=parity.vision,
        modules=parity.modules,
        first_divergence=faults[0] if faults else _strayed(parity, differences),
        candidate_failure=parity.failure,
        pictures=structs.replace(parity.pictures, quantization_error=error_by_expert(losses)),
    )


def _strayed(parity: Parity, differences: Sequence[Difference]) -> TensorFault | None:
    """The first module that computes otherwise, though no tensor differs."""
    if parity.strayed is None:
        return None
    layer, module = parity.strayed
    cause = "no tensor is to blame and no field: the two compute in different ways"
    if differences:
        cause = f"the configuration says otherwise in {', '.join(difference.field for difference in differences)}"
    return TensorFault(layer=layer, module=module, tensor=None, cause=cause)
