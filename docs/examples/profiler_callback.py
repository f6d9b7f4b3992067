"""A trace of a few training steps by ``torch.profiler``, for chrome://tracing or https://ui.perfetto.dev.

PYTHONPATH=docs/examples ... -m eve_ds.pretrain ... --logging.callbacks "[profiler_callback:Profiler]"
"""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from eve_ds.engine.callback import Callback
from eve_ds.engine.trainer import Trainer


class Profiler(Callback):
    """Profiles ``steps`` steps on rank 0, after ``skip`` steps of warm-up, into ``output_dir/trace.json``.

    Args:
        skip: steps of this process before the trace begins.
        steps: steps in the trace.
    """

    def __init__(self, skip: int = 2, steps: int = 2) -> None:
        self.skip, self.steps = skip, steps
        self._profile: Any = None

    def step_start(self, trainer: Trainer) -> None:
        if trainer.is_main and trainer.step == trainer.start_step + self.skip:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        if self._profile is not None and trainer.step >= trainer.start_step + self.skip + self.steps:
            self._profile.stop()
            self._profile.export_chrome_trace(str(trainer.output_dir / "trace.json"))
            self._profile = None

    def close(self, trainer: Trainer) -> None:
        if self._profile is not None:  # the run ended first
            self._profile.stop()
            self._profile = None
