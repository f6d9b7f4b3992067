"""The hooks by which everything that cuts across training (logging, progress, samples) joins the loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer


class Callback:
    """Does nothing; override what is needed. Hooks run on every rank, in the order in which callbacks are listed.

    A hook that talks or writes does so only where ``trainer.is_main``. Callbacks read the trainer (``output_dir``,
    ``total_steps``, ``start_step``, ``step``, ``config``, ``task_name``, ``world_size``, ...) and change nothing in it.
    """

    def fit_start(self, trainer: Trainer) -> None:
        """Before the first step, ``start_step`` known."""

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        """After an optimizer step. ``record``: step, samples, loss, the task's metrics, lr, grad_norm,
        samples_per_second, step_seconds, ...; the same on every rank but for the times."""

    def evaluation_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        """After an evaluation. ``record``: step, and metrics named by their split (``val/loss``); whole on rank 0."""

    def checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint is whole on disk at ``path``."""

    def fit_end(self, trainer: Trainer) -> None:
        """After the last step, or after the one at which a request to stop was met. Not after an exception."""

    def close(self, trainer: Trainer) -> None:
        """Always the last call, also after an exception and where ``fit_start`` was not reached. Must not raise."""
