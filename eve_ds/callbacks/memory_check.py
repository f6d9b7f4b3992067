"""The memory of a run's first step beside the plan's forecast, and what held a GPU's memory when it ran out."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import torch

from eve_ds import rank_failure
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

    When a GPU runs out of memory, what held it is written into ``output_dir/profile``: torch's summary, or with
    ``logging.memory_snapshot`` a record of all allocations. That part has not been run on a GPU. The line by which the
    rank ends then has the forecast, too (``rank_failure.tell_memory``).

    Args:
        gauge: made before the model was built.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge, self._recording = gauge, False
        rank_failure.tell_memory = lambda error: gauge.shortage(error)

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
        without = isinstance(sys.exc_info()[1], torch.cuda.OutOfMemoryError)  # the error that ends the training
        if without and trainer.device.type == "cuda":
            path = trainer.output_dir / FOLDER / f"memory_rank_{trainer.rank}{'.pickle' if self._recording else '.txt'}"
            try:
                path.parent.mkdir(exist_ok=True)
                if self._recording:
                    torch.cuda.memory._dump_snapshot(str(path))
                else:
                    path.write_text(torch.cuda.memory_summary(trainer.device), encoding="utf-8")
                self._gauge.snapshot = path
            except OSError as error:
                _log.warning("%s: what held the memory could not be written: %s", path, error.strerror)
        if self._recording:
            torch.cuda.memory._record_memory_history(enabled=None)
            self._recording = False
