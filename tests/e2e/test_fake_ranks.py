"""Set-up as a rank of 512 runs it, without 512 processes: torch's ``fake`` process group answers for the others.

Everything up to and with ``deepspeed.initialize`` is the engine's own. Collectives do nothing: no step is taken.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import pytest

WORLD, EXPERTS, STAGES = 512, 64, {1: 1, 8: 2, 32: 3}  # a ZeRO stage for each expert-parallel size


class _Tokenizer:
    mask_id = 4


def set_up(rank: int, configs: Callable[[], list[Any]]) -> list[dict[str, Any]]:
    """In a process of its own: join as ``rank``, set up a run for each config, tell what came of it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank % 8)}
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
    return [_one_run(config) for config in configs()]


def configs() -> list[Any]:
    """Tiny models."""
    from eve_ds.config import PretrainConfig
    from eve_ds.config_sections import EngineConfig
    from eve_ds.tasks.masked_modeling import ObjectiveConfig
    from tests.support.tiny import model_config

    return [
        PretrainConfig(
            model=model_config(num_experts=EXPERTS),
            objective=ObjectiveConfig(decoder_dim=32, decoder_depth=1, decoder_heads=4),
            engine=EngineConfig(global_batch_size=4 * WORLD, micro_batch_size=2, expert_parallel_size=ep_size),
            deepspeed_config=f"ds_configs/zero{stage}.json",
        )
        for ep_size, stage in STAGES.items()
    ]


def eve_large() -> list[Any]:
    """The recipe as the paper's largest model takes it, in bf16."""
    from eve_ds.config import PretrainConfig, parse

    options = ["--config=pretrain_large", "--config=sources_16m", "--engine.micro_batch_size=4"]
    options += ["--engine.expert_parallel_size=8", "--deepspeed_config=zero2"]
    return [parse(PretrainConfig, [*options, "--engine.precision=bf16"], "test")]


def _one_run(config: Any) -> dict[str, Any]:
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import groups

    from eve_ds.engine import distributed, setup
    from eve_ds.engine.deepspeed_config import load_deepspeed_config
    from eve_ds.engine.initialize import initialize
    from eve_ds.engine.optim import build_optimizer
    from eve_ds.plan.zero_states import Zero, groups_of

    ep_size = config.engine.expert_parallel_size
    distributed.check_world(ep_size, config.model.num_experts)
    task = setup.build_task(config, _Tokenizer())  # type: ignore[arg-type]
    settings = load_deepspeed_config(config.deepspeed_config, config.engine, config.optimizer, WORLD)
    experts = task.backbone.moe_layers()[0].experts.fc1_weight.detach().clone()
    stage = settings["zero_optimization"]["stage"]
    zero = Zero(stage, WORLD, ep_size, 2, 2, settings["zero_optimization"], whole_buffers=True)
    planned = [group.partition for group in groups_of(task, config.optimizer, zero)]
    made = _count_new_groups()
    distributed.disable_shm_operation()
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
    engine = initialize(task, build_optimizer(task, config.optimizer), settings)
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
        "compiler": stage < 3 and "torch._dynamo" in sys.modules,  # DeepSpeed's ZeRO 3, the last of STAGES, imports it
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
            found[rank] = pool.apply(set_up, (rank, configs))
    return found


@pytest.mark.long
def test_set_up_of_eve_large_as_one_of_512() -> None:
    """In its real size: 1.4 billion parameters, of which a rank holds half and optimizes a 512th."""
    rank = 17
    with get_context("spawn").Pool(1) as pool:
        (run,) = pool.apply(set_up, (rank, eve_large))
    assert run["experts"].shape[0] == 32 // 8 and run["ep_group"] == list(range(16, 24))
    assert run["copies"] == list(range(rank % 8, WORLD, 8)) and run["accumulation"] == 1
    assert 0 <= sum(run["partitions"]) - sum(run["planned"]) <= 64
    assert sum(run["partitions"]) == pytest.approx(600.5e6 / WORLD + 805.8e6 / WORLD, rel=0.01)


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


def test_torchs_compiler_is_not_imported(runs: dict[int, list[dict[str, Any]]]) -> None:
    """It would be 1.8 s of every rank's start (eve_ds.engine.initialize, eve_ds.kernels.adam)."""
    assert not any(run["compiler"] for ranks in runs.values() for run in ranks)
