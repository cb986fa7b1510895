"""The metrics are what their formulas say, however the vocabulary is cut, and a number that is none never passes."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_convert.validation.parity.gates import AT_LEAST, EXACT, GATE_NAMES, within
from llama4_convert.validation.parity.metrics import LogitComparison, finite, nmse

POSITIONS, VOCABULARY = 7, 23


def logits(seed: int, scale: float = 1.0, n: int = POSITIONS, vocabulary: int = VOCABULARY) -> Any:
    return (np.random.default_rng(seed).standard_normal((n, vocabulary)) * scale).astype(np.float32)


def compare(
    reference: Any, candidate: Any, targets: Any = None, widths: list[int] | None = None, near_tie: float = 0.0
) -> dict[str, Any]:
    return comparison_of(reference, candidate, targets, widths, near_tie).result()


def comparison_of(
    reference: Any, candidate: Any, targets: Any = None, widths: list[int] | None = None, near_tie: float = 0.0
) -> LogitComparison:
    """`widths`: of the slices, one after another; the last one takes what is left."""
    targets = np.full(len(reference), -1) if targets is None else np.asarray(targets)
    first, vocabulary = 0, reference.shape[1]
    comparison = LogitComparison(targets, near_tie, vocabulary)
    for width in [*(widths or []), vocabulary]:
        last = min(first + width, vocabulary)
        if first < last:
            comparison.update(first, reference[:, first:last], candidate[:, first:last])
        first = last
    return comparison


def directly(reference: Any, candidate: Any, targets: Any) -> dict[str, Any]:
    """The same in torch's words, in float64 and with the whole vocabulary in memory."""
    a, b = (torch.from_numpy(x).double() for x in (reference, candidate))
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    index = torch.tensor([i for i, target in enumerate(targets) if target >= 0], dtype=torch.long)
    followers = torch.as_tensor(targets)[index]
    nll = -torch.stack([log_p[index, followers], log_q[index, followers], (log_q - log_p)[index, followers]])
    perplexity = {}
    for row, side in zip(nll, ("reference", "candidate", "ratio"), strict=True):
        found = row.mean().exp().item() if len(index) else None
        error = found * row.std().item() / len(index) ** 0.5 if found is not None and len(index) > 1 else None
        perplexity |= {f"perplexity_{side}": found, f"perplexity_{side}_error": error}
    return {
        "tokens": len(targets),
        "top1_agreement": (a.argmax(-1) == b.argmax(-1)).double().mean().item(),
        "near_ties": 0,
        "cosine": torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item(),
        "kl_mean": kl.mean().item(),
        "kl_median": float(np.median(kl.numpy())),
        "kl_p999": kl.quantile(0.999).item(),
        "nmse": ((b - a).square().sum() / a.square().sum()).item(),
        "max_abs_diff": (b - a).abs().max().item(),
    } | perplexity


slices = st.lists(st.integers(1, VOCABULARY), max_size=VOCABULARY)
targets_of = st.lists(st.integers(-1, VOCABULARY - 1), min_size=POSITIONS, max_size=POSITIONS)


# -------------------- values


@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 30.0]),
    error=st.sampled_from([1e-3, 1.0]),
    widths=slices,
    targets=targets_of,
)
@settings(max_examples=150, deadline=None)
def test_every_metric_is_the_direct_computation_in_slices_of_any_width(
    seed: int, scale: float, error: float, widths: list[int], targets: list[int]
) -> None:
    reference = logits(seed, scale)
    candidate = reference + logits(seed + 1, scale * error)
    found = compare(reference, candidate, targets, widths)
    assert found == pytest.approx(directly(reference, candidate, targets), rel=1e-9, abs=1e-9)


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]), widths=slices)
@settings(max_examples=60, deadline=None)
def test_a_model_equals_itself_and_no_divergence_is_negative(seed: int, scale: float, widths: list[int]) -> None:
    reference, other = logits(seed, scale), logits(seed + 1, scale)
    same = compare(reference, reference, widths=widths)
    assert same["kl_mean"] == same["kl_p999"] == same["nmse"] == same["max_abs_diff"] == 0
    assert same["top1_agreement"] == 1
    different = compare(reference, other, widths=widths)
    assert 0 < different["kl_mean"] <= different["kl_p999"]
    assert compare(reference, np.nextafter(reference, np.float32(np.inf)))["kl_mean"] >= 0


