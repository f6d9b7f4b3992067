"""Launches, waits of the host and device time by kind: of forward and backward, plain and compiled, and of an engine's
step, compiled.

    python -m tests.gpu.count_launches [--pairs N]

EVE-Base (in the dry run a tiny model), both passes of pre-training, ZeRO 1 on one rank. Prints a JSON line.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from typing import Any

from eve_ds.environment import free_port, prepare_environment

prepare_environment()

import torch  # noqa: E402  after the variables that it reads

from eve_ds.bench.gemm import DTYPES  # noqa: E402
from eve_ds.bench.step import build_task, make_batch  # noqa: E402
from eve_ds.config import PretrainConfig, parse  # noqa: E402
from eve_ds.engine.deepspeed_config import load_deepspeed_config  # noqa: E402
from eve_ds.engine.distributed import disable_shm_operation  # noqa: E402
from eve_ds.engine.initialize import initialize  # noqa: E402
from eve_ds.engine.moe_deepspeed import DeepSpeedMoE  # noqa: E402
from eve_ds.engine.optim import build_optimizer  # noqa: E402
from eve_ds.model.backbone import Backbone  # noqa: E402
from eve_ds.model.compiled import compile_parts  # noqa: E402
from eve_ds.tasks.base import Batch, Task  # noqa: E402
from tests.gpu.device_trace import trace  # noqa: E402
from tests.gpu.kit_sizes import kit_device, pretrain_options, sizes_of  # noqa: E402

WARMUP = 3


def main() -> dict[str, Any]:
    device = kit_device() or torch.device("cpu")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=sizes_of(device).pairs)
    pairs = parser.parse_args().pairs
    batch_options = [f"--engine.global_batch_size={pairs}", f"--engine.micro_batch_size={pairs}"]
    config = parse(PretrainConfig, [*pretrain_options(device), *batch_options], "count_launches")
    if config.engine.precision == "auto":
        config.engine.precision = "bf16"
    batch = make_batch(config, pairs, device)
    join_group(device)
    torch.manual_seed(0)
    task = build_task(config, Backbone(config.model, moe_layer=functools.partial(DeepSpeedMoE, ep_size=1, ep_rank=0)))
    task = task.to(device, DTYPES[config.engine.precision]).train()
    found = {"pairs": pairs, "forward_backward": forward_backward(task, batch, device)}
    print(json.dumps(found), flush=True)  # before what is compiled, which may fail
    task.zero_grad(set_to_none=True)
    compile_parts(task, "inductor" if device.type == "cuda" else "aot_eager")
    found["forward_backward_compiled"] = forward_backward(task, batch, device)
    print(json.dumps(found), flush=True)
    task.zero_grad(set_to_none=True)
    found["engine_step"] = engine_step(config, task, batch, device)
    torch.distributed.destroy_process_group()
    return found


def join_group(device: torch.device) -> None:
    """A process group of this one rank."""
    import deepspeed

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    disable_shm_operation()
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def forward_backward(task: Task, batch: Batch, device: torch.device) -> dict[str, Any]:
    """Of the task alone, in the run's precision."""

    def run() -> None:
        task(batch).loss.backward()

    for _ in range(WARMUP):
        run()
        task.zero_grad(set_to_none=True)
    return trace(run, device)


def engine_step(config: PretrainConfig, task: Task, batch: Batch, device: torch.device) -> dict[str, Any]:
    """Of DeepSpeed's engine: forward, backward, reduction, clipping and optimizer."""
    settings = load_deepspeed_config("ds_configs/zero1.json", config.engine, config.optimizer, 1)
    engine = initialize(task, build_optimizer(task, config.optimizer), settings)

    def run() -> None:
        engine.backward(engine(batch).loss)
        engine.step()

    for _ in range(WARMUP):
        run()
    return trace(run, device)


if __name__ == "__main__":
    print(json.dumps(main()))
