"""The paired bootstrap against a slow one, draw by draw, and against theory; and within bounded memory."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from evaluation import bootstrap
from evaluation.bootstrap import Parts, confidence, paired
from evaluation.significance import sign_test
from tests.support.differences import difference


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
    found = difference(first, second, image, draws=500, seed=3)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    monkeypatch.setattr(bootstrap, "_CELLS", 7 * 40)
    assert difference(first, second, image, draws=500, seed=3) == found  # seven draws at a time
    monkeypatch.setattr(bootstrap, "_CELLS", 39)
    assert difference(first, second, image, draws=500, seed=3) == found
    below = sum(value <= 0 for value in draws)
    assert found.p == pytest.approx(min(1.0, 2 * (min(below, sum(v >= 0 for v in draws)) + 1) / 501))


def test_the_bootstrap_agrees_with_theory() -> None:
    """For the mean of N independent differences: the normal interval, and wider by the root of 5 if each is there
    five times."""
    rng = np.random.default_rng(0)
    first = rng.normal(0, 1, 2000)
    second = first + rng.normal(0.1, 1, 2000)
    error = (second - first).std() / math.sqrt(2000)
    found = difference(first, second)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.p < 0.01 < difference(first, first[::-1].copy()).p
    five, cluster = np.repeat(first, 5), np.repeat(np.arange(2000), 5)
    together = difference(five, np.repeat(second, 5), cluster, draws=2000)
    alone = difference(five, np.repeat(second, 5), draws=2000)
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(math.sqrt(5), rel=0.1)
    assert difference(first, second, draws=100) == difference(first, second, draws=100)


@pytest.mark.parametrize(("examples", "p"), [(1, 1.0), (2, 0.5), (3, 0.25), (5, 0.0625)])
def test_few_examples_prove_little(examples: int, p: float) -> None:
    """The second model is right on all, the first on none: p is that of the exact test, not that of the draws."""
    first, second = np.zeros(examples, dtype=bool), np.ones(examples, dtype=bool)
    assert difference(first, second).p == p == pytest.approx(sign_test(first, second).p)
    assert difference(np.append(first, True), np.append(second, True)).p >= p  # a tie adds nothing
    five = (np.repeat(first, 5), np.repeat(second, 5), np.repeat(np.arange(examples), 5))
    assert difference(*five).p == p  # texts of one image are one observation
    assert difference(second, second).p == 1


def many_types(values: np.ndarray, types: int) -> Parts:
    """Each value is in a cluster of its own, and counts for one of the types."""
    kind = np.arange(len(values)) % types
    return Parts({f"{t}": (values[kind == t], np.flatnonzero(kind == t)) for t in range(types)}, len(values))


def test_memory_does_not_grow_with_the_number_of_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    first, second = (many_types(rng.random(4000), 400) for _ in range(2))
    expected = confidence(first, draws=50), paired(first, second, draws=50)
    monkeypatch.setattr(bootstrap, "_MATRIX", 7 * 2 * 4000)  # seven metrics
    monkeypatch.setattr(bootstrap, "_CELLS", 10 * 4000)
    tracemalloc.start()
    found = confidence(first, draws=50), paired(first, second, draws=50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    for name, interval in found[1].items():
        assert (interval.low, interval.p) == pytest.approx((expected[1][name].low, expected[1][name].p))
    assert peak < 8 * 400 * 2 * 4000 / 5  # a fifth of one model's matrix
