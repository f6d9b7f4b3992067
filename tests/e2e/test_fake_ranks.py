"""Set-up as a rank of 512 runs it, without 512 processes: torch's ``fake`` process group answers for the others.

Everything up to and with ``deepspeed.initialize`` is the engine's own. Collectives do nothing: no step is taken.
"""

from __future__ import annotations

import os
from multiprocessing import get_context
from typing import Any

import pytest

WORLD, EXPERTS, STAGES = 512, 64, {1: 1, 8: 2, 32: 3}  # a ZeRO stage for each expert-parallel size


class _Tokenizer:
    mask_id = 4


def set_up(rank: int) -> list[dict[str, Any]]:
    """In a process of its own: join as ``rank``, set up a run for each expert-parallel size, tell what came of it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank % 8)}
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
    return [_one_run(ep_size, stage) for ep_size, stage in STAGES.items()]


def _one_run(ep_size: int, stage: int) -> dict[str, Any]:
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import groups

    from eve_ds.config import PretrainConfig
    from eve_ds.config_sections import EngineConfig
    from eve_ds.engine import distributed, setup
    from eve_ds.engine.deepspeed_config import load_deepspeed_config
    from eve_ds.engine.optim import build_optimizer
    from eve_ds.plan.zero_states import Zero, groups_of
    from eve_ds.tasks.masked_modeling import ObjectiveConfig
    from tests.support.tiny import model_config

    config = PretrainConfig(
        model=model_config(num_experts=EXPERTS),
        objective=ObjectiveConfig(decoder_dim=32, decoder_depth=1, decoder_heads=4),
        engine=EngineConfig(global_batch_size=4 * WORLD, micro_batch_size=2, expert_parallel_size=ep_size),
        deepspeed_config=f"ds_configs/zero{stage}.json",
    )
    distributed.check_world(ep_size, EXPERTS)
    task = setup.build_task(config, _Tokenizer())  # type: ignore[arg-type]
    settings = load_deepspeed_config(config.deepspeed_config, config.engine, config.optimizer, WORLD)
    experts = task.backbone.moe_layers()[0].experts.fc1_weight.detach().clone()
    zero = Zero(stage, WORLD, ep_size, 2, 2, settings["zero_optimization"], whole_buffers=True)
    planned = [group.partition for group in groups_of(task, config.optimizer, zero)]
    made = _count_new_groups()
    distributed.disable_shm_operation()
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(model=task, optimizer=build_optimizer(task, config.optimizer), config=settings)
    layer = task.backbone.moe_layers()[-1]
    copies = groups._get_expert_data_parallel_group(layer.ep_group_name)
    masters = engine.optimizer.fp32_partitioned_groups_flat if stage == 3 else None
    masters = masters or engine.optimizer.single_partition_of_fp32_groups
    return {
        "ep_size": ep_size,
        "experts": experts.numpy(),
        "ep_group": dist.get_process_group_ranks(layer.ep_group),
        "copies": dist.get_process_group_ranks(copies),
        "new_groups": made[0],
        "accumulation": engine.gradient_accumulation_steps(),
        "stage": engine.zero_optimization_stage(),
        "partitions": [part.numel() for part in masters],
        "planned": planned,
    }


def _count_new_groups() -> list[int]:
    """A counter of the process groups made from now on."""
    import torch.distributed as dist

    made, new_group = [0], dist.new_group

    def counting(*args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        return new_group(*args, **kwargs)

    dist.new_group = counting
    return made


@pytest.fixture(scope="module")
def runs() -> dict[int, list[dict[str, Any]]]:
    """What ``set_up`` tells, for the first rank, one in its first group, and the last."""
    context = get_context("forkserver")  # DeepSpeed is imported once, each rank is a fork of that process
    context.set_forkserver_preload(["deepspeed", "eve_ds.engine.setup"])
    found = {}
    for rank in (0, 7, WORLD - 1):
        with context.Pool(1) as pool:
            found[rank] = pool.apply(set_up, (rank,))
    return found


@pytest.mark.parametrize("rank", [0, 7, WORLD - 1])
def test_set_up_as_one_of_512(runs: dict[int, list[dict[str, Any]]], rank: int) -> None:
    whole = runs[0][0]["experts"]  # expert-parallel size 1: rank 0 holds all of them
    assert whole.shape[0] == EXPERTS
    for run in runs[rank]:
        size = run["ep_size"]
        held, place = EXPERTS // size, rank % size
        assert (run["experts"] == whole[place * held : (place + 1) * held]).all(), f"other experts at EP {size}"
        first = rank - place
        assert run["ep_group"] == list(range(first, first + size))
        assert run["copies"] == list(range(place, WORLD, size))
        assert (run["stage"], run["accumulation"]) == (STAGES[size], 2)


def test_groups_are_few(runs: dict[int, list[dict[str, Any]]]) -> None:
    """World / EP groups that share experts and EP groups of their copies: once for all layers, never ranks squared."""
    for run in runs[7]:
        assert run["new_groups"] <= WORLD // run["ep_size"] + run["ep_size"] + 2


def test_the_plan_partitions_as_deepspeed_does(runs: dict[int, list[dict[str, Any]]]) -> None:
    """But for DeepSpeed's alignment: a parameter is padded to its ranks at ZeRO 3, a group at ZeRO 1 and 2."""
    for run in runs[0]:
        assert len(run["planned"]) == len(run["partitions"])
        for planned, held in zip(run["planned"], run["partitions"], strict=True):
            assert 0 <= held - planned <= 64
