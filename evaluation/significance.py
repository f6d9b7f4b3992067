"""Are two models really different on the same examples? Exact paired tests and intervals, for any of the tasks.

Pure functions over per-example scores, numpy alone. N examples, in the same order for both models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.common import InputError

DRAWS = 10_000
_CELLS = 4_000_000  # of the index matrix that is drawn at a time: 32 MB


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
    """Result of ``paired_bootstrap``.

    Attributes:
        difference: mean of the second model minus that of the first.
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


def paired_bootstrap(
    first: NDArray[Any],
    second: NDArray[Any],
    cluster: NDArray[np.integer] | None = None,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the difference of two means over the same examples (Efron & Tibshirani 1993, chapter 13).

    Args:
        first, second: scores [N], any real dtype or bool.
        cluster: [N] whole numbers from 0: examples of one cluster, such as the texts of one image, are not independent
            and are drawn together. None: each example by itself.
        draws: resamples with replacement.
        level: of the interval.
        seed: of the draws; the same gives the same result.
    Raises:
        InputError: shapes that differ, or a score that is NaN.
    """
    _check(first, second)
    difference: NDArray[np.float64] = second.astype(np.float64) - first.astype(np.float64)
    counts: NDArray[np.float64] = np.ones(len(difference))
    if cluster is not None:
        counts = np.bincount(cluster).astype(np.float64)
        difference = np.bincount(cluster, weights=difference).astype(np.float64)
        difference, counts = difference[counts > 0], counts[counts > 0]
    generator, size = np.random.default_rng(seed), len(counts)
    means = np.empty(draws)
    at_a_time = max(1, _CELLS // size)
    for begin in range(0, draws, at_a_time):
        drawn = generator.integers(size, size=(min(at_a_time, draws - begin), size))
        means[begin : begin + len(drawn)] = difference[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return interval_of(means, float(difference.sum() / counts.sum()), int(np.count_nonzero(difference)), level)


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
