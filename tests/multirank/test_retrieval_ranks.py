"""Retrieval scores of one and of two ranks, experts spread over them: the same metrics, and scores within 1e-4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.distributed as dist

from eve_ds.tasks.retrieval import SPEC
from eve_ds.tasks.spec import Arrays
from tests.support.distributed import run_distributed_test
from tests.support.retrieval_passes import arrays_of, retrieval_task, uneven_split
from tests.support.tiny import expert_parallel

BATCH = 6  # of the ranks together: the last batch of the images has fewer than ranks
CASES = [(3, None), (2, 9), (1, 1)]  # candidates, texts; of one text, a rank has no pair


def two_ranks(folder: Path, alone: list[Arrays]) -> None:
    from eve_ds.engine.distributed import disable_shm_operation
    from eve_ds.environment import prepare_environment

    prepare_environment()
    import deepspeed

    from eve_ds.engine.moe_deepspeed import DeepSpeedMoE
    from eve_ds.engine.setup import join_expert_groups

    disable_shm_operation()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    rank = dist.get_rank()
    for (k, limit), expected in zip(CASES, alone, strict=True):
        task = retrieval_task(expert_parallel(DeepSpeedMoE, 2, rank), rerank=True, k_test=k)
        join_expert_groups(task)
        found = arrays_of(task, folder, BATCH, limit)
        assert (found is None) == (rank != 0)
        if found is None:
            continue
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], atol=1e-4, rtol=0, err_msg=f"{name}, {k} candidates")
        assert SPEC.metrics(found, None) == SPEC.metrics(expected, None)


def test_one_and_two_ranks_score_the_same(tmp_path: Path) -> None:
    folder = uneven_split(tmp_path)
    alone = [arrays_of(retrieval_task(rerank=True, k_test=k), folder, BATCH, limit) for k, limit in CASES]
    run_distributed_test(two_ranks, 2, args=(folder, alone))
