"""Behavior that cuts across training, a file each. ``standard_callbacks`` lists those that every run has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eve_ds.callbacks.metrics import MetricsFile
from eve_ds.callbacks.progress import Progress
from eve_ds.callbacks.wandb import WandbLog
from eve_ds.engine.callback import Callback

if TYPE_CHECKING:
    from eve_ds.config import FinetuneConfig, PretrainConfig

__all__ = ["MetricsFile", "Progress", "WandbLog", "standard_callbacks"]


def standard_callbacks(config: PretrainConfig | FinetuneConfig) -> list[Callback]:
    """Metrics file and progress; Weights & Biases unless ``logging.wandb`` is false."""
    callbacks: list[Callback] = [MetricsFile(), Progress()]
    if config.logging.wandb:
        callbacks.append(WandbLog(config.logging.wandb_project))
    return callbacks
