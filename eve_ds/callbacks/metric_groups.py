"""The groups of metrics on dashboards. In ``metrics.jsonl`` the keys of the first versions have no group."""

from __future__ import annotations

AXIS = "step"
OTHERS = "train"  # losses and scores of a task
GROUPS = {
    "lr": "optim",
    "grad_norm": "optim",
    "skipped_steps": "optim",
    "samples_per_second": "perf",
    "step_seconds": "perf",
}


def grouped(key: str) -> str:
    """``loss`` -> ``train/loss``; a key that names its group (``val/loss``), and the axis, stay as they are."""
    return key if "/" in key or key == AXIS else f"{GROUPS.get(key, OTHERS)}/{key}"
