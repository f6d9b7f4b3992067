"""Averages and masters change places, whole and in chunks. Under DeepSpeed: tests/support/matrix.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eve_ds.engine import averages
from eve_ds.engine.averages import Averages
from eve_ds.errors import StopError
from preprocessing.errors import UserError


def engine() -> Any:
    """With two groups of masters, as ZeRO 2 has them, one of them empty on this rank; ``seen``: what was written
    through to the model."""
    masters = [torch.nn.Parameter(torch.arange(7.0)), torch.nn.Parameter(torch.empty(0))]
    optimizer = SimpleNamespace(single_partition_of_fp32_groups=masters, seen=[])
    optimizer.update_lp_params = lambda: optimizer.seen.append(masters[0].tolist())
    return SimpleNamespace(optimizer=optimizer)


@pytest.mark.parametrize("chunk", [3, 2**24])
def test_averages_and_masters_change_places_and_back_bit_for_bit(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(averages, "CHUNK", chunk)
    run = engine()
    (weights, empty), found = run.optimizer.single_partition_of_fp32_groups, Averages(run)
    view = weights.data[2:4]  # as DeepSpeed has them of each parameter
    weights.data.div_(3)
    found.update(0.75)
    kept = weights.data.clone()
    average = torch.arange(7.0).lerp(kept, 0.25)
    assert torch.equal(found.values[0], average)
    with found.swapped_in():
        assert torch.equal(weights.data, average) and torch.equal(view, average[2:4])
    assert torch.equal(weights.data, kept) and torch.equal(view, kept[2:4]) and not empty.numel()
    assert torch.equal(found.values[0], average)
    assert run.optimizer.seen == [average.tolist(), kept.tolist()]


def test_a_stop_puts_the_weights_back_and_an_error_of_one_rank_waits_for_no_other() -> None:
    run = engine()
    found = Averages(run)
    run.optimizer.single_partition_of_fp32_groups[0].data.add_(1)
    for error, written in ((StopError, 2), (UserError, 1)):
        run.optimizer.seen.clear()
        with pytest.raises(error), found.swapped_in():
            raise error
        assert len(run.optimizer.seen) == written
