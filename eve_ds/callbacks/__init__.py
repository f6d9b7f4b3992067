"""The callbacks of a run: the built-in ones, a file each, and the user's own, named by import path."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from eve_ds.callbacks.best import Best
from eve_ds.callbacks.ema import EMA
from eve_ds.callbacks.grad_norms import GradNorms
from eve_ds.callbacks.memory_check import MemoryCheck
from eve_ds.callbacks.metrics import MetricsFile
from eve_ds.callbacks.moe_load import MoELoad
from eve_ds.callbacks.performance import Performance
from eve_ds.callbacks.profile import Profile
from eve_ds.callbacks.progress import Progress
from eve_ds.callbacks.second_copy import SecondCopy
from eve_ds.callbacks.start_record import Provenance
from eve_ds.callbacks.tensorboard import TensorBoardLog
from eve_ds.callbacks.wandb import WandbLog
from eve_ds.engine.callback import Callback
from eve_ds.environment import launched_rank
from eve_ds.options import import_object
from eve_ds.tasks.spec import PretrainSpec
from preprocessing.errors import UserError

if TYPE_CHECKING:
    from eve_ds.config import FinetuneConfig, PretrainConfig

__all__ = ["MemoryCheck", "SecondCopy", "own_callbacks", "standard_callbacks"]
OPTION = "--logging.callbacks"
_log = logging.getLogger(__name__)


def standard_callbacks(config: PretrainConfig | FinetuneConfig) -> list[Callback]:
    """Provenance; those that add to the record; metrics file, progress and dashboards; those of ``logging.callbacks``.

    A dry run has none, as they write, but the EMA, as it takes memory; those of ``logging.callbacks`` are looked up.
    Logs a warning on rank 0 if images are asked for that nobody makes.

    Raises:
        UserError: as ``own_callbacks`` and ``Best``; TensorBoard is asked for and not installed.
    """
    if config.logging.images_every and launched_rank() == 0:
        _warn_without_images(config)
    callbacks: list[Callback] = [Provenance()]
    averages = [EMA(config.optimizer.ema)] if config.optimizer.ema else []
    follows = config.checkpoint.best is not None and not getattr(config, "evaluate", False)
    best = [Best(config, next(iter(averages), None))] if follows else []
    callbacks += averages
    if every := config.logging.detail_every:
        callbacks += [MoELoad(every), Performance(every, config.logging.peak_tflops)]
    if every := config.logging.grad_norms_every:
        callbacks.append(GradNorms(every))
    callbacks += [MetricsFile(), Progress()]
    if config.logging.wandb:
        callbacks.append(WandbLog(config.logging))
    if config.logging.tensorboard:
        callbacks.append(TensorBoardLog())
    if config.logging.profile is not None:
        callbacks.append(Profile(config.logging.profiled))
    callbacks += best + own_callbacks(config.logging.callbacks)
    return list(averages) if config.dry_run else callbacks


def _warn_without_images(config: PretrainConfig | FinetuneConfig) -> None:
    """``logging.images_every`` shows held-out images as `PretrainExamples` does, which pre-training alone has."""
    setting = f"logging.images_every={config.logging.images_every} shows nothing"
    if not isinstance(config.spec, PretrainSpec):
        _log.warning("%s: fine-tuning rebuilds no images", setting)
    elif not config.data.val_split:
        _log.warning("%s: there are no held-out images; name them by data.val_split", setting)


def own_callbacks(paths: Iterable[str]) -> list[Callback]:
    """The callbacks that import paths name: instances as they are, subclasses of `Callback` called without arguments.

    Raises:
        UserError: a path cannot be imported, is no callback, or its class cannot be called without arguments.
    """
    callbacks = []
    for path in paths:
        found = import_object(path, OPTION)
        if isinstance(found, type) and issubclass(found, Callback):
            try:
                found = found()
            except TypeError as error:
                raise UserError(
                    f"{OPTION} {path}: {error}; give its arguments defaults, or name an instance"
                ) from error
        if not isinstance(found, Callback):
            raise UserError(
                f"{OPTION} {path}: is no callback; name a subclass of eve_ds.engine.callback:Callback or an instance"
            )
        callbacks.append(found)
    return callbacks
