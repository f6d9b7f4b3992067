"""The same bits from the same run on a GPU (``engine.deterministic``)."""

from __future__ import annotations

import logging
import os

import torch

from eve_ds.environment import launched_rank

WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS repeats its results (CUDA's documentation), and torch trusts it
_log = logging.getLogger(__name__)


def be_deterministic() -> None:
    """Let torch use operations that give the same bits each time, and raise RuntimeError at one that has no such form.
    Call it before CUDA starts. On the CPU the results stay as they are.

    Attention is then not cuDNN's, which torch leaves out by itself, but only if such operations are errors, not
    warnings; the backward passes of the others add up in a fixed order (pytorch#182551). Of ours, torch replaces
    ``index_add_`` and ``scatter_add_``; cumulative sums are of integers; no kernel uses atomics.
    """
    if (found := os.environ.get("CUBLAS_WORKSPACE_CONFIG")) not in WORKSPACES:
        if found is not None and launched_rank() == 0:
            _log.warning("CUBLAS_WORKSPACE_CONFIG=%s is replaced by %s: engine.deterministic", found, WORKSPACES[0])
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Else torch writes NaN into all memory that it takes: that shows faults, costs 15 % (NVIDIA/Megatron-LM#7093), and
    # changes no bit where nothing reads what was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
