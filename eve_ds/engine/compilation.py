"""Whether the model's blocks run compiled (``engine.compile``)."""

from __future__ import annotations

import logging
import warnings

import torch

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.data.modalities import PAIRS
from eve_ds.engine.distributed import launched_world
from eve_ds.kernels.choices import triton_state
from eve_ds.model.compiled import compile_parts
from eve_ds.tasks.base import Task
from preprocessing.errors import UserError

LEAST_MICRO_BATCHES = 2000  # a minute of compiling, against 45 ms less for each (EVE-Base, 256 pairs, one H100)
TEXT_MULTIPLE = 16  # to which lengths of texts are padded while blocks run compiled: each length is compiled for itself
_log = logging.getLogger(__name__)


def compile_task(
    task: Task, config: PretrainConfig | FinetuneConfig, zero_stage: int, device: torch.device, micro_batches: int
) -> bool:
    """Let the task's blocks run compiled, if that is asked for or pays. Returns whether they do.

    Args:
        task: before DeepSpeed has it.
        config: the resolved tree.
        zero_stage: of the run.
        device: this rank's.
        micro_batches: that a rank computes in the whole run.
    Raises:
        UserError: on, and ZeRO 3 gathers weights between the operations of a block.
    """
    if config.engine.compile == "on" and zero_stage == 3:
        raise UserError(
            "engine.compile=on: ZeRO 3 gathers weights between the operations of a block, which cannot be compiled "
            "then; use ZeRO 1 or 2, or set engine.compile=off"
        )
    choice = config.engine.compile
    if choice == "auto":
        mixed = any(source.modality != PAIRS for source in config.data.sources or ())  # rows of a pass vary
        pays = device.type == "cuda" and zero_stage < 3 and micro_batches >= LEAST_MICRO_BATCHES and not mixed
        pays = pays and not config.engine.deterministic  # the first micro-batch of each process runs as it stands
        choice = "on" if pays and triton_state()[0] else "off"
    if choice == "off":
        return False
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # products in float32, as the router's, stay exact
    parts = compile_parts(task)
    if launched_world()[0] == 0:
        _log.info("%d blocks run compiled (engine.compile); the first steps take a minute more", parts)
    return True
