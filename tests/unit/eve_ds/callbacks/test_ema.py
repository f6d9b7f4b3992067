"""When the moving average is updated, and how much of it a step keeps. Its values: tests/support/matrix.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eve_ds.callbacks.ema import EMA


def test_a_step_that_changed_no_weight_does_not_count_and_early_averages_forget() -> None:
    weights = torch.nn.Parameter(torch.zeros(1))
    optimizer = SimpleNamespace(single_partition_of_fp32_groups=[weights])
    engine = SimpleNamespace(optimizer=optimizer, was_step_applied=lambda: applied)
    trainer: Any = SimpleNamespace(engine=engine)
    ema, average, updates = EMA(decay=0.3), 0.0, 0
    for step, applied in enumerate((True, False, True, True, True, True)):
        ema.step_start(trainer)
        weights.data.fill_(step + 1)
        ema.step_end(trainer, {})
        if applied:
            updates += 1
            keep = min(0.3, (1 + updates) / (10 + updates))  # 2/11, 3/12, 4/13 is above 0.3
            average = keep * average + (1 - keep) * (step + 1)
        assert ema._averages is not None and float(ema._averages.values[0]) == pytest.approx(average, rel=1e-6)
    other = EMA(decay=0.3)
    other.load_state_dict(ema.state_dict())
    assert other.updates == updates == 5
    assert EMA(0.9).rank_files() == {}
