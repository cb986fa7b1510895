"""How far two models' logits lie apart, gathered a slice of the vocabulary at a time.

With logits a (reference) and b (candidate) of one position and p = softmax(a), the divergence in nats is

    KL = sum_v p_v (log softmax(a)_v - log softmax(b)_v) = sum_v p_v (a_v - b_v) - (logsumexp a - logsumexp b)

Each of the three sums can be taken slice by slice if it is rescaled when a larger logit turns up, so a vocabulary of 202,048
never has to be in memory at once. Sums are float64.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama4_convert.validation.results import Histogram

Logits = NDArray[np.floating[Any]]
_Sums = NDArray[np.float64]


# Edges of the histogram of divergences, nats: five a power of ten, from rounding to nonsense.
KL_EDGES = [float(f"{10 ** (e / 5):.3g}") for e in range(-60, 8)]
_LOGITS_IN_CACHE = 1 << 16  # of each model, that are worked on at a time
_SAMPLED_PAIRS = 2000  # of logits, for a picture
_NUMBERS_WIDENED = 1 << 20  # to float64 by `nmse`, at a time


class LogitComparison:
    """Metrics over `targets` positions [N]: the token that really follows each, -1 where none does.

    A position whose two likeliest tokens lie closer than `near_tie` (nats, in the reference) is set aside and counted: which
    of them comes first is for rounding to say. `vocabulary`, if given, draws a sample of pairs of logits.
    """

    def __init__(self, targets: NDArray[np.int64], near_tie: float = 0.0, vocabulary: int = 0) -> None:
        n = len(targets)
        self.targets, self.near_tie = targets, near_tie
        self._max = np.full((2, n), -np.inf)  # of the reference's logits, and of the candidate's
        self._second = np.full(n, -np.inf)  # second largest of the reference's
        self._sum = np.zeros((2, n))  # of exp(logit - max)
        self._weighted = np.zeros(n)  # sum of exp(a - max a) (a - b)
        self._top = np.zeros((2, n), np.int64)
        self._of_target = np.zeros((2, n))
        self._products = np.zeros((3, n))  # sums of a a, b b and a b
        self._squared_error, self._largest = np.zeros(n), np.zeros(n)
        self._drawn = np.unique(
            np.random.default_rng(0).integers(0, max(n * vocabulary, 1), _SAMPLED_PAIRS * bool(vocabulary))
        )
        self._vocabulary = max(vocabulary, 1)
        self._pairs: list[NDArray[np.float64]] = []

    def update(self, first: int, reference: Logits, candidate: Logits) -> None:
        """Take in the logits [N, tokens] of the tokens from id `first` on."""
        n, width = reference.shape
        rows = max(1, _LOGITS_IN_CACHE // max(width, 1))
        blocks = [slice(start, start + rows) for start in range(0, n, rows)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # numpy lets go of the interpreter
            for _ in threads.map(lambda block: self._update(block, first, reference[block], candidate[block]), blocks):
                pass
        row, column = np.divmod(self._drawn, self._vocabulary)
        mine = (column >= first) & (column < first + width)
        row, column = row[mine], column[mine] - first
        self._pairs.append(np.stack([reference[row, column], candidate[row, column]], 1).astype(np.float64))

    def _update(self, at: slice, first: int, reference: Logits, candidate: Logits) -> None:
        """Take in some of the positions, few enough for the processor's cache."""
        pair = np.stack([reference, candidate]).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # of logits that overflowed: the NaN is the answer
            difference = pair[1] - pair[0]
            self._squared_error[at] += np.einsum("nv,nv->n", difference, difference)
            for products, (x, y) in zip(self._products, ((0, 0), (1, 1), (0, 1)), strict=True):
                products[at] += np.einsum("nv,nv->n", pair[x], pair[y])
            # Not max(): that would pass over a NaN.
            self._largest[at] = np.maximum(self._largest[at], np.abs(difference).max(-1))

            best, before = pair.max(-1), self._max[:, at]
            runner_up = np.partition(pair[0], -2, axis=-1)[:, -2] if pair.shape[-1] > 1 else -np.inf
            self._second[at] = np.maximum(np.maximum(self._second[at], runner_up), np.minimum(before[0], best[0]))
            self._top[:, at] = np.where(best > before, first + pair.argmax(-1), self._top[:, at])
            higher = np.maximum(best, before)
            rescale = np.exp(before - higher)
            here = np.flatnonzero((self.targets[at] >= first) & (self.targets[at] < first + pair.shape[-1]))
            self._of_target[:, at][:, here] = pair[:, here, self.targets[at][here] - first]
            pair -= higher[..., None]
            e = np.exp(pair, out=pair)
            self._sum[:, at] = self._sum[:, at] * rescale + e.sum(-1)
            self._weighted[at] = self._weighted[at] * rescale[0] - np.einsum("nv,nv->n", e[0], difference)
            self._max[:, at] = higher

    def divergence(self) -> NDArray[np.float64]:
        """KL in nats at each position [N]; NaN or infinite where the logits are."""
        with np.errstate(invalid="ignore", divide="ignore"):
            log_sum = self._max + np.log(self._sum)
            kl: NDArray[np.float64] = self._weighted / self._sum[0] - (log_sum[0] - log_sum[1])
        return np.maximum(kl, 0)  # below zero by rounding only

    def result(self) -> dict[str, float | int | None]:
        """The metrics by their names in `Validation`; None for what is not a finite number."""
        kl = self.divergence()
        with np.errstate(invalid="ignore", divide="ignore"):
            nll = (self._max + np.log(self._sum) - self._of_target)[:, self.targets >= 0]
            aa, bb, ab = self._products
            cosine = ab / np.sqrt(aa * bb)
            clear = ~(self._max[0] - self._second < self.near_tie)
        sound = bool(np.isfinite(kl).all())
        agrees = (self._top[0] == self._top[1])[clear]
        power = float(self._products[0].sum())
        metrics: dict[str, float | int | None] = {
            "tokens": len(self.targets),
            # argmax calls NaN the largest: two broken models would agree. Where all are ties, none is wrong.
            "top1_agreement": (float(agrees.mean()) if agrees.size else 1.0) if sound else None,
            "near_ties": int((~clear).sum()) if sound else None,
            "kl_mean": float(kl.mean()),
            "kl_median": float(np.median(kl)) if sound else None,
            "kl_p999": float(np.quantile(kl, 0.999)) if sound else None,
            "nmse": float(self._squared_error.sum()) / power if power else math.nan,
            "max_abs_diff": float(np.max(self._largest, initial=0)),
            "cosine": float(cosine.mean()),
        }
        for side, (value, error) in zip(
            ("reference", "candidate", "ratio"),
            (exp_of_mean(nll[0]), exp_of_mean(nll[1]), exp_of_mean(nll[1] - nll[0])),
            strict=True,
        ):
            metrics |= {f"perplexity_{side}": value, f"perplexity_{side}_error": error}
        return {name: finite(value) for name, value in metrics.items()}

    def kl_histogram(self) -> Histogram:
        """How many positions lie between each two of `KL_EDGES`, and below the first; none whose divergence is no number."""
        kl = self.divergence()
        kl = np.minimum(kl[np.isfinite(kl)], KL_EDGES[-1])
        counts = np.histogram(kl, KL_EDGES)[0].tolist()
        return Histogram(edges=KL_EDGES, counts=counts, below=int((kl < KL_EDGES[0]).sum()))

    def sample(self) -> list[tuple[float, float]]:
        """Pairs of logits [reference, candidate] at positions and tokens drawn with a fixed seed; finite ones."""
        pairs = np.concatenate(self._pairs) if self._pairs else np.empty((0, 2))
        drawn = pairs[np.isfinite(pairs).all(-1)].tolist()
        # All digits of a float32: the report draws the difference of two.
        return [(float(f"{a:.9g}"), float(f"{b:.9g}")) for a, b in drawn]


