"""``eve_ds.pretrain`` with an incident: rank 1's loss of step 2 is infinite, or it is asked to stop in that step, too
(unsound); or ranks are asked to stop at once, or in the first evaluation; or, from the second step on, they take each
other for stuck after six seconds (impatient); or, in a run in fp16, the gradient of rank 1's experts alone overflows in
step 20 (fp16); or rank 1 meets in step 2 what torch raises of a GPU without memory (memory) or with a fault (fault).

python -m tests.support.spike [--spike=stop|evaluation|unsound|impatient|fp16|memory|fault] OPTIONS
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from eve_ds.environment import prepare_environment
from eve_ds.errors import run_command

# As torch 2.11 words them.
NO_MEMORY = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 4.00 GiB of which 14.31 MiB is "
    "free. Including non-PyTorch memory, this process has 3.98 GiB memory in use. Of the allocated memory 3.10 GiB is "
    "allocated by PyTorch, and 511.48 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory "
    "is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for "
    "Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
FAULT = (
    "CUDA error: uncorrectable ECC error encountered\nSearch for `cudaErrorECCUncorrectable' in "
    "https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information.\nCUDA kernel errors "
    "might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.\nFor "
    "debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side "
    "assertions.\n"
)


def raise_gpu_error(incident: str) -> None:
    """If that is the incident."""
    import torch

    if incident == "memory":
        raise torch.OutOfMemoryError(NO_MEMORY)
    if incident == "fault":
        raise torch.AcceleratorError(FAULT)


def main() -> int:
    prepare_environment()
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
            raise_gpu_error(incident)
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
                handles += [part.register_hook(lambda gradient: gradient * float("inf")) for part in [layer.experts.w1]]
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
