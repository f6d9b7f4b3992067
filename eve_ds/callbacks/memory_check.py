"""The memory of a run's first step beside the plan's forecast, and a snapshot of a GPU's memory when it runs out."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import torch

from eve_ds.engine.callback import Callback
from eve_ds.engine.memory_gauge import Gauge
from eve_ds.engine.watchdog import mark

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

FOLDER = "profile"  # below output_dir; `eve_ds.callbacks.profile` writes there, too
PLENTY = 0.5  # free memory, as a share, with which a CPU's run does without the forecast
MOST_EVENTS = 100_000  # allocations and releases that a snapshot tells of, the last ones
_log = logging.getLogger(__name__)


class MemoryCheck(Callback):
    """Logs, after the first step of this process, what the ranks held at most, and warns where that is far above the
    plan's forecast or nearly all that there is. The forecast takes rank 0 seconds, once; on a CPU with plenty of free
    memory it is not made.

    With ``logging.memory_snapshot`` a GPU's allocations are recorded, and written when a rank runs out of memory. That
    part has not been run on a GPU.

    Args:
        gauge: made before the model was built.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge, self._recording = gauge, False

    def fit_start(self, trainer: Trainer) -> None:
        if trainer.config.logging.memory_snapshot and trainer.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
            self._recording = True

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        if trainer.step != trainer.start_step + 1:
            return
        mark("the comparison of the first step's memory with the plan")
        if found := self._gauge.report(PLENTY if trainer.device.type == "cpu" else 1.0):
            line, warnings = found
            _log.info("%s: step %d  memory: %s", trainer.task_name, trainer.step, line)
            for warning in warnings:
                _log.warning("%s", warning)

    def close(self, trainer: Trainer) -> None:
        if not self._recording:
            return
        if isinstance(sys.exc_info()[1], torch.cuda.OutOfMemoryError):  # the one that ends the training
            path = trainer.output_dir / FOLDER / f"memory_rank_{trainer.rank}.pickle"
            try:
                path.parent.mkdir(exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(path))
                _log.warning("what held the memory is in %s; https://pytorch.org/memory_viz shows it", path)
            except OSError as error:
                _log.warning("%s: no snapshot of the memory: %s", path, error.strerror)
        torch.cuda.memory._record_memory_history(enabled=None)
        self._recording = False
