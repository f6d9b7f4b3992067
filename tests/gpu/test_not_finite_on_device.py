"""A gradient that is not finite moves no weight at any ZeRO stage, on one device (NCCL on a GPU)."""

from __future__ import annotations

import math

import torch

from tests.support.distributed import run_distributed_test
from tests.support.lean_zero import Case, steps_without_moving

DENSE, EXPERT = "backbone.blocks.0.attention.qkv.weight", "backbone.blocks.2.moe.experts.w2"


def test_no_step_by_gradients_that_are_not_finite(device: torch.device) -> None:
    cases: list[Case] = []
    for stage in (1, 2, 3):
        cases += [(stage, "bf16", True, DENSE, math.nan, {}), (stage, "bf16", False, EXPERT, -math.inf, {})]
        cases += [(stage, "fp32", True, EXPERT, math.inf, {"reduce_bucket_size": 20_000})]
    backend = "nccl" if device.type == "cuda" else "gloo"
    run_distributed_test(steps_without_moving, 1, backend, args=(cases, device.type))
