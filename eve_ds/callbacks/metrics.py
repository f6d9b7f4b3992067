"""``metrics.jsonl``: every record of a run, one JSON object per line, readable while the run trains."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from eve_ds.engine.callback import Callback
from eve_ds.engine.divergence import SUSPECTS
from preprocessing.local_files import load_json, write_text

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

FILE = "metrics.jsonl"
_log = logging.getLogger(__name__)


class MetricsFile(Callback):
    """Appends training and evaluation records to ``output_dir/metrics.jsonl`` on rank 0, each written at once.

    A run that resumes from the checkpoint of step N first removes the records of later steps, so that no step occurs
    twice. Non-finite values are written as null, because JSON has none.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def fit_start(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        trainer.output_dir.mkdir(parents=True, exist_ok=True)
        for path in (trainer.output_dir / FILE, trainer.output_dir / SUSPECTS):
            if path.exists():
                write_text(path, "".join(lines_until(path, trainer.start_step, trainer.evaluation_due)))
        self._file = open(trainer.output_dir / FILE, "a", encoding="utf-8", buffering=1)  # by line

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self._write(record)

    def evaluation_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self._write(record)

    def close(self, trainer: Trainer) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, record: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(
                json.dumps({key: _finite_or_none(value) for key, value in record.items()}, default=float) + "\n"
            )


def _finite_or_none(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lines_until(path: Path, last_step: int, evaluates_again: bool = False) -> list[str]:
    """The lines of steps 1 to ``last_step``. A line that a killed run left incomplete is dropped with a warning.

    Args:
        path: the file.
        last_step: the step that the run resumes from.
        evaluates_again: drop the evaluation after ``last_step`` too; an earlier start may have written it.
    """
    kept = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = load_json(line)
            step = float(record["step"])
        except (ValueError, TypeError, KeyError, OverflowError):
            _log.warning("%s: line %d is not a record with a step and was dropped", path, number)
            continue
        if 0 < step <= last_step and not (
            evaluates_again and step == last_step and any(key.startswith("val/") for key in record)
        ):
            kept.append(line + "\n")
    return kept
