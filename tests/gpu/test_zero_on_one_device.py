"""DeepSpeed ZeRO 1, 2 and 3 with our AdamW on one device (NCCL on a GPU) against a plain loop on the same device.

The multi-rank comparison of tests/multirank runs on CPUs alone: here are the device's own reductions, norms and copies.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tests.support.distributed import run_distributed_test

STEPS, ROWS, CLIP = 4, 16, 0.5
STAGES = (1, 2, 3)
CLOSE = {"fp32": 1e-5, "bf16": 2e-2}  # of a loss and a norm, relative; of all weights, of the way that they went
COMMON = {"num_experts": 8, "init_std": 0.1, "layer_scale": 0.5}


def test_zero_equals_a_plain_loop(device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    run_distributed_test(every_case, 1, backend, timeout=300, args=(device.type,))


def every_case(kind: str) -> None:
    """In a process group of one rank: raise AssertionError naming each difference."""
    from eve_ds.engine.distributed import disable_shm_operation
    from eve_ds.environment import prepare_environment

    prepare_environment()
    import deepspeed

    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    disable_shm_operation()
    backend = "nccl" if kind == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    faults = []
    for precision, close in CLOSE.items():
        expected = plain_loop(precision, device)
        for stage in STAGES:
            found = under_deepspeed(stage, precision, device)
            faults += [f"ZeRO {stage}, {precision}: {fault}" for fault in differences(found, expected, close)]
    assert not faults, "\n".join(faults)


def batches(device: torch.device) -> list[dict[str, Tensor]]:
    from tests.support.tiny import caption_batch

    return [{key: value.to(device) for key, value in caption_batch(ROWS, seed=n).items()} for n in range(STEPS)]


def weights_of(task: torch.nn.Module, values: Any = None) -> dict[str, Tensor]:
    values = values or dict(task.named_parameters())
    return {name: value.detach().double().cpu() for name, value in values.items()}


def plain_loop(precision: str, device: torch.device) -> dict[str, Any]:
    """torch's AdamW over float32 masters."""
    from eve_ds.engine.optim import decayed
    from tests.support.matrix import optimizer_config
    from tests.support.tiny import masked_task

    options, task = optimizer_config(clipping=True), masked_task(**COMMON).to(device)
    first, decays = weights_of(task), decayed(task)
    if precision == "bf16":
        task.to(torch.bfloat16)
    masters = {name: torch.nn.Parameter(value.detach().float().clone()) for name, value in task.named_parameters()}
    groups = [
        {"params": [p for n, p in masters.items() if (n in decays) == decay], "weight_decay": decay * 0.1}
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=tuple(options.betas), eps=options.eps)
    losses, norms = [], []
    for batch in batches(device):
        loss = task(batch).loss
        loss.backward()
        for name, value in task.named_parameters():
            assert value.grad is not None, name
            masters[name].grad = value.grad.float()
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), CLIP)))
        losses.append(float(loss.detach()))
        optimizer.step()
        task.zero_grad()
        with torch.no_grad():
            for name, value in task.named_parameters():
                value.copy_(masters[name])
    return {"losses": losses, "norms": norms, "first": first, "last": weights_of(task, masters)}


def under_deepspeed(stage: int, precision: str, device: torch.device) -> dict[str, Any]:
    from eve_ds.config_sections import EngineConfig
    from eve_ds.engine.deepspeed_config import load_deepspeed_config
    from eve_ds.engine.initialize import initialize
    from eve_ds.engine.moe_deepspeed import DeepSpeedMoE
    from eve_ds.engine.optim import build_optimizer
    from eve_ds.engine.whole_weights import full_state
    from tests.support.matrix import optimizer_config
    from tests.support.tiny import masked_task

    options = optimizer_config(clipping=True)
    task = masked_task(functools.partial(DeepSpeedMoE, ep_size=1, ep_rank=0), **COMMON).to(device)
    engine_config = EngineConfig(
        global_batch_size=ROWS, micro_batch_size=ROWS, expert_parallel_size=1, precision=precision
    )
    settings = load_deepspeed_config(f"ds_configs/zero{stage}.json", engine_config, options, 1)
    engine = initialize(task, build_optimizer(task, options), settings)
    losses, norms = [], []
    for batch in batches(device):
        output = engine(batch)
        engine.backward(output.loss)
        engine.step()
        losses.append(float(output.loss.detach()))
        norms.append(float(engine.get_global_grad_norm()))
    last = {name: value.double().cpu() for name, value in full_state(engine.module).items()}
    engine.destroy()
    return {"losses": losses, "norms": norms, "last": last}


def differences(found: dict[str, Any], expected: dict[str, Any], close: float) -> list[str]:
    faults = []
    for what in ("losses", "norms"):
        for step, (mine, other) in enumerate(zip(found[what], expected[what], strict=True)):
            if not abs(mine / other - 1) < close:
                faults.append(f"{what} of step {step}: {mine}, not {other}")
    first, last = expected["first"], expected["last"]
    names = sorted(last)
    assert set(names) <= set(found["last"])
    way = torch.cat([(last[name] - first[name]).flatten() for name in names]).norm()
    off = torch.cat([(found["last"][name] - last[name]).flatten() for name in names]).norm()
    if not float(off / way) < close * (10 if close < 1e-3 else 1):
        faults.append(f"weights are off by {float(off / way):.1e} of their way")
    return faults
