"""Two models on the same batch, a stage at a time: how far they lie apart, and at which layer and module the second one strays.

Two errors a stage. *Propagated*: each model on its own output of the stage before, which is what a user of it sees. *Local*: both
on the same input, which tells where an error is made; it is measured against what the layer adds to the residual stream.

A mixture of experts jumps: where two experts score almost alike, rounding sends a token to the other one, and what follows
differs though no weight is wrong. So the candidate runs a third time with the reference's choice of experts *forced* on it, the
local error is taken with that choice, and the share of tokens whose choice agrees is a result of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Protocol

import torch
from msgspec import Struct, convert, field
from torch import Tensor

from llama4.weights import BindingError
from llama4_convert.errors import one_line, raise_if_out_of_memory
from llama4_convert.validation.parity.metrics import LogitComparison, finite, nmse
from llama4_convert.validation.parity.stages import Live, Record, Step, experts_of, layer_of, stages
from llama4_convert.validation.results import (
    ForcedRouting,
    LayerErrors,
    ModuleErrors,
    Pictures,
    RoutingLoad,
    StageErrors,
)

if TYPE_CHECKING:
    from llama4.config import Llama4Config
    from llama4_convert.validation.parity.prompts import Batch

_LOGITS_IN_MEMORY = 1 << 22  # of each model, at a time


class CandidateFailed(Exception):
    """The candidate's weights and configuration do not make a model that runs, or not one of this size."""


class Modules(Protocol):
    """Looks into a layer: the errors of its modules by name, in the order in which they compute."""

    def __call__(self, layer: int, before: Tensor, chosen: Tensor | None) -> dict[str, float]: ...


@dataclass
class Side:
    """One of the two: our model, which runs any stage on any state, or a record of what another made; or both."""

    live: Live | None = None
    record: Record | None = None
    logits: Tensor | None = None  # [real positions, vocabulary], of a record that has its own head's


class Parity(Struct):
    """What running both models found; a `Journal` keeps it as JSON."""

    metrics: dict[str, Any] = field(default_factory=dict)  # those of the logits, as in `Validation`
    forced: ForcedRouting | None = None
    layers: list[LayerErrors] = field(default_factory=list)
    vision: list[StageErrors] = field(default_factory=list)
    strayed: tuple[int | None, str] | None = (
        None  # first layer (None outside layers) and module with an error of its own
    )
    modules: ModuleErrors | None = None
    routing_load: RoutingLoad = field(default_factory=lambda: RoutingLoad(layers=[], tokens=[]))
    pictures: Pictures = field(default_factory=Pictures)
    failure: str | None = None  # why the candidate does not run


@dataclass
class States:
    """Where a walk is: what either model has made so far. The same object where the numbers are equal bit by bit."""

    reference: Tensor | None = None
    free: Tensor | None = None
    forced: Tensor | None = None  # None where no choice can be forced


class Journal(Record, Protocol):
    """Keeps a walk's states, so that it goes on after a kill, and the reference's steps: `validation.cache.CandidateJournal`."""

    def resume(self) -> tuple[int, States, Parity]:
        """The stages that are done, and what they left."""
        ...

    def save(self, stages: int, stage: str, states: States, parity: Parity) -> None:
        """Takes what the first `stages` stages left, of which `stage` is the last."""
        ...

    def save_step(self, stage: str, step: Step) -> None:
        """Takes a step that our own reference has made."""
        ...


