"""Held-out metrics of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eve_ds.engine.evaluation import held_out_metrics
from tests.support.tiny import caption_batch, masked_task


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Any]:
    """What the metrics need of a trainer: a task, its engine and a device, in a group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    task = masked_task().eval()
    yield SimpleNamespace(engine=task, task=task, device=torch.device("cpu"))
    dist.destroy_process_group()


def test_no_loss_is_told_of_no_batches(trainer: Any) -> None:
    assert held_out_metrics(trainer, []) == {}
    found = held_out_metrics(trainer, [caption_batch(2)])
    assert found["val/loss"] == pytest.approx(found["val/mim_loss"] + found["val/mlm_loss"])
