"""Environment variables that a process sets before it imports torch or DeepSpeed. Standard library only."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from eve_ds.kernels.extensions import extensions_folder, version

_log = logging.getLogger(__name__)


def prepare_environment() -> None:
    """Set the variables that DeepSpeed and torch read. Call it before deepspeed is imported and before the first tensor
    is made. A second call changes nothing.

    - TORCH_EXTENSIONS_DIR: the folder of compiled operations (``extensions_folder``). A value that is set is kept.
    - TORCH_FORCE_WEIGHTS_ONLY_LOAD=1: DeepSpeed calls torch.load with ``weights_only=False``, which can run code from
      the file; this forbids it. TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is removed with a message on stderr, because torch
      loads nothing when both are set.
    - DS_ACCELERATOR=cpu with a CPU build of torch: DeepSpeed then does not search for one and warn that it found none.
    - THP_MEM_ALLOC_ENABLE=1: torch allocates large CPU tensors in huge pages. Page faults on fresh memory cost more
      than elementwise arithmetic (measured: SiLU on 140 MB takes 77 ms with small pages, 36 ms with huge ones).
    - PATH: this environment's bin first, so that its ninja is found. Another version rebuilds compiled operations.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", ""):
        _log.warning("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is ignored: weights are loaded without running code")
    if version("torch").endswith("+cpu"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    programs = str(Path(sys.prefix) / "bin")
    path = [entry for entry in os.environ.get("PATH", os.defpath).split(os.pathsep) if entry != programs]
    os.environ["PATH"] = os.pathsep.join([programs, *path])
