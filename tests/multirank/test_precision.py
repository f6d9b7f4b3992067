"""Ranks on different processors settle on numbers that are quick on all of them."""

from __future__ import annotations

import pytest

from tests.support.distributed import run_distributed_test


def settle(quick: tuple[bool, bool], expected: str) -> None:
    import torch.distributed as dist

    from eve_ds.config import PretrainConfig
    from eve_ds.engine import deepspeed_config

    rank = dist.get_rank()
    deepspeed_config.multiplies_bf16 = lambda device: quick[rank]
    config = PretrainConfig()
    deepspeed_config.settle_precision(config, rank)
    assert config.engine.precision == expected


@pytest.mark.parametrize(
    ("quick", "expected"), [((True, False), "fp32"), ((False, True), "fp32"), ((True, True), "bf16")]
)
def test_all_ranks_settle_on_one(quick: tuple[bool, bool], expected: str) -> None:
    run_distributed_test(settle, 2, args=(quick, expected))
