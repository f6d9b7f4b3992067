"""Are two models really different on the same examples? The exact test, and the interval and p of resamples.

Pure functions, numpy alone. N examples, in the same order for both models; evaluation/bootstrap.py draws the resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.common import InputError


@dataclass(frozen=True)
class SignTest:
    """Result of ``sign_test``.

    Attributes:
        first: examples on which the first model scores higher.
        second: those on which the second does.
        p: two-sided; the chance of a split at least as uneven if both models were equally good.
    """

    first: int
    second: int
    p: float


@dataclass(frozen=True)
class Interval:
    """How far apart two models are.

    Attributes:
        difference: score of the second model minus that of the first.
        low, high: ends of the confidence interval of the difference.
        p: two-sided, by inversion of the interval; at least 2 / (draws + 1), and at least 2 / 2^n with n clusters
            that differ: the smallest p that an exact test of so few has, where resamples alone would tell nothing.
    """

    difference: float
    low: float
    high: float
    p: float


def sign_test(first: NDArray[Any], second: NDArray[Any]) -> SignTest:
    """The exact sign test on paired scores [N]; of right and wrong (bool) it is McNemar's exact test.

    Ties tell nothing and are left out (McNemar, Psychometrika 1947; its exact form: Dixon & Mood, JASA 1946).

    Raises:
        InputError: shapes that differ, or a score that is NaN.
    """
    _check(first, second)
    more, less = int(np.count_nonzero(first > second)), int(np.count_nonzero(first < second))
    return SignTest(more, less, _binomial_p(min(more, less), more + less))


def _binomial_p(fewer: int, total: int) -> float:
    """min(1, 2 P(X <= fewer)) for X ~ Binomial(total, 1/2), by logarithms: 2^-total is beyond float64 from 1,075 on."""
    k = np.arange(1, fewer + 1, dtype=np.float64)
    log_terms = np.concatenate([[0.0], np.cumsum(np.log((total - k + 1) / k))]) - total * np.log(2.0)
    largest = float(log_terms.max())
    return min(1.0, 2 * float(np.exp(largest) * np.exp(log_terms - largest).sum()))


def interval_of(differences: NDArray[np.float64], difference: float, differing: int, level: float) -> Interval:
    """The percentile interval of ``differences`` [draws], which resamples gave, and its p.

    Args:
        differences: of the two models' scores, in each resample.
        difference: the one that was observed.
        differing: clusters of examples in which the models differ.
        level: of the interval.
    """
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    beyond = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    p = min(1.0, max(2 * (float(beyond) + 1) / (len(differences) + 1), 2.0 ** (1 - differing)))
    return Interval(difference, float(low), float(high), p)


def _check(first: NDArray[Any], second: NDArray[Any]) -> None:
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        shapes = f"{list(first.shape)} and {list(second.shape)}"
        raise InputError(f"paired scores must have one shape [N], N at least 1; these have {shapes}")
    for name, scores in (("first", first), ("second", second)):
        bad = np.isnan(scores.astype(np.float64))
        if bad.any():
            raise InputError(f"the {name} model's score {int(np.argmax(bad))} is NaN")
