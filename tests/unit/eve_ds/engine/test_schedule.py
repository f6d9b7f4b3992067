"""Learning rates by step: old schedules to the bit, warm-up-stable-decay, cooldowns from a checkpoint, longer runs."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest

from eve_ds.config import PretrainConfig, parse
from eve_ds.config_sections import OptimizerConfig
from eve_ds.engine.schedule import Cooldown, check_steps, cooldown_of, jump, lr_factor, stored
from preprocessing.errors import UserError


def options(schedule: str, **changes: Any) -> OptimizerConfig:
    return OptimizerConfig(schedule=schedule, **changes)  # type: ignore[arg-type]


def old_lr_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """As it was when there were three schedules."""
    warmup = round(config.warmup * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def test_old_schedules_are_the_same_to_the_bit() -> None:
    for schedule, warmup, least, total in itertools.product(
        ("cosine", "linear", "constant"), (0.0, 0.1, 0.33), (0.0, 0.1), (1, 7, 120)
    ):
        config = options(schedule, warmup=warmup, min_lr_ratio=least)
        for step in range(total + 2):
            assert lr_factor(step, total, config) == old_lr_factor(step, total, config)


def test_wsd_rises_stays_and_falls_as_one_minus_a_root() -> None:
    config = options("wsd", warmup=0.1, decay=0.25, min_lr_ratio=0.1)
    factors = [lr_factor(step, 100, config) for step in range(101)]
    assert factors[:10] == sorted(factors[:10]) and factors[9] < 1
    assert set(factors[10:76]) == {1.0}
    for step in range(76, 101):
        assert factors[step] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt((step - 75) / 25)), abs=1e-12)
    assert factors[100] == 0.1
    assert lr_factor(101, 100, config) == 0.1
    assert lr_factor(79, 100, options("wsd")) == 1.0 and lr_factor(81, 100, options("wsd")) < 1.0  # 0.2 by default
    assert [lr_factor(step, 2, options("wsd", warmup=0.0)) for step in range(2)] == [1.0, 1.0]  # no step to fall over


def test_a_warm_up_in_steps_is_that_share_of_any_run() -> None:
    for schedule, total in itertools.product(("cosine", "linear", "constant", "wsd"), (40, 120)):
        steps, share = options(schedule, warmup=30.0), options(schedule, warmup=30 / total)
        check_steps(total, steps)
        assert [lr_factor(step, total, steps) for step in range(total)] == [
            lr_factor(step, total, share) for step in range(total)
        ]
    assert [lr_factor(step, 9, options("linear", warmup=1.0)) for step in (0, 1)] == [0.5, 1.0]
    for schedule, total in (("cosine", 30), ("constant", 7), ("wsd", 36)):
        with pytest.raises(UserError, match=rf"warmup=30 steps leave none at the peak .* has {total}"):
            check_steps(total, options(schedule, warmup=30.0))
    check_steps(31, options("linear", warmup=30.0))
    check_steps(1, options("cosine", warmup=0.9))  # a share is never too long


def test_in_a_short_run_the_fall_begins_where_the_warm_up_ends_and_both_have_a_step() -> None:
    """Rounded up both, warm-up and decay would overlap: the peak is reached all the same, and then left."""
    refused = set()
    for total, tenths in itertools.product(range(1, 13), range(10)):
        warmup, decay = tenths / 10, (10 - tenths) / 10
        config = options("wsd", warmup=warmup, decay=decay)
        try:
            check_steps(total, config)
        except UserError as error:
            assert f"decay={decay} of {total} steps is no step" in str(error)
            refused.add((total, tenths))
            continue
        factors = [lr_factor(step, total, config) for step in range(total + 1)]
        risen = round(warmup * total)
        assert factors[:risen] == [(step + 1) / (risen + 1) for step in range(risen)]
        assert factors[risen] == 1.0 and factors[-1] == 0.0
        assert factors[risen:] == sorted(factors[risen:], reverse=True) and len(set(factors)) > 1
    assert {(3, 9), (1, 6), (4, 9)} <= refused and (3, 5) not in refused
    assert not any(tenths < 5 for _, tenths in refused)
    with pytest.raises(UserError, match=r"wsd: decay=0\.2 of 2 steps is no step; train longer"):
        check_steps(2, options("wsd"))
    check_steps(1, options("cosine"))


def test_a_cooldown_begins_at_the_rate_of_the_checkpoint_and_ends_at_the_least() -> None:
    trunk, branch = options("cosine", lr=3e-4, min_lr_ratio=0.05), options("cooldown", lr=3e-4, min_lr_ratio=0.05)
    last = lr_factor(39, 100, trunk)  # of the step before checkpoint 40
    state = json.loads(json.dumps(stored(last, 100, trunk, None)))
    begin = cooldown_of(state, 40, branch, own=False)
    factors = [lr_factor(step, 60, branch, begin) for step in range(40, 61)]
    assert factors[0] == last and factors[-1] == 0.05
    assert factors == sorted(factors, reverse=True) and len(set(factors)) == 21
    # The branch itself resumes: its begin is not the checkpoint that it resumes from.
    later = json.loads(json.dumps(stored(factors[10], 60, branch, begin)))
    assert cooldown_of(later, 51, branch, own=True) == begin
    assert cooldown_of(later, 51, branch, own=False) == Cooldown(51, factors[10])
    # With another peak the rate itself goes on, and not its share.
    other = options("cooldown", lr=6e-4)
    again = cooldown_of(state, 40, other, own=False)
    assert 6e-4 * lr_factor(40, 60, other, again) == pytest.approx(3e-4 * last, rel=1e-12)
    assert cooldown_of(state, 40, trunk, own=False) is None
    # A run may take the schedule itself when it resumes: then its own checkpoint does not tell where that began.
    assert cooldown_of(state, 40, branch, own=True) == begin
    odd = Cooldown(40, 0.45)  # 0.1 + (0.45 - 0.1) is another number
    assert lr_factor(40, 60, options("cooldown", min_lr_ratio=0.1), odd) == 0.45 != 0.1 + (0.45 - 0.1)


def test_a_cooldown_of_a_stable_run_is_the_end_of_a_wsd_run() -> None:
    whole, trunk, branch = options("wsd", decay=0.2), options("constant", warmup=0.01), options("cooldown")
    begin = cooldown_of(stored(lr_factor(79, 1000, trunk), 1000, trunk, None), 80, branch, own=False)
    assert begin == Cooldown(80, 1.0)
    for step in range(80, 100):
        assert lr_factor(step, 100, branch, begin) == lr_factor(step, 100, whole)


def test_a_cooldown_needs_a_rate_to_fall_from() -> None:
    branch = options("cooldown", min_lr_ratio=0.1)
    with pytest.raises(UserError, match="did not store its learning rate"):
        cooldown_of({}, 40, branch, own=False)
    with pytest.raises(UserError, match="learning rate at step 100 is 5e-06, not above that of the end"):
        cooldown_of(stored(0.01, 100, options("cosine"), None), 100, branch, own=False)
    with pytest.raises(UserError, match="not above that of the end"):
        cooldown_of(stored(0.1, 100, options("cosine"), None), 100, branch, own=False)
    with pytest.raises(ValueError, match="without where it began"):
        lr_factor(40, 60, branch)


def test_a_longer_run_tells_where_its_rate_jumps() -> None:
    def told(schedule: str, **changes: Any) -> str | None:
        config = options(schedule, lr=1e-3, **changes)
        state = stored(lr_factor(99, 100, config), 100, config, None)
        return jump(state, lr_factor(100, 200, config), 200, config)

    cosine = told("cosine")
    assert cosine is not None and "along 200 steps now and was along 100;" in cosine
    assert told("linear") is not None and told("constant") is None
    state = stored(1.0, 100, options("wsd"), None)  # of a step before its decay
    assert jump(state, lr_factor(79, 200, options("wsd")), 200, options("wsd")) is None
    assert told("wsd") is not None  # it had come down
    config = options("cosine", lr=1e-3)
    assert jump(stored(0.0, 100, config, None), 1.0, 100, config) is None, "its own schedule"
    assert jump({}, 1.0, 200, config) is None, "an older checkpoint"
    shorter = jump(stored(1.0, 200, config, None), 0.5, 100, config)
    assert shorter is not None and shorter.startswith("the learning rate goes from 0.001 to 0.0005,")
    assert jump(stored(0.5, 200, options("cosine", lr=2e-3), None), 1.0, 100, config) is None, "another peak"
    assert jump(stored(0.01, 200, config, None), 0.05, 100, config) is None, "little of the peak"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["--optimizer.decay=0.1"], "optimizer.decay=0.1 is of schedule wsd; leave it out with cosine"),
        (
            ["--optimizer.schedule=wsd", "--optimizer.warmup=0.9"],
            "warmup=0.9 and decay=0.2 are more than the whole run",
        ),
        (["--optimizer.schedule=wsd", "--optimizer.decay=0"], "optimizer.decay=0.0 is out of range"),
        (["--optimizer.layer_decay=1.5"], "optimizer.layer_decay=1.5 is out of range"),
        (["--optimizer.schedule=cooldown"], "goes on from a checkpoint; name it: --resume_from"),
    ],
)
def test_what_does_not_go_together_is_refused(typed: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse(PretrainConfig, typed, "pretrain")