def exp_of_mean(nll: _Sums) -> tuple[float, float]:
    """Perplexity: exp of the mean negative log-likelihood in nats, and its standard error (delta method, tokens independent).

    Infinite beyond what a float holds, NaN without a position; the error is NaN of fewer than two. Of the *difference* of two
    models' likelihoods it is the ratio of their perplexities, which is known far better than either.
    """
    if not nll.size:
        return math.nan, math.nan
    with np.errstate(invalid="ignore"):
        mean = float(nll.mean())
        error = float(nll.std(ddof=1)) / math.sqrt(nll.size) if nll.size > 1 else math.nan
    value = math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan
    return value, value * error


def finite(value: float | int | None) -> float | int | None:
    """None in the place of NaN and infinities, which JSON lacks."""
    return value if value is None or math.isfinite(value) else None


def nmse(reference: Logits, candidate: Logits, base: Logits | None = None) -> float:
    """Sum of squared differences over the sum of the reference's squares; 0 where both are empty or zero.

    With `base` the reference's squares are those of reference - base: what a layer has added to the residual stream.
    """
    error = power = 0.0
    arrays = [x.reshape(-1, x.shape[-1] if x.ndim else 1) for x in (reference, candidate, base) if x is not None]
    rows = max(1, _NUMBERS_WIDENED // max(arrays[0].shape[-1], 1))
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(arrays[0]), rows):
            a, b, *rest = (x[start : start + rows].astype(np.float64) for x in arrays)
            error += float(np.square(b - a).sum())
            power += float(np.square(a - rest[0] if rest else a).sum())
    return error / power if power else (0.0 if error == 0 else math.inf)
