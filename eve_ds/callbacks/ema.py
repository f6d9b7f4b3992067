"""The moving average of the weights (EMA): kept while a run trains, evaluated beside them, and exported at the end."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eve_ds.engine.averages import Averages
from eve_ds.engine.callback import Callback
from eve_ds.engine.checkpoint_record import Manifest
from eve_ds.engine.watchdog import mark
from eve_ds.engine.whole_weights import export_model
from eve_ds.weights.model_folder import MODEL_EMA
from preprocessing.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

GROUP = "val_ema/"  # prefix of the averages' metrics; val/ has those of the trained weights
_log = logging.getLogger(__name__)


class EMA(Callback):
    """After the n-th step that changed the weights: ``average = d * average + (1 - d) * weights``, with
    ``d = min(decay, (1 + n) / (10 + n))``, on all ranks, in fp32.

    The bound that grows with n is that of TensorFlow's ``tf.train.ExponentialMovingAverage(decay, num_updates)``: the
    initial weights are soon forgotten.

    ``optimizer.ema`` adds it, before the callbacks that write records.

    Args:
        decay: upper bound of d, which it reaches after many steps; as 0.9999.
    """

    def __init__(self, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._averages: Averages | None = None

    def checkpoint_loaded(self, trainer: Trainer, path: Path, manifest: Manifest) -> None:
        if self._of(trainer).load(path, manifest, trainer.topology):
            return
        if trainer.is_main:
            _log.warning(
                "%s: holds no averages of the weights, as optimizer.ema was 0; they start as the weights of step %d",
                path,
                manifest.step,
            )

    def step_start(self, trainer: Trainer) -> None:
        self._of(trainer)  # makes them before the first step changes the weights, and for a dry run to measure

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        if trainer.engine.was_step_applied():
            self.updates += 1
            self._of(trainer).update(min(self.decay, (1 + self.updates) / (10 + self.updates)))

    def evaluating(self, trainer: Trainer, found: dict[str, float]) -> None:
        """Evaluate again with the averages in the model. A collective."""
        assert trainer.evaluate is not None
        mark(f"the evaluation of the averages after step {trainer.step}")
        with self.swapped_in(trainer):
            averaged = trainer.evaluate(trainer)
        found |= {GROUP + name.removeprefix("val/"): value for name, value in averaged.items()}

    def fit_end(self, trainer: Trainer) -> None:
        config = trainer.config
        if trainer.stopped_early or not config.checkpoint.export:
            return
        tokenizer, companions = Tokenizer.load(trainer.output_dir), config.spec.companions(config.data.home)
        with self.swapped_in(trainer):
            folder = trainer.output_dir / MODEL_EMA
            export_model(trainer.task, config, tokenizer, folder, trainer.step, companions)

    def rank_files(self) -> dict[str, Any]:
        return self._averages.files() if self._averages else {}

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]

    def swapped_in(self, trainer: Trainer) -> AbstractContextManager[None]:
        """While open, the model has the averages (eve_ds/engine/averages.py). A collective."""
        return self._of(trainer).swapped_in()

    def _of(self, trainer: Trainer) -> Averages:
        if self._averages is None:
            self._averages = Averages(trainer.engine)
        return self._averages
