"""A layer's error split among its modules: each is given the input that the reference gives its own, and compared alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llama4.model import Llama4ForCausalLM
from llama4.text import choose, swiglu
from llama4_convert.validation.parity.metrics import nmse
from llama4_convert.validation.parity.walk import candidate_steps

# What a module makes of its inputs, in any model of ours.
Run = Callable[[Llama4ForCausalLM, Sequence[Tensor]], Tensor]


class LooksInside(Protocol):
    """A record that can be asked what the modules of a layer were given and made; names as `module_runs` has them."""

    def modules(self, layer: int) -> Mapping[str, tuple[list[Tensor], Tensor]]: ...


def module_runs(layer: int, experts: Sequence[int] | None) -> dict[str, Run]:
    """The modules of a layer, in the order in which they compute; `experts` None: a dense layer.

    "attention" is what lies between the projections: RoPE, QK-norm, temperature, chunks.
    """
    at = f"layers.{layer}."

    def norm(name: str) -> Run:
        return lambda model, x: model.model.norm(at + name, x[0])

    def linear(name: str) -> Run:
        return lambda model, x: F.linear(x[0], model.weights[at + name])

    def block(name: str) -> Run:
        return lambda model, x: swiglu(x[0], model.weights, f"{at}{name}.")

    runs: dict[str, Run] = {"attention_norm": norm("attention_norm")}
    runs |= {f"attention.{name}": linear(f"attention.{name}") for name in "qkv"}
    runs["attention"] = lambda model, x: model.model.attend(layer, x[0], x[1], x[2])
    runs |= {"attention.o": linear("attention.o"), "ffn_norm": norm("ffn_norm")}
    if experts is None:
        return runs | {"feed_forward": block("feed_forward")}
    runs |= {"feed_forward.router": linear("feed_forward.router"), "feed_forward.shared": block("feed_forward.shared")}
    return runs | {f"feed_forward.experts.{e}": block(f"feed_forward.experts.{e}") for e in experts}


def split(
    ours: Llama4ForCausalLM, theirs: Llama4ForCausalLM, layer: int, before: Tensor, chosen: Tensor | None
) -> dict[str, float]:
    """Normalized squared error of each module of `theirs`; `before` is the layer's input, `chosen` the experts of its tokens."""
    errors: dict[str, float] = {}
    for name, run, inputs, expected in _reference_run(ours, layer, before, chosen):
        with candidate_steps():
            errors[name] = nmse(expected.float().numpy(), run(theirs, inputs).float().numpy())
    return errors


def split_of_record(ours: Llama4ForCausalLM, record: LooksInside, layer: int) -> dict[str, float]:
    """The same of a model that only a record knows: our modules on its inputs."""
    found = record.modules(layer)
    experts = [int(name.rpartition(".")[2]) for name in found if name.startswith("feed_forward.experts.")]
    runs = module_runs(layer, experts if ours.config.text_config.is_moe(layer) else None)
    return {
        name: nmse(run(ours, found[name][0]).float().numpy(), found[name][1].float().numpy())
        for name, run in runs.items()
        if name in found
    }


def _reference_run(
    ours: Llama4ForCausalLM, layer: int, before: Tensor, chosen: Tensor | None
) -> Iterator[tuple[str, Run, list[Tensor], Tensor]]:
    """Each module of the reference with its inputs and its output."""
    config = ours.config.text_config
    made: dict[str, Tensor] = {}
    runs = module_runs(layer, [] if config.is_moe(layer) else None)

    def step(name: str, *inputs: Tensor) -> tuple[str, Run, list[Tensor], Tensor]:
        made[name] = runs[name](ours, inputs)
        return name, runs[name], list(inputs), made[name]

    yield step("attention_norm", before)
    for name in "qkv":
        yield step(f"attention.{name}", made["attention_norm"])
    yield step("attention", *(made.pop(f"attention.{name}") for name in "qkv"))
    yield step("attention.o", made.pop("attention"))
    yield step("ffn_norm", before + made.pop("attention.o"))
    x = made["ffn_norm"].flatten(0, 1)
    if not config.is_moe(layer):
        yield step("feed_forward", x)
        return
    yield step("feed_forward.router", x)
    yield step("feed_forward.shared", x)
    scores = made["feed_forward.router"]
    chosen = choose(scores, config.num_experts_per_tok) if chosen is None else chosen
    gates = scores.gather(-1, chosen).sigmoid()
    experts = sorted(set(chosen.flatten().tolist()))
    runs |= module_runs(layer, experts)
    for expert in experts:
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        yield step(f"feed_forward.experts.{expert}", x[token] * gates[token, slot, None])
