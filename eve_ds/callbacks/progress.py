"""Progress of a run on stderr: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from eve_ds.engine.callback import Callback

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer


class Progress(Callback):
    """Shows steps, loss, samples/s and time left, on rank 0.

    Args:
        stream: where to write; None is stderr.
        interval: seconds between two lines if ``stream`` is not a terminal.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self, stream: TextIO | None = None, interval: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._interval, self._clock = stream, interval, clock
        self._bar: tqdm[Any] | None = None
        self._began = self._last_line = 0.0

    def fit_start(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        self._began = self._last_line = self._clock()
        stream = self._stream or sys.stderr
        if stream.isatty():
            self._bar = tqdm(
                total=trainer.total_steps, initial=trainer.start_step, desc=trainer.task_name, unit="step", file=stream
            )
            return
        start = f"from step {trainer.start_step} " if trainer.start_step else ""
        self._write_line(trainer, f"training {start}to step {trainer.total_steps} on {trainer.world_size} rank(s)")

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        if not trainer.is_main:
            return
        speed = f"{record['samples_per_second']:.0f} samples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {speed}", refresh=False)
            self._bar.update(1)
            return
        now = self._clock()
        first = trainer.step == trainer.start_step + 1  # shown at once, as a sign that the run trains
        if not first and now - self._last_line < self._interval and trainer.step < trainer.total_steps:
            return
        self._last_line = now
        left = (now - self._began) / (trainer.step - trainer.start_step) * (trainer.total_steps - trainer.step)
        where = f"step {trainer.step}/{trainer.total_steps}"
        self._write_line(trainer, f"{where}  loss {record['loss']:.4f}  {speed}  {duration(left)} left")

    def evaluation_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self._write_line(trainer, f"step {trainer.step}  {evaluation_line(record)}")

    def checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        self._write_line(trainer, f"step {trainer.step}  saved {path}")

    def fit_end(self, trainer: Trainer) -> None:
        done = "stopped early; the same command goes on from here" if trainer.stopped_early else "finished"
        self._write_line(
            trainer, f"step {trainer.step}/{trainer.total_steps}  {done} after {duration(self._clock() - self._began)}"
        )

    def close(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write_line(self, trainer: Trainer, text: str) -> None:
        if trainer.is_main:
            tqdm.write(f"{trainer.task_name}: {text}", file=self._stream or sys.stderr)
            (self._stream or sys.stderr).flush()


def evaluation_line(record: dict[str, float]) -> str:
    """The scores as ``val/loss 5.2  val/mlm_loss 3.1 (no_image 3.6, shuffled 3.5)``: a metric, then its variants."""
    scores = {name: f"{value:.4g}" for name, value in record.items() if "/" in name}
    variants: dict[str, list[str]] = {}
    for name, value in scores.items():
        base = min((other for other in scores if name.startswith(f"{other}_")), key=len, default=name)
        behind = variants.setdefault(base, [])
        if base != name:
            behind.append(f"{name.removeprefix(f'{base}_')} {value}")
    shown = (
        f"{name} {scores[name]}" + (f" ({', '.join(behind)})" if behind else "") for name, behind in variants.items()
    )
    return "  ".join(shown)


def duration(seconds: float) -> str:
    """``0:07``, ``12:34`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