@dataclass
class Walk:
    """Two sides on a batch."""

    reference: Side
    candidate: Side
    batch: Batch
    config: Llama4Config  # the reference's
    tolerance: float  # a local error beyond it is no rounding
    near_tie: float = 0.0  # nats between two tokens below which rounding may exchange them
    modules: Modules | None = None
    journal: Journal | None = None
    advance: Callable[[float], None] = lambda part: None  # takes the parts that are done; they sum to 1
    at: Callable[[str], None] = lambda stage: None

    def run(self) -> Parity:
        """Raises CandidateFailed."""
        names = stages(self.config, self.batch)
        self._check_sizes(names)
        done, states, parity = self.journal.resume() if self.journal else (0, States(), Parity())
        self.advance(done / (len(names) + 1))
        for n, stage in enumerate(names[done:], done + 1):
            self.at(stage)
            self._step(stage, states, parity)
            self.advance(1 / (len(names) + 1))
            if self.journal:
                self.journal.save(n, stage, states, parity)
        self.at("logits")
        self._logits(states, parity)
        self.advance(1 / (len(names) + 1))
        return parity

    def _check_sizes(self, names: list[str]) -> None:
        if self.candidate.live is None:
            return
        theirs = self.candidate.live.model.config
        layers, expected = theirs.text_config.num_hidden_layers, self.config.text_config.num_hidden_layers
        if layers != expected:
            raise CandidateFailed(f"it has {layers} layers, not {expected}")
        if "vision.embed" in names:
            if theirs.vision_config is None:
                raise CandidateFailed("it has no vision tower")
            layers, expected = (c.vision_config.num_hidden_layers for c in (theirs, self.config) if c.vision_config)
            if layers != expected:
                raise CandidateFailed(f"its vision tower has {layers} layers, not {expected}")

    def _is_same_kind(self, layer: int) -> bool:
        """Whether the layer has experts on both sides, or on neither."""
        models = [side.live.model.config for side in (self.reference, self.candidate) if side.live]
        return len({c.text_config.is_moe(layer) for c in (self.config, *models)}) == 1

    def _can_force(self, live: Live) -> bool:
        ours, theirs = self.config.text_config, live.model.config.text_config
        return bool(ours.moe_layers) and (ours.num_experts_per_tok, ours.num_local_experts) == (
            theirs.num_experts_per_tok,
            theirs.num_local_experts,
        )

    def _step(self, stage: str, states: States, parity: Parity) -> None:
        layer = layer_of(stage)
        if self.candidate.live:
            expected = self._expected(stage, states.reference)
            chosen = self._choice(expected, self.candidate.live)
            with candidate_steps():
                free, forced, alone = self._candidate(self.candidate.live, stage, states, expected, chosen)
            pair, base = (expected.state, alone.state), states.reference
        else:
            free = _recorded(self.candidate, stage)
            forced, alone = None, None
            chosen = None
            expected = self._expected(stage, states.reference)
            if self.reference.live:
                # The candidate cannot run on the reference's input; the reference runs on the candidate's.
                theirs = self._choice(free, self.reference.live)
                alone = self.reference.live.run(stage, [states.free], [theirs])[0]
                pair, base = (alone.state, free.state), states.free
        local = None
        if alone is not None:
            local = self._error(*pair, base if layer is not None else None)
        propagated = self._error(expected.state, free.state, None)
        agreement = self._agreement(expected, free)
        errors = {"nmse_local": finite(local), "nmse_propagated": finite(propagated)}
        if layer is not None:
            parity.layers.append(LayerErrors(layer=layer, **errors, router_agreement=agreement))
            self._count_load(layer, expected, parity)
        elif stage.startswith("vision."):
            parity.vision.append(StageErrors(stage=stage, **errors))
        score_error = 0.0
        if alone is not None and alone.scores is not None:
            a, b = (expected, alone) if self.candidate.live else (alone, free)
            if a.scores is not None and b.scores is not None:
                is_real = self.batch.is_real.flatten()
                score_error = nmse(_array(a.scores[is_real]), _array(b.scores[is_real]))
        if parity.strayed is None and local is not None and not max(local, score_error) <= self.tolerance:
            self._find_module(stage, states, chosen, parity)
        states.reference, states.free = expected.state, _same(expected.state, free.state)
        states.forced = None if forced is None else _same(expected.state, forced.state)

    def _expected(self, stage: str, before: Tensor | None) -> Step:
        """The reference's step, from its record or made now."""
        kept = self.reference.record.step(stage) if self.reference.record else None
        if kept is None:
            if self.reference.live is None:
                raise ValueError(f"nothing is recorded of {stage}")
            kept = self.reference.live.run(stage, [before])[0]
            if self.journal:
                self.journal.save_step(stage, kept)
        return kept

    @staticmethod
    def _candidate(
        live: Live, stage: str, states: States, expected: Step, chosen: Tensor | None
    ) -> tuple[Step, Step | None, Step]:
        """The candidate free, with routing forced, and on the reference's input; each distinct case is computed once."""
        if states.free is states.reference:
            free = live.run(stage, [states.reference])[0]
            if chosen is None or _same_choice(free, chosen, live.top_k()):
                return free, free, free
            forced = live.run(stage, [states.reference], [chosen])[0]
            return free, forced, forced
        if states.forced is states.reference or states.forced is None:
            free, alone = live.run(stage, [states.free, states.reference], [None, chosen])
            return free, None if states.forced is None else alone, alone
        free, forced, alone = live.run(stage, [states.free, states.forced, states.reference], [None, chosen, chosen])
        return free, forced, alone

    def _choice(self, made: Step, on: Live) -> Tensor | None:
        """The experts that one side has chosen, to be forced on the other, if that can route so."""
        if made.scores is None or not self._can_force(on):
            return None
        return experts_of(made.scores, self.config.text_config.num_experts_per_tok)

    def _agreement(self, expected: Step, free: Step) -> float | None:
        """Share of real tokens that go to the same experts when both run free."""
        if expected.scores is None or free.scores is None or expected.scores.shape != free.scores.shape:
            return None
        ours, theirs = (
            experts_of(step.scores, self.config.text_config.num_experts_per_tok)
            for step in (expected, free)
            if step.scores is not None
        )
        return float((ours == theirs).all(-1)[self.batch.is_real.flatten()].double().mean())

    def _count_load(self, layer: int, expected: Step, parity: Parity) -> None:
        if expected.scores is None:
            return
        experts = experts_of(expected.scores, self.config.text_config.num_experts_per_tok)
        counts = torch.bincount(experts[self.batch.is_real.flatten()].flatten(), minlength=expected.scores.shape[-1])
        parity.routing_load.layers.append(layer)
        parity.routing_load.tokens.append(counts.tolist())

    def _error(self, reference: Tensor, other: Tensor, base: Tensor | None) -> float:
        if reference.shape != other.shape:
            raise CandidateFailed(f"its activations are {list(other.shape)}, not {list(reference.shape)}")
        if other is reference:
            return 0.0
        return nmse(*(self._real(x) for x in (reference, other, base) if x is not None))

    def _real(self, state: Tensor) -> Any:
        """Without padding, if the state is of the text."""
        is_text = state.shape[:2] == self.batch.tokens.shape
        return _array(state[self.batch.is_real] if is_text and not bool(self.batch.is_real.all()) else state)

    def _find_module(self, stage: str, states: States, chosen: Tensor | None, parity: Parity) -> None:
        """Records which module of the stage has the error."""
        layer = layer_of(stage)
        if layer is None or self.modules is None:
            parity.strayed = layer, stage if layer is None else "layer"
            return
        if not self._is_same_kind(layer):  # then the two have no modules in common
            parity.strayed = layer, "feed_forward"
            return
        before = states.reference if self.candidate.live else states.free
        assert before is not None
        errors = self.modules(layer, before, chosen)
        parity.modules = ModuleErrors(stage=stage, errors={name: finite(error) for name, error in errors.items()})
        strayed = (name for name, error in errors.items() if not error <= self.tolerance)
        parity.strayed = layer, next(strayed, "feed_forward")

    # -------------------- logits

    def _logits(self, states: States, parity: Parity) -> None:
        targets = self.batch.targets[self.batch.is_real].numpy()
        vocabulary = self.config.text_config.vocab_size
        rows = max(64, _LOGITS_IN_MEMORY // max(len(targets), 1))
        comparison = LogitComparison(targets, self.near_tie, vocabulary)
        is_forced = states.forced is not None and states.forced is not states.free
        forced = LogitComparison(targets, self.near_tie) if is_forced else None
        mine = self._slices(self.reference, states.reference, None, rows)
        with candidate_steps():
            theirs = self._slices(self.candidate, states.free, states.forced if is_forced else None, rows)
            for a, b in zip_longest(mine, theirs):
                if a is None or b is None or b[1].shape[-1] != a[1].shape[-1]:
                    raise CandidateFailed("its vocabulary has another size")
                comparison.update(a[0], _array(a[1]), _array(b[1]))
                if forced is not None and b[2] is not None:
                    forced.update(a[0], _array(a[1]), _array(b[2]))
        parity.metrics = comparison.result()
        if self.candidate.live and self._can_force(self.candidate.live):
            result = forced.result() if forced else parity.metrics
            parity.forced = convert({name: result[name] for name in ForcedRouting.__struct_fields__}, ForcedRouting)
        parity.pictures = Pictures(
            kl_histogram=comparison.kl_histogram(),
            logit_sample=comparison.sample(),
            routing_load=parity.routing_load,
        )

    def _slices(
        self, side: Side, state: Tensor | None, other: Tensor | None, rows: int
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Logits of the real positions, some rows of the vocabulary at a time; of a second state as well, from the same rows."""
        if side.logits is not None:
            for n, part in enumerate(torch.split(side.logits, rows, dim=-1)):
                yield n * rows, part, None
            return
        assert side.live is not None
        assert state is not None
        hidden = [x[self.batch.is_real] for x in (state, other) if x is not None]
        for first, logits in side.live.model.logit_slices(torch.cat(hidden), rows):
            parts = logits.chunk(len(hidden))
            yield first, parts[0], parts[1] if other is not None else None


def _recorded(side: Side, stage: str) -> Step:
    step = side.record.step(stage) if side.record else None
    if step is None:
        raise CandidateFailed(f"it has no {stage}")
    return step


def _same_choice(made: Step, chosen: Tensor, top_k: int) -> bool:
    return made.scores is not None and torch.equal(experts_of(made.scores, top_k), chosen)


def _same(reference: Tensor, other: Tensor) -> Tensor:
    """The reference's own tensor where the numbers are equal, so that nobody computes twice with them."""
    return reference if torch.equal(reference, other) else other


@contextlib.contextmanager
def candidate_steps() -> Iterator[None]:
    """Steps of the candidate: what they raise becomes CandidateFailed, not an error of the command."""
    try:
        yield
    except BindingError as error:  # a shape that is not the configuration's, or a dtype beyond us
        raise CandidateFailed(str(error)) from error
    except (RuntimeError, ValueError, IndexError, KeyError) as error:  # KeyError: a tensor that its configuration lacks
        raise_if_out_of_memory(error)
        raise CandidateFailed(one_line(error)) from error


def _array(tensor: Tensor) -> Any:
    return tensor.float().cpu().numpy()
