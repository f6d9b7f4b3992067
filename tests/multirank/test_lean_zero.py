"""engine/lean_zero.py: few launches a step, and a step whose gradients are not finite moves no weight on any rank.

That training is right besides is held by tests/multirank/test_deepspeed_equals_single.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.support.distributed import run_distributed_test
from tests.support.lean_zero import Case, launches_of_a_step, steps_without_moving

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
    ("stage", "changes", "most", "together"),
    # DeepSpeed's own: 4,990 at stages 1 and 2. Left at stage 3 are two copies a gradient, as with ``overlap_comm``.
    [(1, {}, 250, True), (2, {"overlap_comm": False}, 250, True), (2, {}, 850, False), (3, {}, 850, False)],
)
def test_launches_of_a_step(stage: int, changes: dict[str, Any], most: int, together: bool) -> None:
    """With ``overlap_comm`` (stage 2 by default) the copies belong to the reduction's stream: queued, they would leave
    it, and take gradients on several GPUs before they are reduced, which no CPU and no single GPU shows."""
    run_distributed_test(launches_of_a_step, 1, args=(stage, changes, most, together))
