"""Held-out losses of a split, and the batches of passes over one, over all ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from eve_ds.config import FinetuneConfig
from eve_ds.data.samples import Samples
from eve_ds.engine.batches import evaluation_batch_size, evaluation_batches
from eve_ds.engine.signals import StopRequest
from eve_ds.engine.watchdog import mark_again
from eve_ds.errors import StopError
from eve_ds.tasks.base import ROUTING, measuring_held_out
from eve_ds.tasks.feed import Feed

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

Batch = dict[str, Tensor]
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
    """Means of the task's metrics, and of the sum of its losses, over ``batches``, which are on the trainer's device;
    the same on every rank.

    Nothing is random: masks depend on the sample. Rows that only make the ranks even (``valid`` False) do not count.
    A metric for which no row counts is left out. Raises StopError, on all ranks, where one was asked to stop.
    """
    totals: dict[str, list[float]] = {}
    with measuring_held_out(trainer.task):
        for batch in batches:
            if stop_agreed(trainer.stop, trainer.device):
                raise StopError
            output = trainer.engine(batch)
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


class EvaluationFeed(Feed):
    """Batches of the config's loader.

    Args:
        config: the resolved tree.
        device: this rank's.
        stop: asked before each batch.
    """

    def __init__(self, config: FinetuneConfig, device: torch.device, stop: StopRequest) -> None:
        self.config, self.device, self.stop = config, device, stop
        self.batch_size = evaluation_batch_size(config)

    def shared(self, samples: Samples, limit: int | None = None) -> Iterator[Batch]:
        return self.together(evaluation_batches(self.config, samples, limit, device=self.device))

    def own(self, samples: Samples) -> Iterator[Batch]:
        return evaluation_batches(self.config, samples, alone=True, device=self.device)

    def together(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if stop_agreed(self.stop, self.device):
                raise StopError
            yield batch
