"""Detects a loss that has left its recent range by far, while it is still finite.

The recent range is described by the losses of the last `RECENT` steps: their median, their spread (1.4826 times the
median absolute deviation, which is the standard deviation for a normal distribution; at least 1 % of the median) and
their largest. Every rank has the same losses, so every rank comes to the same result without communication.

The thresholds are far from what healthy runs do: in 83 runs of the demo's and other recipes (44,846 steps), no loss
above median + 1.5 * (largest - median) had a z-score beyond 4.3, and no level exceeded the largest loss.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

# Steps whose loss was far out of its range (kind "loss") or that were not finite, with the indices of their samples.
SUSPECTS = "suspects.jsonl"
NOT_FINITE = "not finite"
RECENT = 100  # steps that form the range
LEAST = 30  # steps needed before anything is reported
LEVEL = 10  # steps whose median is the level
SPIKE_Z, SPIKE_REACH = 8.0, 2.0  # least z-score, and least (loss - median) / (largest - median), of a spike
LEVEL_Z = 5.0


@dataclass(frozen=True)
class Departure:
    """A loss, or the level of the losses, that is far above its range.

    Attributes:
        loss: of the step; for a lasting departure, the median of the last ``LEVEL`` steps.
        median, largest: of the range.
        z: robust z-score, (loss - median) / spread.
        lasting: whether it is the level rather than a single loss.
    """

    loss: float
    median: float
    largest: float
    z: float
    lasting: bool

    def __str__(self) -> str:
        what = f"has been around {self.loss:.4g} for {LEVEL} steps" if self.lasting else f"is {self.loss:.4g}"
        where = f"median {self.median:.4g}, largest {self.largest:.4g} of the {RECENT} steps before"
        return f"the loss {what}, far out of its recent range ({where}; robust z-score {self.z:.0f})"


def add_suspect(folder: Path, step: int, kind: str, samples: Sequence[int], details: Mapping[str, Any]) -> str:
    """Append a step to ``folder/suspects.jsonl``. Returns its samples in words, for the log."""
    path = folder / SUSPECTS
    line = json.dumps({"step": step, "kind": kind, **details, "samples": list(samples)})
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
    return f"its samples are {shown} (all {len(samples)}: {path})"


def not_finite(means: Mapping[str, float], rank_losses: Sequence[float]) -> dict[str, Any]:
    """What a line of a step that is not finite says of it.

    Args:
        means: the step's loss and metrics, over all ranks.
        rank_losses: each rank's share of the loss, summed over its micro-batches.
    Returns:
        not_finite: the losses and metrics that are not, or "gradient" if all of them are finite; rank_losses: with
        null, as JSON has it, for those that are not finite.
    """
    names = sorted(name for name, value in means.items() if not math.isfinite(value))
    shares = [share if math.isfinite(share) else None for share in rank_losses]
    return {"not_finite": names or ["gradient"], "rank_losses": shares}


class LossRange:
    """The losses of the last steps.

    Args:
        stored: what ``state`` returned in the run that is resumed, so that nothing is reported twice or missed.
    """

    def __init__(self, stored: Mapping[str, Any] | None = None) -> None:
        stored = stored or {}
        self._losses: deque[float] = deque(stored.get("losses", ()), maxlen=RECENT + LEVEL)
        self._silent = int(stored.get("silent", 0))  # steps until a lasting departure may be reported again

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"losses": list(self._losses), "silent": self._silent}

    def add(self, loss: float) -> Departure | None:
        """Add a step's loss. Returns its departure from the range, if any. Non-finite losses are ignored here."""
        if not math.isfinite(loss):
            return None
        before = list(islice(self._losses, max(0, len(self._losses) - RECENT), None))
        self._losses.append(loss)
        self._silent = max(0, self._silent - 1)
        if found := _departure(loss, before, SPIKE_Z, SPIKE_REACH, lasting=False):
            return found
        level = sorted(islice(self._losses, max(0, len(self._losses) - LEVEL), None))[LEVEL // 2 :]
        if self._silent or not level:
            return None
        found = _departure(level[0], list(self._losses)[:-LEVEL], LEVEL_Z, 1.0, lasting=True)
        if found:
            self._silent = RECENT
        return found


def _departure(value: float, before: list[float], least_z: float, reach: float, lasting: bool) -> Departure | None:
    if len(before) < LEAST or value <= (largest := max(before)):
        return None
    middle = median(before)
    spread = max(1.4826 * median(abs(loss - middle) for loss in before), 0.01 * abs(middle), 1e-12)
    z = (value - middle) / spread
    if z <= least_z or value <= middle + reach * (largest - middle):
        return None
    return Departure(value, middle, largest, z, lasting)
