"""Two models' mean scores compared by the paired bootstrap."""

from __future__ import annotations

import numpy as np

from evaluation.bootstrap import PAIRED_DRAWS, Parts, paired
from evaluation.significance import Interval


def difference(
    first: np.ndarray, second: np.ndarray, cluster: np.ndarray | None = None, draws: int = PAIRED_DRAWS, seed: int = 0
) -> Interval:
    """``bootstrap.paired`` of the means of scores [N]; ``cluster`` [N] from 0, None: each example by itself."""
    own = np.arange(len(first)) if cluster is None else cluster
    parts = [Parts({"mean": (values, own)}, int(own.max()) + 1) for values in (first, second)]
    return paired(*parts, draws=draws, seed=seed)["mean"]
