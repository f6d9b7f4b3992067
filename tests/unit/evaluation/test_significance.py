"""The sign test against exact arithmetic and values by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from evaluation.common import InputError
from evaluation.significance import sign_test


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


@pytest.mark.parametrize(("first", "second", "words"), [
    ([1.0, 0.0], [1.0], r"one shape \[N\].* \[2\] and \[1\]"),
    ([], [], r"\[0\] and \[0\]"),
    ([1.0, 0.0], [1.0, math.nan], "second model's score 1 is NaN"),
])  # fmt: skip
def test_scores_that_are_not_paired_are_refused(first: list[float], second: list[float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        sign_test(np.array(first), np.array(second))
