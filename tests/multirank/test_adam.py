"""AdamW's kernel is one choice of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from eve_ds.kernels import adam
from tests.support.distributed import run_distributed_test

CPU = torch.device("cpu")


def ranks_agree() -> None:
    assert adam._on_all_ranks(True, CPU)
    assert not adam._on_all_ranks(dist.get_rank() == 0, CPU)


def test_all_ranks_take_the_same_kernel() -> None:
    run_distributed_test(ranks_agree, world_size=2)
