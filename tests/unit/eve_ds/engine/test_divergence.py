"""Finite divergence: told at once and when it lasts, never on healthy curves, and the same after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from eve_ds.engine.divergence import LEAST, LEVEL, RECENT, SUSPECTS, Departure, LossRange, add_suspect, not_finite

Curves = dict[str, list[float]]


@pytest.fixture(scope="module")
def curves(assets: Path) -> Curves:
    """Training losses of whole runs of the demo (seeds 2 to 4), four digits each."""
    return dict(json.loads((assets / "loss_curves.json").read_text()))


def told(losses: list[float]) -> dict[int, Departure]:
    """What is said, by step from 1 on."""
    watch = LossRange()
    found = {step: watch.add(loss) for step, loss in enumerate(losses, 1)}
    return {step: departure for step, departure in found.items() if departure is not None}


@pytest.mark.parametrize("name", ["pretrain", "itr", "vqa", "nlvr"])
def test_nothing_is_said_of_healthy_runs(curves: Curves, name: str) -> None:
    assert len(curves[name]) >= 120
    assert told(curves[name]) == {}
    assert told([100 * loss for loss in curves[name]]) == {}  # whatever the unit


@pytest.mark.parametrize("name", ["pretrain", "itr", "vqa", "nlvr"])
@pytest.mark.parametrize("place", [0.4, 0.9])
def test_one_loss_far_out_is_told_at_once(curves: Curves, name: str, place: float) -> None:
    losses = list(curves[name])
    at = int(place * len(losses))
    before = losses[max(0, at - RECENT) : at]
    losses[at] = 4 * max(before)
    found = told(losses)
    assert list(found) == [at + 1] and not found[at + 1].lasting
    assert (found[at + 1].loss, found[at + 1].largest) == (losses[at], max(before))
    assert f"the loss is {losses[at]:.4g}, far out of its recent range" in str(found[at + 1])


def test_values_of_the_range_are_right() -> None:
    losses = [1.0, 2.0, 3.0] * 20
    found = told([*losses, 20.0])[61]
    assert (found.median, found.largest, found.lasting) == (2.0, 3.0, False)
    assert found.z == pytest.approx((20.0 - 2.0) / 1.4826)


@pytest.mark.parametrize("steps", [1, 15, 60])
def test_a_loss_that_rises_and_stays_is_told_once_as_lasting(curves: Curves, steps: int) -> None:
    losses = curves["pretrain"][:600]
    risen = [losses[-1] * (1 + 9 * min(1.0, step / steps)) for step in range(1, 61)]
    found = told(losses + risen)
    lasting = [step for step, departure in found.items() if departure.lasting]
    assert len(lasting) == 1 and 600 < lasting[0] <= 600 + steps // 2 + LEVEL
    assert found[lasting[0]].loss > found[lasting[0]].largest
    assert f"for {LEVEL} steps" in str(found[lasting[0]])


def test_a_resumed_run_says_the_same(curves: Curves) -> None:
    losses = [*curves["pretrain"][:300], *[9.0] * 40, *curves["pretrain"][300:500], 20.0]
    whole = told(losses)
    assert len(whole) >= 3
    for cut in (10, 299, 301, 305, 311, 330, 420, 539):
        watch = LossRange()
        for loss in losses[:cut]:
            watch.add(loss)
        watch = LossRange(json.loads(json.dumps(watch.state())))
        found = {step: watch.add(loss) for step, loss in enumerate(losses[cut:], cut + 1)}
        assert {step: said for step, said in found.items() if said} == {s: said for s, said in whole.items() if s > cut}


def test_little_history_says_nothing_and_what_is_not_finite_is_left_to_others() -> None:
    assert told([1.0] * (LEAST - 1) + [1e9]) == {}
    assert list(told([1.0, 1.1] * (LEAST // 2) + [1e9])) == [LEAST + 1]
    watch = LossRange()
    for loss in [1.0, 1.1, math.nan, math.inf] * 50:
        assert watch.add(loss) is None
    assert len(watch.state()["losses"]) == 100 and all(map(math.isfinite, watch.state()["losses"]))


def test_suspects_are_added_to_those_before_and_the_log_names_eight_samples(tmp_path: Path) -> None:
    file = tmp_path / SUSPECTS
    said = add_suspect(tmp_path, 3, "loss", range(8), {"z": 9.5})
    assert said == f"its samples are 0, 1, 2, 3, 4, 5, 6, 7 (all 8: {file})"
    said = add_suspect(tmp_path, 5, "not finite", range(1, 10), {})
    assert said == f"its samples are 1, 2, 3, 4, 5, 6, 7, 8, ... (all 9: {file})"
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 3, "kind": "loss", "z": 9.5, "samples": list(range(8))},
        {"step": 5, "kind": "not finite", "samples": list(range(1, 10))},
    ]


def test_what_is_not_finite_is_named() -> None:
    """A gradient alone, too: its losses are finite."""
    assert not_finite({"mlm_loss": math.nan, "loss": math.inf, "mim_loss": 1.0}, [math.nan, 2.0]) == {
        "not_finite": ["loss", "mlm_loss"],
        "rank_losses": [None, 2.0],
    }
    assert not_finite({"loss": 3.0}, [1.0, 2.0]) == {"not_finite": ["gradient"], "rank_losses": [1.0, 2.0]}
