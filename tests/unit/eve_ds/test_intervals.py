"""When evaluations and checkpoints are due that the configuration wants every so many steps or epochs."""

from __future__ import annotations

import pytest

from eve_ds.intervals import Interval, check_interval
from preprocessing.errors import UserError


def due(value: int | str, samples: int = 52, batch: int = 8, steps: int = 26) -> list[int]:
    interval = Interval(value, samples, batch)
    return [step for step in range(1, steps + 1) if interval.due(step)]


def test_an_interval_falls_on_the_step_that_completes_it() -> None:
    assert due(5) == [5, 10, 15, 20, 25] and due(0) == []
    assert due("1 epoch") == [7, 13, 20, 26]  # 6.5 steps each, which add up to 26
    assert due("0.5 epochs") == [4, 7, 10, 13, 17, 20, 23, 26]
    assert due("2epochs") == [13, 26]
    assert due("0.1 epoch") == list(range(1, 27))  # shorter than a step
    assert due("1 epoch", batch=16) == [4, 7, 10, 13, 17, 20, 23, 26]  # another batch, other steps


@pytest.mark.parametrize(
    "value", ["0 epochs", "epoch", "-1 epoch", "1000", "every epoch", "1e3 epochs", "1 epoch 2", ""]
)
def test_a_text_that_is_no_interval_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"^logging\.eval_every=.* must be a whole number of steps, or epochs, as in"):
        check_interval("logging.eval_every", value)


def test_a_negative_number_of_steps_is_refused() -> None:
    check_interval("checkpoint.every", 0)
    with pytest.raises(UserError, match=r"checkpoint\.every=-1 must be at least 0"):
        check_interval("checkpoint.every", -1)
