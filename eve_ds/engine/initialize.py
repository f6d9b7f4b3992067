"""``deepspeed.initialize`` for a task that trains, without an import that takes a second and serves no run."""

from __future__ import annotations

import importlib
import os
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.optim import Optimizer

from eve_ds.tasks.base import Task

_NO_COMPILER = "TORCHDYNAMO_DISABLE"  # read whenever torch.compile is called
_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"


def initialize(task: Task, optimizer: Optimizer, settings: dict[str, Any]) -> DeepSpeedEngine:
    """The engine that trains ``task``. A collective.

    Args:
        task: as one rank holds it.
        optimizer: from ``build_optimizer``.
        settings: from ``load_deepspeed_config``.
    """
    _import_muon()
    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=settings)
    return engine


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer with torch.compile off: ZeRO compares ours with it, and no run uses it.

    Its functions are wrapped with torch.compile, which imports torch's inductor on every rank: a second and more.
    """
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        importlib.import_module(_MUON)
    finally:
        if before is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = before
