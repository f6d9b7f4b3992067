"""What a rank does for tests/multirank/test_lean_zero.py: steps whose gradients are not finite, launches, streams."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.matrix import optimizer_config
from tests.support.tiny import caption_batch, expert_parallel, masked_task, rows_of

ROWS = 8
Case = tuple[
    int, str, bool, str, float, dict[str, Any]
]  # stage, precision, clipping, parameter, value, changed settings
# Operations that start nothing on a device: they allocate memory, or look at it in another way.
SILENT = frozenset(
    "view _unsafe_view t transpose expand slice select unbind split split_with_sizes detach alias as_strided permute "
    "unsqueeze squeeze narrow _reshape_alias empty empty_like new_empty empty_strided lift_fresh set_".split()
)


class Launches(TorchDispatchMode):
    """Counts the operations that run within, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.names[name] += name not in SILENT
        return function(*args, **(kwargs or {}))


def engine_of(
    stage: int,
    precision: str,
    clipping: bool,
    changes: dict[str, Any],
    kind: str = "cpu",
    accumulation: int = 1,
    scaled: bool = False,
    **model: Any,
) -> Any:
    """A DeepSpeed engine over a tiny task on a kind of device, its experts shared by all ranks.

    ``scaled``: one more parameter, of one element, of which ZeRO 3 gives most ranks no part.
    """
    from eve_ds.config_sections import EngineConfig
    from eve_ds.engine.deepspeed_config import load_deepspeed_config
    from eve_ds.engine.initialize import initialize
    from eve_ds.engine.moe_deepspeed import DeepSpeedMoE
    from eve_ds.engine.optim import build_optimizer

    world = dist.get_world_size()
    task = masked_task(expert_parallel(DeepSpeedMoE, world, dist.get_rank()), **model)
    if scaled:
        task.scale = torch.nn.Parameter(torch.ones(1))
        task.register_forward_hook(lambda task, _, output: replace(output, loss=output.loss * task.scale.squeeze()))
    config = EngineConfig(
        global_batch_size=ROWS,
        micro_batch_size=ROWS // (world * accumulation),
        expert_parallel_size=world,
        precision=precision,  # type: ignore[arg-type]
    )
    options = optimizer_config(clipping)
    settings = load_deepspeed_config(f"ds_configs/zero{stage}.json", config, options, world)
    settings["zero_optimization"] |= changes
    return initialize(task.to(kind), build_optimizer(task, options), settings)


def prepare(kind: str = "cpu") -> None:
    """Join the process group for a kind of device; of GPUs there is one."""
    from eve_ds.engine.distributed import disable_shm_operation
    from eve_ds.environment import prepare_environment

    prepare_environment()
    import deepspeed

    if kind == "cuda":
        torch.cuda.set_device(0)
    disable_shm_operation()
    backend = "nccl" if kind == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def masters(engine: Any) -> list[torch.Tensor]:
    """This rank's part of the fp32 weights."""
    optimizer = engine.optimizer
    found = getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.single_partition_of_fp32_groups
    return [each.detach().clone() for each in found]


def steps_without_moving(cases: list[Case], kind: str = "cpu") -> None:
    """For each case the middle of three steps has one value in one gradient of the last rank that is not finite."""
    prepare(kind)
    rank, world = dist.get_rank(), dist.get_world_size()
    share = ROWS // world
    for stage, precision, clipping, name, value, changes in cases:
        engine = engine_of(stage, precision, clipping, changes, kind)
        parameter = dict(engine.module.named_parameters())[name]
        for step in range(3):
            before = masters(engine)
            batch = rows_of(caption_batch(ROWS, seed=step), rank * share, (rank + 1) * share)
            output = engine({key: value.to(kind) for key, value in batch.items()})
            handle = None
            if step == 1 and rank == world - 1:
                handle = parameter.register_hook(lambda gradient, bad=value: spoil(gradient, bad))
            engine.backward(output.loss * world)
            if handle is not None:
                handle.remove()
            engine.step()
            moved = any(not torch.equal(old, new) for old, new in zip(before, masters(engine), strict=True))
            where = f"{stage, precision, clipping, name, value, changes}, step {step}, rank {rank}"
            assert moved == (step != 1), f"{where}: the weights {'moved' if moved else 'did not move'}"
            assert engine.was_step_applied() == (step != 1), where
            assert math.isfinite(float(engine.get_global_grad_norm())) == (step != 1), where
            assert all(torch.isfinite(each).all() for each in masters(engine)), where
        engine.destroy()


