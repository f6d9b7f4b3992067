"""The memory of one rank alone, for a run that has its settings: seconds, where a whole plan searches for a minute."""

from __future__ import annotations

import functools

import torch

from eve_ds.engine.deepspeed_config import load_deepspeed_config
from eve_ds.engine.distributed import rank_and_world
from eve_ds.engine.memory_gauge import Gauge
from eve_ds.plan.memory import Batch, Rehearsal
from eve_ds.plan.meta_model import Config
from eve_ds.plan.zero_states import Zero


def memory_gauge(config: Config, num_classes: int, device: torch.device) -> Gauge:
    """A gauge of this rank's memory that knows the forecast. Make it before the model is built."""
    return Gauge(device, functools.partial(memory_forecast, config, num_classes, device))


def memory_forecast(config: Config, num_classes: int, device: torch.device) -> int:
    """Bytes that a rank holds at most, with texts of ``model.max_text_length`` tokens and evenly loaded experts.

    Torch's random state stays as it is: a run may ask between two steps.

    Args:
        config: the run, ``engine.precision`` settled.
        num_classes: of the dataset.
        device: this rank's.
    """
    (_, world_size), on_gpu = rank_and_world(), device.type == "cuda"
    settings = load_deepspeed_config(config.deepspeed_config, config.engine, config.optimizer, world_size)
    zero = Zero.of_run(config, settings, world_size, on_gpu)
    batch = Batch(settings["train_micro_batch_size_per_gpu"], config.model.max_text_length)
    with torch.random.fork_rng(devices=[]):
        return Rehearsal(config, zero, num_classes, on_gpu).memory(batch).peak
