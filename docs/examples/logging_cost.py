"""What logging costs: the CPU time of the logging callbacks' hooks on rank 0, as a share of the steps'.

For a run with ``--logging.callbacks "[logging_cost:LoggingCost]"`` and this folder on PYTHONPATH (docs/metrics.md).
"""

from __future__ import annotations

import time
from typing import Any

from eve_ds.callbacks import WandbLog
from eve_ds.callbacks.moe_load import MoELoad
from eve_ds.callbacks.performance import Performance
from eve_ds.callbacks.tensorboard import TensorBoardLog
from eve_ds.engine.callback import Callback

FIRST = 10  # steps that do not count: kernels are built, operations counted
HOOKS = {
    MoELoad: ("_begin", "_end", "_keep_gates", "_count", "step_start", "step_end"),  # shows its image in step_end
    Performance: ("_forward_begins", "_forward_ends", "_own_work_ends", "_count_tokens", "step_end"),
    WandbLog: ("step_end",),
    TensorBoardLog: ("step_end",),
}
spent: dict[str, float] = {}  # seconds


def timed(kind: type, name: str) -> None:
    """Let a method add its time to ``spent``."""
    inner = getattr(kind, name)

    def outer(self: Any, *args: Any) -> Any:
        began = time.thread_time()
        try:
            return inner(self, *args)
        finally:
            key = f"{kind.__name__}.{name}"
            spent[key] = spent.get(key, 0.0) + time.thread_time() - began

    setattr(kind, name, outer)


class LoggingCost(Callback):
    """Prints the shares at the end."""

    def __init__(self) -> None:
        for kind, names in HOOKS.items():
            for name in names:
                timed(kind, name)
        self.began = 0.0

    def step_end(self, trainer: Any, record: dict[str, float]) -> None:
        if trainer.step == trainer.start_step + FIRST:
            spent.clear()
            self.began = time.process_time()

    def fit_end(self, trainer: Any) -> None:
        if trainer.is_main:
            total = time.process_time() - self.began
            shares = {key: f"{seconds / total:.3%}" for key, seconds in spent.items()}
            print(f"logging: {sum(spent.values()) / total:.2%} of {total:.0f} s of CPU time", shares, flush=True)
