"""Held-out metrics of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eve_ds.config import FinetuneConfig
from eve_ds.engine.callback import Callback
from eve_ds.engine.evaluation import EvaluationFeed, held_out_metrics
from eve_ds.engine.signals import StopRequest
from eve_ds.engine.trainer import Trainer
from eve_ds.errors import StopError
from tests.support.tiny import caption_batch, masked_task


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Any]:
    """What the metrics need of a trainer: a task, its engine and a device, in a group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    task = masked_task(router_z_loss_weight=0.1).eval()
    yield SimpleNamespace(engine=task, task=task, device=torch.device("cpu"), stop=StopRequest())
    dist.destroy_process_group()


def test_no_loss_is_told_of_no_batches(trainer: Any) -> None:
    assert held_out_metrics(trainer, []) == {}
    found = held_out_metrics(trainer, [caption_batch(2)])
    assert found["val/router_z_loss"] > 0  # a loss of the routers', as the auxiliary loss: not among those
    assert found["val/loss"] == pytest.approx(found["val/mim_loss"] + found["val/mlm_loss"])


def test_a_request_to_stop_is_met_between_two_batches(trainer: Any) -> None:
    seen: list[int] = []

    def batches() -> Iterator[Any]:
        for index in range(3):
            seen.append(index)
            trainer.stop.requested = index == 1
            yield caption_batch(2)

    with pytest.raises(StopError):
        held_out_metrics(trainer, batches())
    assert seen == [0, 1]
    feed = EvaluationFeed(FinetuneConfig(), trainer.device, trainer.stop)
    with pytest.raises(StopError):
        list(feed.together(batches()))
    assert seen == [0, 1, 0, 1]


def test_a_stop_in_what_a_callback_adds_to_an_evaluation_leaves_it_due() -> None:
    class Stops(Callback):
        def evaluating(self, trainer: Trainer, found: dict[str, float]) -> None:
            raise StopError

    run, recorded = Trainer.__new__(Trainer), []
    run.engine, run.step, run.nonfinite_streak = SimpleNamespace(eval=lambda: None), 3, 0
    run.evaluate, run.evaluation_due, run.stopped_early = lambda _: {"val/loss": 1.0}, True, False
    run._hooks = {"evaluating": [Stops().evaluating], "evaluation_end": [lambda _, record: recorded.append(record)]}
    run._evaluate()
    assert run.stopped_early and run.evaluation_due and recorded == []
