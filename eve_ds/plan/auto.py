"""What a run's ``auto`` settings come to. ``engine.micro_batch_size``: the largest whose forecast fits into a device.

It comes out as a divisor of a rank's share of the global batch, so that a step is the same samples as with any other.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from bisect import bisect_right
from collections.abc import Callable

import torch

from eve_ds.engine.deepspeed_config import load_deepspeed_config, settle_precision, share_of_rank, stored_in_run
from eve_ds.engine.distributed import decide, gather, rank_and_world
from eve_ds.engine.memory_gauge import host_memory, size
from eve_ds.environment import local_world_size
from eve_ds.plan.memory import Batch, Rehearsal
from eve_ds.plan.meta_model import Config
from eve_ds.plan.zero_states import Zero
from preprocessing.errors import UserError

# Share of what is free when the run begins. On one H100 the forecast was 2 to 4 % above what EVE-Base held
# (docs/benchmarks.md). The rest is for what is not forecast: NCCL's and cuBLAS's buffers, which come later, the
# allocator's unused remains, unevenly loaded experts. All texts are taken to be ``model.max_text_length`` long.
OF_GPU = 0.9
# On a CPU, malloc keeps freed memory, up to 56 % beyond the forecast (docs/benchmarks.md), and loaders take theirs.
OF_HOST = 0.5
_log = logging.getLogger(__name__)


def settle(config: Config, num_classes: int, device: torch.device) -> None:
    """Put values in the place of ``auto`` in ``engine``: ``settle_precision``, then ``settle_micro_batch_size``."""
    settle_precision(config, rank_and_world()[0])
    settle_micro_batch_size(config, num_classes, device)


def settle_micro_batch_size(config: Config, num_classes: int, device: torch.device) -> None:
    """Put a number in the place of ``engine.micro_batch_size: auto``, the same on all ranks, which all call it.

    A run that goes on, or branches, keeps the number that was stored when it began, on whatever machine, or takes the
    largest below it that divides a rank's share. Rank 0 makes the forecast, which takes seconds.

    Args:
        config: the run, ``engine.precision`` settled.
        num_classes: of the dataset.
        device: this rank's.
    Raises:
        UserError: not even one sample fits, or the task cannot be forecast.
    """
    if config.engine.micro_batch_size != "auto":
        return
    share = share_of_rank(config.engine, rank_and_world()[1])
    stored = stored_in_run(config, "micro_batch_size", lambda value: type(value) is int and value > 0)
    if stored is not None:
        config.engine.micro_batch_size = max(rows for rows in divisors(share) if rows <= stored)
        return
    limit = min(gather(_free(device)))  # devices may differ
    config.engine.micro_batch_size = decide(lambda: _forecast(config, num_classes, device, limit))


def _free(device: torch.device) -> int:
    """Bytes that this rank may take."""
    if device.type == "cuda":
        return int(OF_GPU * torch.cuda.mem_get_info(device)[0])
    return int(OF_HOST * host_memory()[0]) // (local_world_size(os.environ) or 1)


def _forecast(config: Config, num_classes: int, device: torch.device, limit: int) -> int:
    world_size = rank_and_world()[1]
    with torch.random.fork_rng(devices=[]):
        rows, peak = largest_micro_batch(config, num_classes, world_size, device.type == "cuda", limit)
    share = share_of_rank(config.engine, world_size)
    told = rows, share, size(peak), size(limit)
    _log.info("engine.micro_batch_size auto: %d of a rank's %d samples a step; forecast %s of %s to take", *told)
    return rows


def largest_micro_batch(config: Config, num_classes: int, world_size: int, on_gpu: bool, limit: int) -> tuple[int, int]:
    """(rows, forecast): the largest divisor of a rank's share of a step whose forecast is at most ``limit`` bytes.

    Raises:
        UserError: one sample does not fit, or the task cannot be forecast: one of the user's own may lack what that
            asks of it.
    """
    share = share_of_rank(config.engine, world_size)
    engine = dataclasses.replace(config.engine, micro_batch_size=share)
    settings = load_deepspeed_config(config.deepspeed_config, engine, config.optimizer, world_size)
    zero = Zero.of_run(config, settings, world_size, on_gpu)

    def peak(rows: int) -> int:
        rehearsal.zero = dataclasses.replace(zero, accumulation=share // rows)
        return rehearsal.memory(Batch(rows, config.model.max_text_length)).peak

    try:
        rehearsal = Rehearsal(config, zero, num_classes, on_gpu)
        found = peak(share)  # first, as it may be less than that of smaller ones, which keep accumulated gradients
        rows = share if found <= limit else last_that_fits(divisors(share)[:-1], peak, limit)
        found = found if rows == share else peak(rows) if rows else min(found, peak(1))
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(
            f"engine.micro_batch_size=auto: no forecast of {config.task} ({what}); give a number"
        ) from error
    if not rows:
        raise UserError(
            f"engine.micro_batch_size=auto: the least takes {size(found)} by the forecast, and a rank may take "
            f"{size(max(limit, 0))}; set --model.checkpoint_activations true, --deepspeed_config zero3 or a greater "
            "engine.expert_parallel_size, or start more ranks"
        )
    return rows, found


def divisors(number: int) -> list[int]:
    """In order."""
    return [each for each in range(1, number + 1) if number % each == 0]


def last_that_fits(sizes: list[int], peak: Callable[[int], int], limit: int) -> int:
    """The last of ``sizes`` whose ``peak``, which grows with them, is at most ``limit``; 0 if none is, or there are
    none."""
    place = bisect_right(sizes, limit, key=peak)
    return sizes[place - 1] if place else 0
