"""DeepSpeed ZeRO with expert parallelism against one plain PyTorch process on the same global batch.

The promises of DeepSpeed's private expert API that engine/moe_deepspeed.py relies on are held here: reduction of dense
and expert gradients, clipping over both, accumulation, weight decay groups.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.distributed import run_distributed_test
from tests.support.tiny import caption_batch, expert_parallel, masked_task, rows_of

STEPS, ROWS, CLIP = 3, 8, 0.5
TOLERANCE = 1e-5


Reference = tuple[list[float], list[float], dict[str, np.ndarray]]


def reference(accumulation: int) -> Reference:
    """Losses, gradient norms and final weights of a plain loop: Adam with eps 1e-4, clipping, no DeepSpeed."""
    from eve_ds.config import OptimizerConfig
    from eve_ds.engine.optim import has_weight_decay

    task, options = masked_task(), optimizer_config()
    assert isinstance(options, OptimizerConfig)
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in task.named_parameters():
        groups[has_weight_decay(name, parameter)].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": options.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=options.lr,
        betas=tuple(options.betas),
        eps=options.eps,
    )
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        for micro in range(accumulation):
            output = task(caption_batch(ROWS, seed=step * accumulation + micro))
            (output.loss / accumulation).backward()
            total += float(output.loss.detach()) / accumulation
        norms.append(float(torch.nn.utils.clip_grad_norm_(task.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms, {name: value.detach().numpy() for name, value in task.named_parameters()}


def optimizer_config():
    from eve_ds.config import OptimizerConfig

    return OptimizerConfig(lr=1e-2, eps=1e-4, weight_decay=0.1, gradient_clipping=CLIP, total_steps=STEPS)


def compare(stages: list[int], ep_sizes: list[int], accumulation: int, expected: Reference) -> None:
    from eve_ds.engine.environment import prepare_environment

    prepare_environment()
    import deepspeed
    import torch.distributed as dist

    from eve_ds.config import EngineConfig
    from eve_ds.engine.deepspeed_config import load_deepspeed_config
    from eve_ds.engine.export import full_state
    from eve_ds.engine.moe_deepspeed import DeepSpeedMoE
    from eve_ds.engine.optim import build_optimizer

    rank, world = dist.get_rank(), dist.get_world_size()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    losses, norms, weights = expected
    share = ROWS // world
    for stage in stages:
        for ep_size in ep_sizes:
            task = masked_task(expert_parallel(DeepSpeedMoE, ep_size, rank))
            engine_config = EngineConfig(
                global_batch_size=ROWS * accumulation,
                micro_batch_size=share,
                expert_parallel_size=ep_size,
                precision="fp32",
            )
            settings = load_deepspeed_config(f"ds_configs/zero{stage}.json", engine_config, optimizer_config(), world)
            engine, *_ = deepspeed.initialize(
                model=task, optimizer=build_optimizer(task, optimizer_config()), config=settings
            )
            case = f"ZeRO {stage}, EP {ep_size}, world {world}"
            for step in range(STEPS):
                total = torch.zeros(())
                for micro in range(accumulation):
                    batch = caption_batch(ROWS, seed=step * accumulation + micro)
                    output = engine(rows_of(batch, rank * share, (rank + 1) * share))
                    engine.backward(output.loss * world)
                    engine.step()
                    total += output.loss.detach() / accumulation
                dist.all_reduce(total)
                assert abs(float(total) - losses[step]) < TOLERANCE, f"{case}: loss of step {step}"
                norm = float(engine.get_global_grad_norm())
                assert abs(norm / norms[step] - 1) < TOLERANCE, f"{case}: norm {norm} against {norms[step]}"
            state = full_state(task)
            if rank == 0:
                assert state.keys() == weights.keys()
                for name, value in weights.items():
                    difference = float(np.abs(state[name].numpy() - value).max())
                    assert difference < TOLERANCE, f"{case}: {name} differs by {difference}"
            engine.destroy()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_trajectory_equals_one_process(world_size: int, accumulation: int) -> None:
    run_distributed_test(compare, world_size, args=([1, 2], [1, 2], accumulation, reference(accumulation)), timeout=300)


def test_zero_3_trajectory_equals_one_process() -> None:
    run_distributed_test(compare, 2, args=([3], [1, 2], 1, reference(1)), timeout=300)
