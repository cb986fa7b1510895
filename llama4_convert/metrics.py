"""How far two models' logits lie apart, gathered a slice of the vocabulary at a time.

With logits a (reference) and b (candidate) of one position and p = softmax(a), the divergence in nats is

    KL = sum_v p_v (log softmax(a)_v - log softmax(b)_v) = sum_v p_v (a_v - b_v) - (logsumexp a - logsumexp b)

Each of the three sums can be taken slice by slice if it is rescaled when a larger logit turns up, so a vocabulary of 202,048
never has to be in memory at once. Sums are float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.floating[Any]]
_Sums = NDArray[np.float64]


class LogitComparison:
    """Metrics over `targets` positions [N]: the token that really follows each, -1 where none does."""

    def __init__(self, targets: NDArray[np.int64]) -> None:
        n = len(targets)
        self.targets = targets
        self._max = np.full((2, n), -np.inf)  # of the reference's logits, and of the candidate's
        self._sum = np.zeros((2, n))  # of exp(logit - max)
        self._weighted = np.zeros(n)  # sum of exp(a - max a) (a - b)
        self._top = np.zeros((2, n), np.int64)
        self._of_target = np.zeros((2, n))
        self._squared_error = self._squared = self._largest = 0.0

    def update(self, first: int, reference: Logits, candidate: Logits) -> None:
        """Take in the logits [N, tokens] of the tokens from id `first` on."""
        pair = np.stack([reference, candidate]).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # of logits that overflowed: the NaN is the answer
            difference = pair[1] - pair[0]
            self._squared_error += float(np.square(difference).sum())
            self._squared += float(np.square(pair[0]).sum())
            # Not max(): that would pass over a NaN.
            self._largest = float(np.maximum(self._largest, np.abs(difference).max()))

            best = pair.max(-1)
            self._top = np.where(best > self._max, first + pair.argmax(-1), self._top)
            higher = np.maximum(best, self._max)
            rescale = np.exp(self._max - higher)
            e = np.exp(pair - higher[..., None])
            self._sum = self._sum * rescale + e.sum(-1)
            self._weighted = self._weighted * rescale[0] - (e[0] * difference).sum(-1)
            self._max = higher

        here = np.flatnonzero((self.targets >= first) & (self.targets < first + reference.shape[-1]))
        self._of_target[:, here] = pair[:, here, self.targets[here] - first]

    def result(self) -> dict[str, float | int | None]:
        """The metrics by their names in the JSON contract; None for what is not a finite number."""
        with np.errstate(invalid="ignore", divide="ignore"):
            log_sum = self._max + np.log(self._sum)
            kl = self._weighted / self._sum[0] - (log_sum[0] - log_sum[1])
            kl = np.maximum(kl, 0)  # below zero by rounding only
            nll = (log_sum - self._of_target)[:, self.targets >= 0]
        sound = bool(np.isfinite(kl).all())
        perplexity = [_perplexity(row) for row in nll]
        metrics: dict[str, float | int | None] = {
            "tokens": len(self.targets),
            # argmax calls NaN the largest: two broken models would agree.
            "top1_agreement": float((self._top[0] == self._top[1]).mean()) if sound else None,
            "kl_mean": float(kl.mean()),
            "kl_p999": float(np.quantile(kl, 0.999)) if sound else None,
            "nmse": self._squared_error / self._squared if self._squared else math.nan,
            "max_abs_diff": self._largest,
            "perplexity_reference": perplexity[0],
            "perplexity_candidate": perplexity[1],
        }
        return {name: finite(value) for name, value in metrics.items()}


def _perplexity(nll: _Sums) -> float:
    """exp of the mean negative log-likelihood in nats; infinite beyond what a float holds, NaN without a position."""
    if not nll.size:
        return math.nan
    mean = float(nll.mean())
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


def finite(value: float | int | None) -> float | int | None:
    """None in the place of NaN and infinities, which JSON lacks."""
    return value if value is None or math.isfinite(value) else None


def nmse(reference: Logits, candidate: Logits) -> float:
    """Sum of squared differences over the sum of the reference's squares; 0 where both are empty or zero."""
    error = float(np.square(candidate.astype(np.float64) - reference).sum())
    power = float(np.square(reference.astype(np.float64)).sum())
    return error / power if power else (0.0 if error == 0 else math.inf)
