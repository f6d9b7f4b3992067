"""``deepspeed.initialize`` for a task that trains, without importing torch's compiler, which no run needs.

DeepSpeed's ZeRO 3 and its own Adam kernels import it all the same, and so does torch's activation checkpointing.
"""

from __future__ import annotations

import importlib
from typing import Any

import deepspeed
from deepspeed.runtime import compiler
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch.optim import Optimizer

from eve_ds.engine.lean_zero import make_lean
from eve_ds.kernels.adam import LeanAdamW
from eve_ds.tasks.base import Task

_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"


def initialize(task: Task, optimizer: Optimizer, settings: dict[str, Any]) -> DeepSpeedEngine:
    """The engine that trains ``task``. A collective.

    Args:
        task: as one rank holds it.
        optimizer: from ``build_optimizer``.
        settings: from ``load_deepspeed_config``.
    """
    _import_muon()
    if LeanAdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # which compares exact types: a subclass of torch's AdamW is none
        ZERO_SUPPORTED_OPTIMIZERS.append(LeanAdamW)
    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=settings)
    make_lean(engine.optimizer)
    return engine


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer without compiling it. ZeRO imports it to ask whether the optimizer is one; ours
    never is.

    Its functions are wrapped with torch.compile, which imports torch's compiler: 1.8 s on every rank.
    """
    before = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module(_MUON)
    finally:
        compiler.compile = before
