"""The best weights by a metric of the evaluations: kept as a checkpoint, exported; and the end of a run without any."""

from __future__ import annotations

import contextlib
import logging
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eve_ds.callbacks.ema import EMA, GROUP
from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.engine.best_weights import read_best, write_best
from eve_ds.engine.callback import Callback
from eve_ds.engine.checkpoint_record import Manifest
from eve_ds.engine.distributed import broadcast, launched_world
from eve_ds.engine.watchdog import mark
from eve_ds.engine.whole_weights import export_model
from eve_ds.weights.model_folder import MODEL_BEST
from preprocessing.errors import UserError
from preprocessing.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

OPTION = "checkpoint.best"
_log = logging.getLogger(__name__)


class Best(Callback):
    """Follows the metric ``checkpoint.best`` over a run. An equal value is no better one: the earlier step stays.

    A new best is saved as a checkpoint first and exported then. So a run that is killed in between goes on from the
    checkpoint, which knows of the best, and exports it when it starts.

    Args:
        config: the resolved tree, with ``checkpoint.best``.
        ema: the run's, for a metric of the averages.
    Raises:
        UserError: the run has no evaluations that could find the metric.
    """

    def __init__(self, config: PretrainConfig | FinetuneConfig, ema: EMA | None = None) -> None:
        options = config.checkpoint
        self.metric = options.best or ""
        self.mode = options.best_mode or ("min" if self.metric.endswith("loss") else "max")
        self.patience = options.patience
        self.step, self.value = 0, math.nan  # of the best evaluation
        self.waited = 0  # evaluations since
        self._ema = ema if self.metric.startswith(GROUP) else None
        # Values of other samples are not compared with one another.
        self._criterion = [self.metric, self.mode, config.data.val_split, config.logging.eval_samples]
        if config.data.val_split is None:
            raise UserError(f"{OPTION}={self.metric}: data.val_split=null leaves nothing to evaluate; name a split")
        if self.metric.startswith(GROUP) and ema is None:
            raise UserError(
                f"{OPTION}={self.metric} is of the averages of the weights; keep them: optimizer.ema 0.9999"
            )

    @property
    def known(self) -> bool:
        """Whether there has been a best evaluation."""
        return self.step > 0

    @property
    def record(self) -> dict[str, Any]:
        return {"metric": self.metric, "mode": self.mode, "value": self.value, "step": self.step}

    def checkpoint_loaded(self, trainer: Trainer, path: Path, manifest: Manifest) -> None:
        if path.resolve().parent != trainer.checkpoint_dir.resolve():  # a branch: those weights are another run's
            self.step, self.value, self.waited = 0, math.nan, 0

    def fit_start(self, trainer: Trainer) -> None:
        if self.known:
            trainer.keep_checkpoint(self.step, OPTION)
            self._check_export(trainer)
        else:
            self._check_name(trainer)
            if trainer.is_main:
                write_best(trainer.output_dir, None)  # of another metric, or of a run that this one branches from
        if self.patience is not None and self.waited >= self.patience:
            trainer.end()

    def evaluation_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        if trainer.nonfinite_streak:
            return  # nothing is saved now
        value = self._found(trainer, record)
        if math.isfinite(value) and (
            not self.known or (value < self.value if self.mode == "min" else value > self.value)
        ):
            self.step, self.value, self.waited = trainer.step, value, 0
            trainer.keep_checkpoint(trainer.step, OPTION)
            if trainer.step == trainer.start_step:  # its checkpoint is there: none follows
                self._export(trainer)
            return
        self.waited += 1
        if self.patience is not None and self.waited >= self.patience:
            trainer.end()
            if trainer.is_main and trainer.step < trainer.total_steps:
                best = f"{self.metric} {self.value:.4g} of step {self.step}" if self.known else self.metric
                _log.info(
                    "step %d: training ends: %d evaluations in a row were no better than %s (checkpoint.patience)",
                    trainer.step,
                    self.waited,
                    best,
                )

    def checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        if trainer.step == self.step and trainer.step > trainer.start_step:
            self._export(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"criterion": self._criterion, "step": self.step, "value": self.value, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["criterion"] == self._criterion:
            self.step, self.value, self.waited = state["step"], state["value"], state["waited"]
        elif launched_world()[0] == 0:
            _log.warning("%s: the run had another metric or validation set before; its best is looked for anew", OPTION)

    def _check_name(self, trainer: Trainer) -> None:
        """Evaluate a batch, or all where its samples tell too little, to see before the first step whether there is
        such a metric."""
        assert trainer.evaluate is not None
        mark("a look at the names of the metrics")
        trainer.engine.eval()
        size = trainer.config.engine.eval_batch_size or trainer.micro_batch_of_all_ranks // trainer.world_size
        most = trainer.config.logging.eval_samples
        name = self.metric.replace(GROUP, "val/", 1) if self._ema else self.metric
        found = trainer.evaluate(trainer, min(size * trainer.world_size, most or math.inf))
        if not broadcast(name in found):
            found = trainer.evaluate(trainer)
        averaged = {GROUP + name.removeprefix("val/"): value for name, value in found.items()}
        self._found(trainer, found | (averaged if self._ema else {}))

    def _found(self, trainer: Trainer, record: dict[str, float]) -> float:
        """The metric in what rank 0 found. Raises UserError, on all ranks, if it is not there."""
        value, names = broadcast((record.get(self.metric), sorted(name for name in record if "/" in name)))
        if value is None:
            known = ", ".join(names) or f"none: {trainer.config.data.val_split} has nothing to score by"
            raise UserError(f"{OPTION}={self.metric}: evaluations find no such metric, but {known}; name one of these")
        return float(value)

    def _check_export(self, trainer: Trainer) -> None:
        """Export again what a kill right after the checkpoint prevented."""
        if broadcast(read_best(trainer.output_dir)) == self.record:
            return
        if self.step == trainer.start_step:
            self._export(trainer)
        elif trainer.is_main:
            _log.warning(
                "%s: does not hold the best weights so far, of step %d; the next best ones replace it",
                trainer.output_dir / MODEL_BEST,
                self.step,
            )

    def _export(self, trainer: Trainer) -> None:
        config, run = trainer.config, trainer.output_dir
        if trainer.is_main:
            write_best(run, None)
        swapped: AbstractContextManager[None] = contextlib.nullcontext()
        if self._ema is not None:
            swapped = self._ema.swapped_in(trainer)
        with swapped:
            companions = config.spec.companions(config.data.home)
            folder = run / MODEL_BEST
            export_model(trainer.task, config, Tokenizer.load(run), folder, trainer.step, companions)
        if trainer.is_main:
            write_best(run, self.record)
            _log.info("step %d: %s %.4g is the best so far: %s", self.step, self.metric, self.value, folder)