def test_the_same_number_added_to_every_logit_is_no_divergence() -> None:
    reference = logits(0).astype(np.float64)
    found = compare(reference, reference + 1000)
    assert found["kl_mean"] == pytest.approx(0, abs=1e-9)
    assert found["top1_agreement"] == 1
    assert found["max_abs_diff"] == pytest.approx(1000)


def test_top1_counts_the_positions_whose_largest_logit_is_the_same_token() -> None:
    reference = np.eye(4, 8, dtype=np.float32)
    candidate = reference.copy()
    candidate[1, 7] = candidate[3, 0] = 2
    assert compare(reference, candidate, widths=[3, 3])["top1_agreement"] == 0.5


def test_of_equal_largest_logits_the_first_counts_in_whatever_slice() -> None:
    flat = np.zeros((2, 9), np.float32)
    candidate = flat.copy()
    candidate[:, 0] = 1
    assert compare(flat, candidate, widths=[2, 2])["top1_agreement"] == 1


def test_p999_is_the_worst_of_few_positions_and_the_mean_is_not() -> None:
    reference, candidate = logits(0, n=1000), logits(0, n=1000)
    candidate[17, 3] += 20
    found = compare(reference, candidate)
    alone = compare(reference[17:18], candidate[17:18])["kl_mean"]
    assert found["kl_mean"] == pytest.approx(alone / 1000)
    assert 0 < found["kl_p999"] < alone


# -------------------- perplexity


def test_of_a_uniform_model_it_is_the_size_of_the_vocabulary() -> None:
    flat = np.full((POSITIONS, 202), 3.5, np.float32)
    found = compare(flat, flat, np.arange(POSITIONS), widths=[100, 7])
    assert found["perplexity_reference"] == pytest.approx(202)
    assert found["perplexity_candidate"] == pytest.approx(202)


def test_of_a_certain_model_it_is_one() -> None:
    sure = np.zeros((3, 5), np.float32)
    sure[np.arange(3), [4, 0, 2]] = 100
    assert compare(sure, sure, [4, 0, 2])["perplexity_candidate"] == pytest.approx(1)


def test_positions_that_nothing_follows_do_not_count() -> None:
    reference, candidate = logits(0), logits(1)
    some = compare(reference, candidate, [3, -1, 5, -1, -1, 9, -1])
    kept = [0, 2, 5]
    only = compare(reference[kept], candidate[kept], [3, 5, 9])
    for side in ("reference", "candidate"):
        assert some[f"perplexity_{side}"] == pytest.approx(only[f"perplexity_{side}"])


def test_without_any_follower_there_is_none() -> None:
    found = compare(logits(0), logits(1))
    assert found["perplexity_reference"] is None
    assert found["perplexity_candidate"] is None
    assert found["kl_mean"] > 0


@pytest.mark.parametrize("nll", [699.0, 705.0, 1e4, 3e38])
def test_beyond_what_a_float_holds_it_is_none_and_no_overflow(nll: float) -> None:
    improbable = np.zeros((1, 2), np.float32)
    improbable[0, 1] = nll
    found = compare(improbable, improbable, [0])
    assert found["perplexity_reference"] == (pytest.approx(math.exp(nll)) if nll < 700 else None)


@given(seed=st.integers(0, 1000), widths=slices, near_tie=st.sampled_from([0.05, 0.5, 5.0]))
@settings(max_examples=60, deadline=None)
def test_near_ties_are_set_aside_and_counted(seed: int, widths: list[int], near_tie: float) -> None:
    reference, candidate = logits(seed), logits(seed) + logits(seed + 1, 0.3)
    top = np.sort(reference.astype(np.float64), -1)
    clear = top[:, -1] - top[:, -2] >= near_tie
    found = compare(reference, candidate, widths=widths, near_tie=near_tie)
    assert found["near_ties"] == (~clear).sum()
    agrees = (reference.argmax(-1) == candidate.argmax(-1))[clear]
    assert found["top1_agreement"] == (agrees.mean() if clear.any() else 1)


def test_the_ratio_of_perplexities_is_known_better_than_either() -> None:
    reference = logits(0, n=200)
    candidate = reference + logits(1, 0.01, n=200)
    found = compare(reference, candidate, np.arange(200) % VOCABULARY)
    assert found["perplexity_ratio"] == pytest.approx(found["perplexity_candidate"] / found["perplexity_reference"])
    assert found["perplexity_ratio_error"] < found["perplexity_reference_error"] / found["perplexity_reference"] / 10


