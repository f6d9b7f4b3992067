"""Paired tests against exact arithmetic, values by hand, and a slow bootstrap one draw at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from evaluation import significance
from evaluation.common import InputError
from evaluation.significance import paired_bootstrap, sign_test


def scores(wins: int, losses: int, ties: int = 7) -> tuple[np.ndarray, np.ndarray]:
    first = np.array([True] * wins + [False] * losses + [True] * ties)
    second = np.array([False] * wins + [True] * losses + [True] * ties)
    return first, second


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (0, 6), (9, 2), (40, 61), (700, 600), (3, 2000)])
def test_the_sign_test_is_exact(wins: int, losses: int) -> None:
    total = wins + losses
    tail = sum((Fraction(math.comb(total, k)) for k in range(min(wins, losses) + 1)), Fraction(0)) / 2**total
    found = sign_test(*scores(wins, losses))
    assert (found.first, found.second) == (wins, losses)
    assert found.p == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


def test_the_sign_test_by_hand() -> None:
    """2 (1 + 10 + 45) / 1,024 and 2 (1 + 9) / 512."""
    assert sign_test(*scores(8, 2)).p == pytest.approx(0.109375)
    assert sign_test(*scores(1, 8)).p == pytest.approx(0.0390625)


def test_soft_scores_count_by_which_is_higher() -> None:
    found = sign_test(np.array([30.0, 60.0, 100.0, 0.0]), np.array([60.0, 60.0, 30.0, 100.0]))
    assert (found.first, found.second, found.p) == (1, 2, 1.0)


def test_the_bootstrap_equals_a_plain_one_draw_by_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(40, size=150)
    image[:40] = np.arange(40)
    first, second = rng.random(150) < 0.5, rng.random(150) < 0.65
    draws = []
    again = np.random.default_rng(3)
    for chosen in again.integers(40, size=(500, 40)):
        rows = [t for i in chosen for t in np.flatnonzero(image == i)]
        draws.append(np.mean([float(second[t]) - float(first[t]) for t in rows]))
    found = paired_bootstrap(first, second, image, draws=500, seed=3)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert paired_bootstrap(first, second, 3 * image + 2, draws=500, seed=3) == found  # numbers without clusters
    monkeypatch.setattr(significance, "_CELLS", 7 * 40)
    assert paired_bootstrap(first, second, image, draws=500, seed=3) == found  # seven draws at a time
    monkeypatch.setattr(significance, "_CELLS", 39)
    assert paired_bootstrap(first, second, image, draws=500, seed=3) == found
    below = sum(value <= 0 for value in draws)
    assert found.p == pytest.approx(min(1.0, 2 * (min(below, sum(v >= 0 for v in draws)) + 1) / 501))


def test_the_bootstrap_agrees_with_theory() -> None:
    """For the mean of N independent differences: the normal interval, and wider by the root of 5 if each is there
    five times."""
    rng = np.random.default_rng(0)
    first = rng.normal(0, 1, 2000)
    second = first + rng.normal(0.1, 1, 2000)
    error = (second - first).std() / math.sqrt(2000)
    found = paired_bootstrap(first, second)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.p < 0.01 < paired_bootstrap(first, first[::-1].copy()).p
    five, cluster = np.repeat(first, 5), np.repeat(np.arange(2000), 5)
    together = paired_bootstrap(five, np.repeat(second, 5), cluster, draws=2000)
    alone = paired_bootstrap(five, np.repeat(second, 5), draws=2000)
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(math.sqrt(5), rel=0.1)
    assert paired_bootstrap(first, second, draws=100) == paired_bootstrap(first, second, draws=100)


@pytest.mark.parametrize(("examples", "p"), [(1, 1.0), (2, 0.5), (3, 0.25), (5, 0.0625)])
def test_few_examples_prove_little(examples: int, p: float) -> None:
    """The second model is right on all, the first on none: p is that of the exact test, not that of the draws."""
    first, second = np.zeros(examples, dtype=bool), np.ones(examples, dtype=bool)
    assert paired_bootstrap(first, second).p == p == pytest.approx(sign_test(first, second).p)
    assert paired_bootstrap(np.append(first, True), np.append(second, True)).p >= p  # a tie adds nothing
    five = (np.repeat(first, 5), np.repeat(second, 5), np.repeat(np.arange(examples), 5))
    assert paired_bootstrap(*five).p == p  # texts of one image are one observation
    assert paired_bootstrap(second, second).p == 1


@pytest.mark.parametrize(("first", "second", "words"), [
    ([1.0, 0.0], [1.0], r"one shape \[N\].* \[2\] and \[1\]"),
    ([], [], r"\[0\] and \[0\]"),
    ([1.0, 0.0], [1.0, math.nan], "second model's score 1 is NaN"),
])  # fmt: skip
def test_scores_that_are_not_paired_are_refused(first: list[float], second: list[float], words: str) -> None:
    for test in (sign_test, paired_bootstrap):
        with pytest.raises(InputError, match=words):
            test(np.array(first), np.array(second))
