"""Log to Weights & Biases as trainings do, each in a process of its own: ``python -m tests.support.wandb_pieces JSON``.

JSON is a list of pieces, run one after the other: {"folder", "start": step it resumes from, "last": step, "killed",
"mode"}. They are forks of one process, since importing the callback takes longer than all else.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from eve_ds.callbacks import MetricsFile, WandbLog, wandb
from eve_ds.config import PretrainConfig

# On a busy machine: what is slow is not what is tested.
wandb.REACH_TIMEOUT_S, wandb.INIT_TIMEOUT_S, wandb.FINISH_TIMEOUT_S = 200.0, 200, 200


def log(folder: Path, start: int, last: int, killed: bool, mode: Any) -> None:
    """Log steps start + 1 to last, each with a loss of start + step, and end by a signal if ``killed``."""
    config = PretrainConfig(output_dir=str(folder))
    config.logging.wandb_project, config.logging.wandb_mode = "pieces", mode
    state: Any = SimpleNamespace(
        output_dir=folder, is_main=True, task_name="pretrain", config=config, world_size=2, start_step=start,
        step=start, stopped_early=False, evaluation_due=False,
    )  # fmt: skip
    callbacks = [MetricsFile(), WandbLog(config.logging)]
    for callback in callbacks:
        callback.fit_start(state)
    for state.step in range(start + 1, last + 1):
        for callback in callbacks:
            callback.step_end(state, {"step": state.step, "loss": float(start + state.step), "lr": 1e-3})
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    for callback in callbacks:
        callback.evaluation_end(state, {"step": last, "val/loss": 0.5})
    for callback in callbacks:
        callback.fit_end(state)
    for callback in callbacks:
        callback.close(state)


def main() -> None:
    importlib.import_module("wandb")  # once, for all forks
    for piece in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            log(**piece | {"folder": Path(piece["folder"])})
            return  # and not os._exit, so that wandb takes leave of its own process
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
