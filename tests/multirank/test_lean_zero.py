"""engine/lean_zero.py: few launches a step, and a step whose gradients are not finite moves no weight on any rank.

That training is right besides is held by tests/multirank/test_deepspeed_equals_single.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.support.distributed import run_distributed_test
from tests.support.lean_zero import (
    Case,
    launches_of_a_step,
    races_that_are_found,
    same_weights_and_no_race,
    steps_without_moving,
)

DENSE, EXPERT = "backbone.blocks.0.attention.qkv.weight", "backbone.blocks.2.moe.experts.w2"
SMALL_BUCKETS = {"reduce_bucket_size": 20_000}  # several reductions a backward pass
ALONE = {"reduce_bucket_size": 1000}  # smaller than most gradients, which are then reduced where they lie
ON_HOST = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_moves_no_weight(stage: int) -> None:
    cases: list[Case] = [
        (stage, "bf16", True, DENSE, math.nan, {}),
        (stage, "bf16", False, EXPERT, math.inf, SMALL_BUCKETS),
        (stage, "bf16", True, EXPERT, math.nan, ALONE),
        (stage, "fp32", True, EXPERT, -math.inf, {"overlap_comm": False}),
        (stage, "fp32", False, DENSE, math.nan, SMALL_BUCKETS),
        (stage, "bf16", True, DENSE, math.inf, ON_HOST),
    ]
    run_distributed_test(steps_without_moving, 2, args=(cases,))


@pytest.mark.parametrize(
    ("stage", "changes", "most"),
    # DeepSpeed's own: 4,990 at stages 1 and 2, 1,275 at stage 3.
    [(1, {}, 230), (2, {"overlap_comm": False}, 230), (2, {}, 230), (3, {}, 200)],
)
def test_launches_of_a_step(stage: int, changes: dict[str, Any], most: int) -> None:
    run_distributed_test(launches_of_a_step, 1, args=(stage, changes, most))


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_are_deepspeeds_own_and_streams_do_not_race(ranks: int) -> None:
    overlap = {"overlap_comm": True}
    cases: list[tuple[int, str, int, dict[str, Any]]] = [
        (1, "bf16", 2, SMALL_BUCKETS),
        (1, "fp32", 1, SMALL_BUCKETS | overlap),
        (2, "bf16", 2, SMALL_BUCKETS),
        (2, "fp32", 1, {}),
        (2, "bf16", 1, ALONE),
        (2, "bf16", 1, SMALL_BUCKETS | {"overlap_comm": False}),
        (3, "bf16", 2, SMALL_BUCKETS),
        (3, "fp32", 1, {}),
        (3, "bf16", 1, ALONE),
        (3, "bf16", 2, SMALL_BUCKETS | {"overlap_comm": False}),
    ]
    run_distributed_test(same_weights_and_no_race, ranks, args=(cases,))


def test_a_gradient_reduced_where_it_lies_is_kept_until_then() -> None:
    """On four ranks most have no part of it, and let go of it at once. DeepSpeed's own optimizer races here."""
    run_distributed_test(same_weights_and_no_race, 4, args=([(2, "bf16", 1, ALONE | {"overlap_comm": True})],))


def test_races_are_found() -> None:
    """What the tests above rely on."""
    run_distributed_test(races_that_are_found, 1)
