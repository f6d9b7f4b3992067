"""The learning rate as a pure function of the step, and of where a cooldown began: nothing else to store or resume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from eve_ds.config_sections import OptimizerConfig
from preprocessing.errors import UserError

NOTED = 0.05  # of the peak: a smaller jump of the learning rate is not worth a line


class Cooldown(NamedTuple):
    """Where schedule ``cooldown`` begins: its first step, and the share of the peak learning rate there."""

    step: int
    factor: float


def lr_factor(step: int, total_steps: int, config: OptimizerConfig, cooldown: Cooldown | None = None) -> float:
    """Share of the peak learning rate for optimizer step ``step`` (the first is 0).

    Rises linearly over the ``warmup_steps``, then falls to ``min_lr_ratio`` along a cosine or a line; with ``wsd`` it
    stays at the peak until the last ``decay * total_steps`` steps, over which it falls as 1 - sqrt(t), t from 0 to 1,
    which Hägele et al. (arXiv 2405.18392) found best. ``cooldown`` falls likewise, from where it began to the end.
    """
    if config.schedule == "cooldown":
        if cooldown is None:
            raise ValueError("schedule cooldown without where it began")
        return _fallen(_one_minus_sqrt(step, cooldown.step, total_steps), cooldown.factor, config.min_lr_ratio)
    warmup = config.warmup_steps(total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        start = max(warmup, total_steps - round(config.wsd_decay * total_steps))  # both may have been rounded up
        return _fallen(_one_minus_sqrt(step, start, total_steps), 1.0, config.min_lr_ratio)
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def check_steps(total_steps: int, config: OptimizerConfig) -> None:
    """Raise UserError if a run of so many steps has none over which ``wsd`` falls, or ends in its warm-up.

    If it has one, it also has a step at the peak, since warm-up and decay are at most the whole run.
    """
    fall = round(config.wsd_decay * total_steps) if config.schedule == "wsd" else 1
    if not fall:
        raise UserError(
            f"optimizer.schedule wsd: decay={config.wsd_decay} of {total_steps} steps is no step; train longer, raise "
            "it, or take schedule constant"
        )
    if config.warmup >= 1 and config.schedule != "cooldown" and config.warmup + fall > total_steps:
        raise UserError(
            f"optimizer.warmup={config.warmup:g} steps leave none at the peak learning rate: the run has {total_steps}"
            f"{f', {fall} of them decay' if config.schedule == 'wsd' else ''}; lower it, or write a share below 1"
        )


def _one_minus_sqrt(step: int, start: int, end: int) -> float:
    """1 until ``start``, 0 from ``end`` on."""
    return 1 - math.sqrt(min(1.0, max(0, step - start) / max(1, end - start)))


def _fallen(shape: float, first: float, last: float) -> float:
    return first if shape == 1 else last + (first - last) * shape


def stored(factor: float, total_steps: int, config: OptimizerConfig, cooldown: Cooldown | None) -> dict[str, Any]:
    """What a checkpoint keeps of the schedule: the ``factor`` of its last step, and what that was a share of."""
    kept: dict[str, Any] = {"factor": factor, "peak": config.lr, "total_steps": total_steps}
    return kept | ({"cooldown": list(cooldown)} if cooldown else {})


def cooldown_of(state: Mapping[str, Any], step: int, config: OptimizerConfig, own: bool) -> Cooldown | None:
    """Where the cooldown of a run begins that goes on from a checkpoint; None with another schedule.

    Args:
        state: what ``stored`` gave when it was saved; empty in older checkpoints.
        step: of the checkpoint.
        config: of this run.
        own: the checkpoint is this run's own; else the run branches from it, and its cooldown begins there.
    Raises:
        UserError: the checkpoint does not tell its learning rate, or there is nothing to fall from.
    """
    if config.schedule != "cooldown":
        return None
    if own and "cooldown" in state:
        first, factor = state["cooldown"]
        return Cooldown(int(first), float(factor))
    if "factor" not in state:
        raise UserError(
            "optimizer.schedule cooldown: the checkpoint is of a version that did not store its learning rate; go on "
            "with that run until it saves again, or take schedule linear"
        )
    peak, factor = float(state["peak"]), float(state["factor"])
    factor = factor if peak == config.lr else factor * peak / config.lr
    if factor <= config.min_lr_ratio:
        raise UserError(
            f"optimizer.schedule cooldown: the learning rate at step {step} is {factor * config.lr:g}, not above that "
            f"of the end ({config.min_lr_ratio * config.lr:g}); branch from an earlier checkpoint"
        )
    return Cooldown(step, factor)


def jump(state: Mapping[str, Any], factor: float, total_steps: int, config: OptimizerConfig) -> str | None:
    """One line where the learning rate does not go on from that of the checkpoint, whose ``stored`` is ``state``.

    Args:
        factor: of the next step.
    """
    if "factor" not in state or state["total_steps"] == total_steps:
        return None
    before, after = float(state["factor"]) * float(state["peak"]), factor * config.lr
    if abs(after - before) <= NOTED * config.lr:
        return None
    return (
        f"the learning rate goes from {before:.3g} to {after:.3g}, since the schedule is along {total_steps} steps now "
        f"and was along {state['total_steps']}; how to go on without a jump: docs/optimization.md"
    )
