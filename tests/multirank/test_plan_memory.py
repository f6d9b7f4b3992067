"""The plan's forecast of a rank's memory on the CPU against what two training ranks are seen to hold.

Resident memory follows the tensors only if malloc gives back what is freed, so that is switched on here.
"""

from __future__ import annotations

import ctypes
import gc
import warnings
from pathlib import Path

import torch

from eve_ds.engine.deepspeed_config import best_precision
from tests.support.distributed import run_distributed_test

WORLD, ROWS, TEXT, TOLERANCE = 2, 12, 16, 0.15
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
Case = tuple[int, int, str]  # ZeRO stage, expert-parallel size, precision
QUICK = best_precision("cpu")  # bf16 where it is quick: elsewhere these few steps take minutes
CASES: list[Case] = [(1, 2, "fp32"), (2, 2, QUICK), (3, 1, QUICK)]


def config_of(case: Case):
    from eve_ds.config import PretrainConfig
    from eve_ds.config_sections import EngineConfig
    from eve_ds.model.model_config import ModelConfig
    from eve_ds.tasks.masked_modeling import ObjectiveConfig

    stage, ep_size, precision = case
    model = ModelConfig(
        image_size=64,
        patch_size=8,
        dim=384,
        depth=4,
        num_heads=6,
        mlp_hidden=1536,
        vocab_size=8000,
        max_text_length=TEXT,
        soft_layers=[3],
        num_experts=4,
    )
    return PretrainConfig(
        model=model,
        objective=ObjectiveConfig(decoder_dim=128, decoder_depth=1, decoder_heads=4),
        engine=EngineConfig(
            global_batch_size=ROWS * WORLD,
            expert_parallel_size=ep_size,
            precision=precision,  # type: ignore[arg-type]
        ),
        deepspeed_config=f"ds_configs/zero{stage}.json",
    )


def status(name: str) -> int:
    """Bytes from /proc/self/status: VmRSS is resident memory, VmHWM the most that it was."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class _Tokenizer:
    mask_id = 4


def train(case: Case, steps: int) -> int:
    """A short run; returns the most resident bytes between the engine's start and its end."""
    import deepspeed
    import torch.distributed as dist

    from eve_ds.engine import setup
    from eve_ds.engine.deepspeed_config import load_deepspeed_config
    from eve_ds.engine.optim import build_optimizer

    config = config_of(case)
    settings = load_deepspeed_config(config.deepspeed_config, config.engine, config.optimizer, WORLD)
    task = setup.build_task(config, _Tokenizer())  # type: ignore[arg-type]
    optimizer = build_optimizer(task, config.optimizer)
    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=settings)
    batch = {
        "images": torch.randn(ROWS, 3, 64, 64),
        "text_ids": torch.randint(5, 50, (ROWS, TEXT)),
        "text_mask": torch.ones(ROWS, TEXT, dtype=torch.bool),
        "sample_id": torch.arange(ROWS) + ROWS * dist.get_rank(),
    }
    collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts anew
    for _ in range(steps):
        engine.backward(engine(batch).loss * WORLD)
        engine.step()
    most = status("VmHWM")
    engine.destroy()
    return most


def collect() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def compare(cases: list[Case]) -> None:
    from eve_ds.engine.distributed import disable_shm_operation
    from eve_ds.environment import prepare_environment

    prepare_environment()
    import deepspeed

    from eve_ds.engine.deepspeed_config import load_deepspeed_config
    from eve_ds.plan.memory import Batch, Rehearsal
    from eve_ds.plan.zero_states import Zero

    warnings.filterwarnings("ignore", category=FutureWarning)
    for option, value in ((M_MMAP_MAX, 2**20), (M_MMAP_THRESHOLD, 2**16), (M_TRIM_THRESHOLD, 2**16)):
        assert ctypes.CDLL(None).mallopt(option, value) == 1
    disable_shm_operation()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    for case in cases:
        train(case, steps=1)  # oneDNN keeps a kernel for every shape of product that it has met
        collect()
        before = status("VmRSS")
        measured = train(case, steps=2) - before
        config, (stage, ep_size, precision) = config_of(case), case
        settings = load_deepspeed_config(config.deepspeed_config, config.engine, config.optimizer, WORLD)
        itemsize = 2 if precision == "bf16" else 4
        zero = Zero(stage, WORLD, ep_size, itemsize, 1, settings["zero_optimization"], whole_buffers=False)
        rehearsal = Rehearsal(config, zero, num_answers=0, on_gpu=False)
        forecasted = rehearsal.memory(Batch(ROWS, TEXT)).peak
        told = (
            f"ZeRO {stage}, EP {ep_size}, {precision}: forecast {forecasted >> 20} MiB, measured {measured >> 20} MiB"
        )
        print(told, flush=True)
        assert abs(forecasted / measured - 1) < TOLERANCE, told


def test_forecast_is_near_what_is_measured() -> None:
    run_distributed_test(compare, WORLD, args=(CASES,), timeout=280)
