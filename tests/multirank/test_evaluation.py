"""At evaluation a sample's output is the same at any expert-parallel size, whatever the other ranks evaluate."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.distributed import run_distributed_test
from tests.support.tiny import expert_parallel
from tests.support.tiny_tasks import PREDICTING, Batch, predictions, rows_of, tiny_batch, tiny_task

SHARES = [3, 0, 4, 2]  # samples of each rank: uneven, and one has none
ROWS = sum(SHARES)
EP_SIZES = [1, 2, 4]


def by_rank(rank: int) -> dict[str, Any]:
    """Pairs, nothing, images alone, texts alone."""
    share = slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
    batch = rows_of(tiny_batch(ROWS), share)
    inputs = {"images": batch["images"]} if rank != 3 else {}
    return inputs | ({"text_ids": batch["text_ids"], "text_mask": batch["text_mask"]} if rank != 2 else {})


def encode(task: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = task.eval().backbone(**inputs)
    if "text_mask" in inputs:  # zeros where it is padding
        out.hidden[:, out.num_image_tokens :] *= inputs["text_mask"][..., None]
    return out.hidden


def evaluate(alone: dict[str, dict[str, Tensor]], hidden: list[Tensor]) -> None:
    from eve_ds.engine.distributed import disable_shm_operation
    from eve_ds.environment import prepare_environment

    prepare_environment()
    import deepspeed

    from eve_ds.engine.moe_deepspeed import DeepSpeedMoE
    from eve_ds.engine.setup import join_expert_groups

    disable_shm_operation()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    rank = dist.get_rank()
    start, stop = list(accumulate([0, *SHARES]))[rank : rank + 2]
    for ep_size in EP_SIZES:
        for name in PREDICTING:
            task = tiny_task(name, moe_layer=expert_parallel(DeepSpeedMoE, ep_size, rank))
            join_expert_groups(task)
            for key, value in predictions(task, rows_of(tiny_batch(ROWS), slice(start, stop))).items():
                message = f"{name}, {key}, EP {ep_size}, rank {rank}: "
                torch.testing.assert_close(
                    value, alone[name][key][start:stop], atol=1e-5, rtol=1e-5, msg=lambda text, m=message: m + text
                )
        torch.testing.assert_close(encode(task, by_rank(rank)), hidden[rank], atol=1e-5, rtol=1e-5)


def one_by_one(name: str) -> dict[str, Tensor]:
    """Each sample in a batch of its own, in one process."""
    task, batch = tiny_task(name), tiny_batch(ROWS)
    parts: list[Batch] = [predictions(task, rows_of(batch, slice(row, row + 1))) for row in range(ROWS)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def test_predictions_are_the_same_at_any_expert_parallel_size() -> None:
    alone = {name: one_by_one(name) for name in PREDICTING}
    task = tiny_task(PREDICTING[-1])
    hidden = [encode(task, by_rank(rank)) for rank in range(len(SHARES))]
    assert all(len(states) == share for states, share in zip(hidden, SHARES, strict=True))
    run_distributed_test(evaluate, len(SHARES), args=(alone, hidden))