@given(seed=st.integers(0, 1000), widths=slices)
@settings(max_examples=30, deadline=None)
def test_the_histogram_counts_every_position_and_the_sample_is_of_the_logits(seed: int, widths: list[int]) -> None:
    reference, candidate = logits(seed), logits(seed) + logits(seed + 1, 0.1)
    comparison = comparison_of(reference, candidate, widths=widths)
    histogram = comparison.kl_histogram()
    assert histogram.below + sum(histogram.counts) == POSITIONS
    assert len(histogram.edges) == len(histogram.counts) + 1
    pairs = set(zip(reference.ravel().tolist(), candidate.ravel().tolist(), strict=True))
    assert pairs >= {tuple(map(float, np.float32(pair))) for pair in comparison.sample()}  # to the last bit
    assert 0 < len(comparison.sample()) <= POSITIONS * VOCABULARY


# -------------------- what is no number


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["candidate", "reference", "both"])
@pytest.mark.parametrize("token", [0, 11, VOCABULARY - 1])
def test_one_logit_that_is_no_number_is_none_and_fails_every_gate(value: float, side: str, token: int) -> None:
    pair = {"reference": logits(0), "candidate": logits(0)}
    for name in pair if side == "both" else [side]:
        pair[name][2, token] = value
    found = compare(**pair, widths=[10, 10])
    for name in GATE_NAMES:
        assert found[name] is None, name
        assert not within(name, found[name], -1.0 if name in AT_LEAST else 1e30)


def test_a_whole_slice_of_nothing_is_none() -> None:
    empty = logits(0)
    empty[:, :10] = -np.inf
    assert compare(empty, logits(0), widths=[10, 10])["kl_mean"] is None
    assert compare(logits(0), empty, widths=[10, 10])["kl_mean"] is None


def test_every_result_is_strict_json() -> None:
    broken = np.full((2, 3), np.nan, np.float32)
    for result in (compare(broken, broken, [0, 1]), compare(logits(0), logits(1))):
        assert json.loads(json.dumps(result, allow_nan=False)) == result


# -------------------- gates


@pytest.mark.parametrize("dtype", EXACT)
def test_a_model_that_equals_itself_passes_the_gates_of_every_dtype(dtype: str) -> None:
    found = compare(logits(0), logits(0))
    assert all(within(name, found[name], limit) for name, limit in EXACT[dtype].gates.items())


def test_the_limit_itself_passes() -> None:
    assert within("top1_agreement", 0.95, 0.95)
    assert not within("top1_agreement", 0.9499, 0.95)
    assert within("kl_mean", 0.01, 0.01)
    assert not within("kl_mean", 0.0101, 0.01)


# -------------------- nmse, and finite


def test_nmse_is_the_error_over_the_power() -> None:
    reference, candidate = logits(0), logits(1)
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    assert nmse(reference, candidate) == pytest.approx(((a - b) ** 2).sum() / (a**2).sum(), rel=1e-12)
    assert nmse(reference, reference * np.float32(2)) == pytest.approx(1)


def test_nmse_of_nothing_and_of_something_made_of_nothing() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert nmse(zeros, zeros) == 0
    assert nmse(zeros[:0], zeros[:0]) == 0
    assert nmse(zeros, zeros + 1) == math.inf
    assert math.isnan(nmse(zeros + 1, zeros + np.float32(np.nan)))


def test_nmse_squares_what_single_precision_could_not_hold() -> None:
    large = np.full((1, 2), 1e30, np.float32)
    assert nmse(large, large * np.float32(1.5)) == pytest.approx(0.25)


@pytest.mark.parametrize(("value", "kept"), [(1.5, 1.5), (0, 0), (None, None), (math.nan, None), (-math.inf, None)])
def test_finite_leaves_out_what_json_lacks(value: Any, kept: Any) -> None:
    assert finite(value) == kept


# -------------------- the terminal


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["candidate", "reference", "both"])
def test_no_number_makes_no_warning_on_the_terminal(value: float, side: str) -> None:
    pair = {"reference": logits(0), "candidate": logits(0)}
    for name in pair if side == "both" else [side]:
        pair[name][2, 3] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(**pair, widths=[10, 10])
