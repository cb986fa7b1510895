"""Two models on the same batch: how far their logits lie apart, and at which layer and module the second one strays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4.weights import BindingError
from llama4_convert.errors import one_line, raise_if_out_of_memory
from llama4_convert.metrics import LogitComparison, finite, nmse

if TYPE_CHECKING:
    from torch import Tensor

    from llama4.model import Llama4ForCausalLM
    from llama4_convert.prompts import Batch

# A layer that was given the reference's input and strays further than this has not merely rounded.
_LOCAL_NMSE = {"float32": 1e-9, "bfloat16": 1e-4, "float16": 1e-6}
_LOSSY_NMSE = 0.5
_METRIC_ROWS = 2048  # of the vocabulary at a time

_NO_METRICS: dict[str, float | int | None] = {
    "tokens": 0,
    **dict.fromkeys(("top1_agreement", "kl_mean", "kl_p999", "nmse", "max_abs_diff")),
    **dict.fromkeys(("perplexity_reference", "perplexity_candidate")),
}


class CandidateFailed(Exception):
    """The candidate's weights and configuration do not make a model that runs, or not one of this size."""


@dataclass(frozen=True)
class Parity:
    """What running both told. `strayed`: the first layer (None outside layers) and module with an error of its own."""

    metrics: dict[str, float | int | None] = field(default_factory=lambda: dict(_NO_METRICS))
    layers: list[dict[str, Any]] = field(default_factory=list)
    strayed: tuple[int | None, str] | None = None
    failure: str | None = None


def side_by_side(
    ours: Llama4ForCausalLM,
    theirs: Llama4ForCausalLM,
    batch: Batch,
    dtype: str,
    is_lossy: bool = False,
    advance: Callable[[float], None] = lambda part: None,
) -> Parity:
    """Both models a layer at a time, so that each weight is read once; `advance` is told the parts done, which sum to 1.

    Two errors a layer: propagated, each model on its own output of the layer before; and local, the candidate on the
    reference's. `is_lossy`: the candidate is quantized, and only a layer that has lost most of its output strays. Raises
    CandidateFailed.
    """
    import torch

    n_layers = ours.config.text_config.num_hidden_layers
    threshold = _LOSSY_NMSE if is_lossy else _LOCAL_NMSE[dtype]
    if theirs.config.text_config.num_hidden_layers != n_layers:
        raise CandidateFailed(f"it has {theirs.config.text_config.num_hidden_layers} layers, not {n_layers}")

    def error(reference: Tensor, other: Tensor) -> float:
        if reference.shape != other.shape:
            raise CandidateFailed(f"its activations are {list(other.shape)}, not {list(reference.shape)}")
        return nmse(_array(reference[batch.is_real]), _array(other[batch.is_real]))

    strayed: tuple[int | None, str] | None = None
    layers: list[dict[str, Any]] = []
    x = ours.embed(batch.tokens, batch.pixel_values)
    with candidate_steps():
        y = theirs.embed(batch.tokens, batch.pixel_values)
    if not error(x, y) <= threshold:  # which NaN is not either
        strayed = (None, "embed")
    for index in range(n_layers):
        before, x = x, ours.model.layer(index, x)
        with candidate_steps():
            # As one batch: the candidate's weights are read once for both.
            y, alone = theirs.model.layer(index, torch.cat([y, before])).chunk(2)
        local, propagated = error(x, alone), error(x, y)
        layers.append({"layer": index, "nmse_local": finite(local), "nmse_propagated": finite(propagated)})
        if strayed is None and not local <= threshold:
            with candidate_steps():
                attention = [_attention(model, index, before) for model in (ours, theirs)]
            strayed = (index, "feed_forward" if error(*attention) <= threshold else "attention")
        advance(1 / (n_layers + 1))
    x, before = ours.model.final_norm(x), x
    with candidate_steps():
        alone, y = theirs.model.final_norm(before), theirs.model.final_norm(y)
    if strayed is None and not error(x, alone) <= threshold:
        strayed = (None, "norm")
    with candidate_steps():
        slices = theirs.logit_slices(y[batch.is_real], _METRIC_ROWS)
        metrics = _compare_logits(ours, x, batch, (logits for _, logits in slices))
    advance(1 / (n_layers + 1))
    return Parity(metrics, layers, strayed)


def against_transformers(
    ours: Llama4ForCausalLM,
    path: Path,
    batch: Batch,
    dtype: str,
    advance: Callable[[float], None] = lambda part: None,
) -> Parity:
    """The candidate directory run by Transformers, which looks into no layer. Raises CandidateFailed."""
    import torch

    from llama4_convert.transformers_runner import transformers_logits

    hidden = ours.hidden_states(batch.tokens, batch.pixel_values)
    advance(0.5)
    logits = transformers_logits(path, batch, getattr(torch, dtype))

    metrics = _compare_logits(ours, hidden, batch, torch.split(logits, _METRIC_ROWS, dim=-1))
    advance(0.5)
    return Parity(metrics)


def _attention(model: Llama4ForCausalLM, index: int, x: Tensor) -> Tensor:
    return model.model.attention(index, model.model.norm(f"layers.{index}.attention_norm", x))


def _compare_logits(
    ours: Llama4ForCausalLM, hidden: Tensor, batch: Batch, theirs: Iterable[Tensor]
) -> dict[str, float | int | None]:
    comparison = LogitComparison(batch.targets[batch.is_real].numpy())
    for mine, other in zip_longest(ours.logit_slices(hidden[batch.is_real], _METRIC_ROWS), theirs):
        if mine is None or other is None or other.shape != mine[1].shape:
            raise CandidateFailed("its vocabulary has another size")
        comparison.update(mine[0], _array(mine[1]), _array(other))
    return comparison.result()


@contextlib.contextmanager
def candidate_steps() -> Iterator[None]:
    """Steps of the candidate: what they raise is its failure, not ours."""
    try:
        yield
    except BindingError as error:  # a shape that is not the configuration's, or a dtype beyond us
        raise CandidateFailed(str(error)) from error
    except (RuntimeError, ValueError, IndexError) as error:
        raise_if_out_of_memory(error)
        raise CandidateFailed(one_line(error)) from error


def _array(tensor: Tensor) -> Any:
    return tensor.float().cpu().numpy()
