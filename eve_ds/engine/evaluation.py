"""Held-out losses and predictions of a split, over all ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eve_ds.engine.batches import to_device
from eve_ds.engine.signals import StopRequest
from eve_ds.engine.watchdog import mark_again
from eve_ds.errors import StopError
from eve_ds.tasks.base import ROUTING, Task, measuring_held_out

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

Batch = dict[str, Tensor]
Arrays = dict[str, np.ndarray]
_log = logging.getLogger(__name__)


def stop_agreed(stop: StopRequest, device: torch.device) -> bool:
    """Whether any rank was asked to stop. A collective, so that all ranks act on it at the same place."""
    mark_again()
    asked = torch.tensor(float(stop.requested), device=device)
    if dist.is_initialized():
        dist.all_reduce(asked, dist.ReduceOp.MAX)
    return bool(asked.item())


@torch.no_grad()
def held_out_metrics(trainer: Trainer, batches: Iterable[Batch], prefix: str = "val") -> dict[str, float]:
    """Means of the task's metrics, and of the sum of its losses, over ``batches``; the same on every rank.

    Nothing is random: masks depend on the sample. Rows that only make the ranks even (``valid`` False) do not count.
    A metric for which no row counts is left out. Raises StopError, on all ranks, where one was asked to stop.
    """
    totals: dict[str, list[float]] = {}
    with measuring_held_out(trainer.task):
        for batch in batches:
            if stop_agreed(trainer.stop, trainer.device):
                raise StopError
            output = trainer.engine(to_device(batch, trainer.device))
            for name, pair in output.metrics.items():
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += float(pair[0])
                total[1] += float(pair[1])
    names = sorted(totals)
    packed = torch.tensor([totals[name] for name in names], dtype=torch.float64, device=trainer.device)
    dist.all_reduce(packed)
    means = {name: total / count for name, (total, count) in zip(names, packed.tolist(), strict=True) if count > 0}
    if (vanished := sorted(set(names) - means.keys())) and trainer.is_main:
        _log.info(
            "step %d: %s cannot be told: no micro-batch held what it compares (for *_shuffled: two images or more); "
            "raise engine.micro_batch_size",
            trainer.step,
            ", ".join(f"{prefix}/{name}" for name in vanished),
        )
    losses = [value for name, value in means.items() if name.endswith("_loss") and name not in ROUTING]
    if losses:
        means["loss"] = sum(losses)
    return {f"{prefix}/{name}": value for name, value in means.items()}


@torch.no_grad()
def predict(
    task: Task, batches: Iterable[Batch], device: torch.device, stop: StopRequest | None = None
) -> Arrays | None:
    """``task.predict_batch`` over all batches of all ranks, rows joined in rank order; None but on rank 0.

    Raises StopError, on all ranks, where one was asked to ``stop``.
    """
    parts = []
    for batch in batches:
        if stop is not None and stop_agreed(stop, device):
            raise StopError
        parts.append(task.predict_batch(to_device(batch, device)))
    mine = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    if not dist.is_initialized():
        return mine
    gathered: list[Arrays | None] = [None] * dist.get_world_size()
    dist.gather_object(mine, gathered if dist.get_rank() == 0 else None)
    if dist.get_rank() != 0:
        return None
    whole = [part for part in gathered if part]
    return {name: np.concatenate([part[name] for part in whole]) for name in whole[0]} if whole else {}