def spoil(gradient: torch.Tensor, value: float) -> torch.Tensor:
    spoiled = gradient.clone()
    spoiled.view(-1)[-1] = value
    return spoiled


def launches_of_a_step(stage: int, changes: dict[str, Any], most: int) -> None:
    """Beyond those of the model's own forward and backward pass, a step launches at most ``most`` operations."""
    prepare()
    shape = {"depth": 12, "soft_layers": [10, 11]}
    engine, plain = engine_of(stage, "bf16", True, changes, **shape), masked_task(**shape).bfloat16()
    batch = caption_batch(ROWS)
    for _ in range(3):  # the first makes the optimizer's states; ZeRO 3 learns the order of the weights in two
        with Launches() as whole:
            engine.backward(engine(batch).loss)
            engine.step()
        plain.zero_grad()
        with Launches() as model:
            plain(batch).loss.backward()
    beyond = whole.names - model.names
    assert most - 60 < beyond.total() <= most, f"{beyond.total()} launches: {beyond.most_common()}"
    assert len(list(plain.parameters())) > 250  # so that one launch a gradient would show


def same_weights_and_no_race(cases: list[tuple[int, str, int, dict[str, Any]]]) -> None:
    """For each case (stage, precision, micro-batches a step, changed settings): the weights have the same bits as with
    DeepSpeed's own optimizer, and on a GPU no stream would use what another has not finished."""
    from tests.support.streams import act_out_streams

    prepare()
    races = act_out_streams()
    for stage, precision, accumulation, changes in cases:
        where = f"{stage, precision, accumulation, changes}, rank {dist.get_rank()}"
        with patch("eve_ds.engine.initialize.make_lean"):
            engine = engine_of(stage, precision, False, changes, accumulation=accumulation, scaled=True)
        expected = trained(engine, accumulation)
        engine = engine_of(stage, precision, False, changes, accumulation=accumulation, scaled=True)
        races.ran.clear()
        with races:
            found = trained(engine, accumulation)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), where
        assert not races.found, f"{where}: {collections.Counter(races.found).most_common(5)}"
        streams = {stream is races.default for name, stream in races.ran if name in ("_foreach_copy_", "_foreach_add_")}
        overlaps = engine.optimizer.overlap_comm if stage < 3 else changes.get("overlap_comm", True)
        assert (False in streams) == overlaps, where  # what is reduced on a stream of its own is copied on that


def trained(engine: Any, accumulation: int) -> list[torch.Tensor]:
    """The fp32 weights after two steps; the engine is no more."""
    from deepspeed.utils import safe_get_full_fp32_param

    rank, world = dist.get_rank(), dist.get_world_size()
    share = ROWS // world // accumulation
    for step in range(2 * accumulation):
        engine.backward(engine(rows_of(caption_batch(ROWS, seed=step), rank * share, (rank + 1) * share)).loss * world)
        engine.step()
    # Not ``masters``: where ZeRO 3 gives this rank no part of a parameter, what happened to be in memory stands for it.
    weights = [safe_get_full_fp32_param(parameter).clone() for parameter in engine.module.parameters()]
    engine.destroy()
    return weights


def races_that_are_found() -> None:
    """Of each kind one that ``streams`` finds, and the same with a stream that waits, where it finds none."""
    from tests.support.streams import Stream, act_out_streams

    races, side = act_out_streams(), Stream()
    default = races.default

    def used_on_both(wait: bool) -> list[str]:
        """Made on one stream, written on the other, and freed."""
        races.found.clear()
        with races:
            tensor = torch.ones(8)
            with races.stream(side):
                if wait:
                    side.wait_stream(default)
                tensor[:4].neg_()
            tensor[4:].neg_()  # apart from what the other stream writes
            if wait:
                default.wait_stream(side)
            tensor.neg()
        return list(races.found)

    def freed_on_one(keep: Callable[[torch.Tensor], None]) -> list[str]:
        races.found.clear()
        with races:
            tensor = torch.ones(8)
            side.wait_stream(default)
            with races.stream(side):
                tensor.neg()
            keep(tensor)
            del tensor
            torch.ones(8)
        return list(races.found)

    assert used_on_both(wait=True) == []
    assert freed_on_one(lambda _: None) == ["ones may be given memory that neg uses"]
    assert freed_on_one(lambda tensor: tensor.record_stream(side)) == []
    assert freed_on_one(lambda _: default.wait_stream(side)) == []
    assert used_on_both(wait=False) == ["neg_ may run beside ones", "neg may run beside neg_"]
