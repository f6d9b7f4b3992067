"""TensorBoard: the run's curves and images, in ``output_dir/tensorboard``."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np

from eve_ds.callbacks.metric_groups import AXIS, grouped
from eve_ds.engine.callback import Callback
from preprocessing.errors import UserError

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

FOLDER = "tensorboard"


class TensorBoardLog(Callback):
    """Writes every record on rank 0, by the names of ``metric_groups``. ``logging.tensorboard: true`` adds it.

    A run that resumes from the checkpoint of step N tells TensorBoard to drop what earlier files hold of later steps.

    Raises:
        UserError: the package tensorboard is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError("logging.tensorboard=true needs the package tensorboard; pip install tensorboard==2.21.0")
        self._writer: Any = None

    def fit_start(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        # Files of an earlier process may hold steps after the checkpoint, or those of a start without one.
        after = trainer.start_step + 1
        self._writer = SummaryWriter(trainer.output_dir / FOLDER, purge_step=after)

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self._write(record)

    def evaluation_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self._write(record)

    def images_made(self, trainer: Trainer, images: dict[str, np.ndarray]) -> None:
        if self._writer is not None:
            for name, pixels in images.items():
                self._writer.add_image(name, pixels, trainer.step, dataformats="HWC")

    def close(self, trainer: Trainer) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, record: dict[str, float]) -> None:
        if self._writer is not None:
            for key, value in record.items():
                if key != AXIS:
                    self._writer.add_scalar(grouped(key), value, int(record[AXIS]))
