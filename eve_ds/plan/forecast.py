"""The memory of one rank alone, for a run that has its settings: no search, as in a whole plan."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from eve_ds.engine.deepspeed_config import load_deepspeed_config
from eve_ds.engine.distributed import rank_and_world
from eve_ds.engine.memory_gauge import Gauge
from eve_ds.plan.fit import largest
from eve_ds.plan.memory import GPU_RESERVE, Batch, Rehearsal
from eve_ds.plan.meta_model import Config
from eve_ds.plan.zero_states import Zero


def memory_gauge(config: Config, num_classes: int, device: torch.device) -> Gauge:
    """A gauge of this rank's memory that knows the forecast. Make it before the model is built."""
    parts = config, num_classes, device
    return Gauge(device, functools.partial(memory_forecast, *parts), functools.partial(micro_batch_that_fits, *parts))


def memory_forecast(config: Config, num_classes: int, device: torch.device) -> int:
    """Bytes that a rank holds at most, with texts of ``model.max_text_length`` tokens and evenly loaded experts.

    Torch's random state stays as it is: a run may ask between two steps.

    Args:
        config: the run, ``engine.precision`` settled.
        num_classes: of the dataset.
        device: this rank's.
    """
    with torch.random.fork_rng(devices=[]):
        rehearsal, batch = _rehearsal(config, num_classes, device)
        return rehearsal.memory(batch).peak


def micro_batch_that_fits(config: Config, num_classes: int, device: torch.device, total: int) -> tuple[int, int]:
    """(the run's micro-batch, the largest one up to it whose forecast fits a GPU of ``total`` bytes, 0 if none)."""
    with torch.random.fork_rng(devices=[]):
        rehearsal, batch = _rehearsal(config, num_classes, device)
        limit, rows = total - GPU_RESERVE, batch.rows
        return rows, largest(lambda rows: rehearsal.memory(replace(batch, rows=rows)).peak, limit, rows, start=rows)


def _rehearsal(config: Config, num_classes: int, device: torch.device) -> tuple[Rehearsal, Batch]:
    (_, world_size), on_gpu = rank_and_world(), device.type == "cuda"
    settings = load_deepspeed_config(config.deepspeed_config, config.engine, config.optimizer, world_size)
    zero = Zero.of_run(config, settings, world_size, on_gpu)
    batch = Batch(settings["train_micro_batch_size_per_gpu"], config.model.max_text_length)
    return Rehearsal(config, zero, num_classes, on_gpu), batch
