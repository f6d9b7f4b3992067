"""DeepSpeed JSON file -> the dict for ``deepspeed.initialize``: "auto" filled in, known-wrong settings refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eve_ds.config import EngineConfig, OptimizerConfig
from eve_ds.engine.precision import precision_of
from eve_ds.errors import UserError


def batch_shape(engine: EngineConfig, world_size: int) -> tuple[int, int]:
    """(micro batch size, gradient accumulation steps) of each rank.

    Raises:
        UserError: the global batch cannot be made of equal micro-batches on all ranks.
    """
    total = engine.global_batch_size
    if total < 1 or total % world_size:
        raise UserError(f"engine.global_batch_size={total} is not a positive multiple of the world size {world_size}")
    share = total // world_size
    micro = min(share, engine.micro_batch_size) if engine.micro_batch_size is not None else share
    if micro < 1 or share % micro:
        raise UserError(
            f"engine.micro_batch_size={micro} does not divide a rank's share {share} of global_batch_size={total} "
            f"over {world_size} ranks"
        )
    return micro, share // micro


def load_deepspeed_config(
    path: str, engine: EngineConfig, optimizer: OptimizerConfig, world_size: int
) -> dict[str, Any]:
    """Read ``path`` and fill in its "auto" values from our tree.

    A value that stands there in full must agree with the tree: one place decides, and a difference is an error.

    Raises:
        UserError: unreadable file, a value that disagrees, a setting that trains wrongly in silence (``refuse``).
    """
    file = Path(path)
    if not file.is_file() and not file.is_absolute():
        file = Path(__file__).parents[2] / path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--deepspeed_config {path}: {error.strerror}; see ds_configs/ for those that come with EVE-DS"
        ) from error
    except ValueError as error:
        raise UserError(f"--deepspeed_config {path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("zero_optimization", {}), dict):
        raise UserError(f"--deepspeed_config {path}: must be a JSON object, and zero_optimization in it, too")
    micro, accumulation = batch_shape(engine, world_size)
    ours = {
        "train_batch_size": engine.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.gradient_clipping,
        "bf16": {"enabled": precision_of(engine) == "bf16"},
    }
    filled = _fill(raw, ours, path)
    filled.setdefault("zero_allow_untested_optimizer", True)
    filled.setdefault("zero_force_ds_cpu_optimizer", False)  # ours takes host memory, too, and needs no compiler
    filled.setdefault("steps_per_print", 10**9)
    refuse(filled, path)
    return filled


def _fill(raw: dict[str, Any], ours: dict[str, Any], path: str, prefix: str = "") -> dict[str, Any]:
    filled = dict(raw)
    for key, value in ours.items():
        given = raw.get(key, "auto")
        if isinstance(value, dict):
            filled[key] = _fill(given if isinstance(given, dict) else {}, value, path, f"{prefix}{key}.")
        elif given == "auto":
            filled[key] = value
        elif given != value:
            raise UserError(
                f'--deepspeed_config {path}: {prefix}{key}={given} but the config gives {value}; write "auto" there'
            )
    left = [f"{prefix}{key}" for key, value in filled.items() if value == "auto"]
    if left:
        raise UserError(
            f'--deepspeed_config {path}: nothing fills in "auto" for {left[0]}; write a value or leave it out'
        )
    return filled


def refuse(config: dict[str, Any], path: str) -> None:
    """Raise UserError for what DeepSpeed 0.19.8 accepts and gets wrong with experts, or asserts on (FACTS.md)."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    reasons = {
        "zero_optimization.stage=0: with experts its clipping norm is wrong (DeepSpeed#8475); use stage 1": stage == 0,
        "zero_optimization.stage must be 1, 2 or 3": stage not in (0, 1, 2, 3),
        "zero_optimization.contiguous_gradients=false: gradients are silently wrong; use true": not zero.get(
            "contiguous_gradients", True
        ),
        "zero_optimization.reduce_scatter=false: DeepSpeed asserts with experts; use true": not zero.get(
            "reduce_scatter", True
        ),
        "zero_optimization.zero_hpz_partition_size: DeepSpeed asserts with experts; leave it out": zero.get(
            "zero_hpz_partition_size", 1
        )
        > 1,
        "optimizer: the engine makes its own (config section optimizer); leave it out": "optimizer" in config,
        "scheduler: the engine has its own (optimizer.schedule); leave it out": "scheduler" in config,
        "fp16: overflow steps would break exact resume; use bf16": config.get("fp16", {}).get("enabled", False),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"--deepspeed_config {path}: {reason}")
