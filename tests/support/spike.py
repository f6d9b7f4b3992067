"""``eve_ds.pretrain`` with an incident: rank 1's loss of step 2 is infinite, or it is asked to stop in that step, too
(unsound); or ranks are asked to stop at once, or in the first evaluation; or, from the second step on, they take each
other for stuck after six seconds (impatient); or, in a run in fp16, the gradient of rank 1's experts alone overflows in
step 20 (fp16).

python -m tests.support.spike [--spike=stop|evaluation|unsound|impatient|fp16] OPTIONS
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from eve_ds.environment import prepare_environment
from eve_ds.errors import run_command


def main() -> int:
    prepare_environment()
    import torch

    from eve_ds import pretrain
    from eve_ds.engine import watchdog
    from eve_ds.engine.trainer import Trainer
    from eve_ds.tasks.masked_modeling import MaskedModeling
    from tests.support.fp16 import allow_fp16

    forward, train_step = MaskedModeling.forward, Trainer._train_step
    incident = next((word.partition("=")[2] for word in sys.argv if word.startswith("--spike=")), "loss")
    sys.argv = [word for word in sys.argv if not word.startswith("--spike=")]
    calls = {"training": 0, "evaluation": 0}

    def spiked(task: MaskedModeling, batch: Any) -> Any:
        output = forward(task, batch)
        calls["training"] += task.training
        if task.training and calls["training"] == 3 and os.environ["RANK"] == "1":  # two micro-batches a step
            output.loss = output.loss * float("inf")
            if incident == "unsound":
                os.kill(os.getpid(), signal.SIGTERM)
        return output

    def interrupted(task: MaskedModeling, batch: Any) -> Any:
        calls["evaluation"] += not task.training
        if calls["evaluation"] == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(task, batch)

    def stopped(trainer: Trainer, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer, *arguments)

    def impatient(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.step == 1 and watchdog._watchdog is not None:
            watchdog._watchdog.seconds, watchdog._watchdog.interval = 6.0, 0.6
        return train_step(trainer, *arguments)

    def overflowing(trainer: Trainer, *arguments: Any) -> Any:
        handles = []
        if trainer.step == 19 and os.environ["RANK"] == "1":
            for layer in trainer.task.backbone.moe_layers():
                handles += [part.register_hook(lambda gradient: gradient * torch.inf) for part in [layer.experts.w1]]
        record = train_step(trainer, *arguments)
        for handle in handles:
            handle.remove()
        return record

    if incident == "fp16":
        allow_fp16()
        Trainer._train_step = overflowing  # type: ignore[method-assign]
    elif incident == "impatient":
        Trainer._train_step = impatient  # type: ignore[method-assign]
    elif incident == "stop":
        Trainer._train_step = stopped  # type: ignore[method-assign]
    else:
        MaskedModeling.forward = interrupted if incident == "evaluation" else spiked  # type: ignore[method-assign]
    return pretrain.main()


if __name__ == "__main__":
    run_command(main)
