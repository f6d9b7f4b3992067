"""In which numbers a run computes: bf16 where the device multiplies such matrices by itself, else fp32."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch

from eve_ds.config import EngineConfig, FinetuneConfig, PretrainConfig
from eve_ds.engine.agreement import decide, gather
from eve_ds.engine.run_folder import holds_run
from eve_ds.weights.model_folder import run_of, stored_setting

Precision = Literal["bf16", "fp32"]
_log = logging.getLogger(__name__)


def multiplies_bf16(device: str) -> bool:
    """Whether products of bf16 matrices run in the device's own instructions, or in emulation that is about as quick.

    A GPU needs compute capability 8.0 (A100). A CPU needs AVX-512, with which oneDNN takes them; on others torch walks
    through them in a plain loop (seen on an AMD EPYC with AVX2: 1 to 20 GFLOP/s, where fp32 reaches 140).

    Args:
        device: "cuda" or "cpu".
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def best_precision(device: str | None = None) -> Precision:
    """What ``engine.precision: auto`` means on ``device``; by default where ranks run: GPUs if there are any."""
    return "bf16" if multiplies_bf16(device or ("cuda" if torch.cuda.is_available() else "cpu")) else "fp32"


def precision_of(engine: EngineConfig) -> Precision:
    """``engine.precision``, and for auto what it means here."""
    return best_precision() if engine.precision == "auto" else engine.precision


def settle_precision(config: PretrainConfig | FinetuneConfig, rank: int) -> None:
    """Put bf16 or fp32 in the place of ``engine.precision: auto``: that of the run in ``output_dir``, if it holds one,
    or of the run that this one branches from.

    A run goes on in the numbers that it began with, whatever machine it is moved to. A new one takes bf16 if it is
    quick on the devices of all ranks. Rank 0 warns of bf16 that was asked for where it is slow. Called by all ranks.
    """
    if config.engine.precision == "auto":
        run = Path(config.resume_from or "")
        folders = [Path(config.output_dir or "."), *([run_of(run) or run] if config.resume_from else [])]
        stored: Precision | None = decide(lambda: next(filter(None, map(_stored, folders)), None))
        config.engine.precision = stored or _best_of_all_ranks()
    if rank == 0 and config.engine.precision == "bf16" and best_precision() == "fp32":
        _log.warning(
            "engine.precision=bf16: this device has no products of bf16 matrices, which run many times slower than "
            "those of fp32; --engine.precision auto takes what is quick"
        )


def _best_of_all_ranks() -> Precision:
    return "fp32" if "fp32" in gather(best_precision()) else "bf16"


def _stored(folder: Path) -> Precision | None:
    if not holds_run(folder):
        return None
    stored = stored_setting(folder, "engine", "precision")  # of a config that cannot be read run_folder.claim tells
    return stored if stored in ("bf16", "fp32") else None
