"""The learning rate as a pure function of the step: nothing to store or resume."""

from __future__ import annotations

import math

from eve_ds.config_sections import OptimizerConfig


def lr_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate for optimizer step ``step`` (the first is 0).

    Rises linearly over ``warmup * total_steps`` steps, then falls to ``min_lr_ratio`` along a cosine or a line.
    """
    warmup = round(config.warmup * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape
