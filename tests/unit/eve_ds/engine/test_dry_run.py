"""What a dry run says: parameters of all ranks, where weights come from, when it ends; what would be scored."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.engine import dry_run
from eve_ds.model.moe import MoE
from tests.support.tiny_tasks import tiny_task


def test_experts_of_other_ranks_and_divided_weights_count() -> None:
    task = tiny_task("pretrain")
    whole = sum(parameter.numel() for parameter in task.parameters())
    assert dry_run.parameters(task) == whole
    spread = tiny_task("pretrain", moe_layer=functools.partial(MoE, ep_size=2))
    assert sum(parameter.numel() for parameter in spread.parameters()) < whole == dry_run.parameters(spread)
    for parameter in spread.parameters():  # as ZeRO 3 leaves them
        parameter.ds_numel = parameter.numel()  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert dry_run.parameters(spread) == whole


def test_an_end_beyond_the_calendar_is_told() -> None:
    assert dry_run._date(0)[:2] == "20"
    assert all(dry_run._date(seconds) == "after the year 9999" for seconds in (1e12, 1e15, float("inf")))


def test_the_source_of_the_weights_is_told() -> None:
    config = PretrainConfig()
    assert dry_run._beginning(config, None) == (0, "from initial values")
    assert dry_run._beginning(replace(config, init_from="beit.pth"), None) == (0, "from beit.pth")


def test_a_dry_run_of_scoring_says_what_is_scored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Scored:
        split, rows = SimpleNamespace(name="test"), 7

        def __len__(self) -> int:
            return 21

    scored: Any = Scored()
    monkeypatch.setattr(logging.getLogger("eve_ds"), "propagate", True)
    caplog.set_level(logging.INFO, "eve_ds")
    task = tiny_task("nlvr_plain")
    config = FinetuneConfig(task="nlvr", output_dir="/runs/a", init_from="/runs/b")
    assert dry_run.describe_scoring(config, task, scored) == 0
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "dry run: all is in order, nothing was written",
        "  score nlvr on 1 rank(s), fp32",
        "  data    test: 7 rows, 21 samples",
        f"  model   {dry_run.parameters(task):,} parameters, from /runs/b",
        "  output  /runs/a",
    ]
