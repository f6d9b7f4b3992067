"""What ``engine.micro_batch_size: auto`` comes to."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eve_ds import config as config_tree
from eve_ds.config import PretrainConfig, parse
from eve_ds.config_sections import EngineConfig
from eve_ds.engine.deepspeed_config import batch_shape
from eve_ds.engine.memory_gauge import host_memory
from eve_ds.plan import auto, figures
from eve_ds.plan.__main__ import PretrainPlan
from eve_ds.plan.forecast import memory_forecast
from eve_ds.plan.memory import Rehearsal
from eve_ds.tasks.masked_modeling import ObjectiveConfig
from preprocessing.errors import UserError
from tests.support.tiny import model_config

CPU, ANSWERS, SHARE = torch.device("cpu"), 7, 24
LIGHT = ObjectiveConfig(decoder_dim=32, decoder_depth=1, decoder_heads=4)


def run_config(**changes: Any) -> PretrainConfig:
    engine = EngineConfig(global_batch_size=SHARE, micro_batch_size="auto", precision="fp32")
    model = model_config(depth=2, soft_layers=[1])
    return dataclasses.replace(PretrainConfig(model=model, objective=LIGHT, engine=engine), **changes)


def with_rows(rows: int) -> int:
    config = run_config()
    config.engine.micro_batch_size = rows
    return memory_forecast(config, ANSWERS, CPU)


@pytest.mark.parametrize("rows", [1, 6, 24])
def test_the_largest_that_fits_is_taken_and_told(
    rows: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With just the memory that a run of so many rows is forecast to take, and a byte less than those."""
    monkeypatch.setattr(auto, "_free", lambda device: with_rows(rows))
    config = run_config()
    with caplog.at_level(logging.INFO, logger=auto.__name__):
        auto.settle_micro_batch_size(config, ANSWERS, CPU)
    assert config.engine.micro_batch_size == rows
    assert f"auto: {rows} of a rank's 24 samples a step; forecast" in caplog.text and len(caplog.messages) == 1
    monkeypatch.setattr(auto, "_free", lambda device: with_rows(rows) - 1)
    config = run_config()
    if rows == 1:
        with pytest.raises(UserError, match=r"the least takes .* by the forecast, and a rank may take .*; set --model"):
            auto.settle_micro_batch_size(config, ANSWERS, CPU)
    else:
        auto.settle_micro_batch_size(config, ANSWERS, CPU)
        assert config.engine.micro_batch_size == {6: 4, 24: 12}[rows]


def test_a_whole_share_may_fit_where_a_part_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of one micro-batch keeps no accumulated gradients; of a large model these are more than activations."""
    shape = model_config(dim=256, mlp_hidden=1024, num_experts=8)
    large = run_config(model=shape, deepspeed_config="ds_configs/zero1.json")
    large.engine.global_batch_size = 4
    peaks = []
    for rows in (1, 2, 4):
        given_rows = dataclasses.replace(large, engine=dataclasses.replace(large.engine, micro_batch_size=rows))
        peaks.append(memory_forecast(given_rows, ANSWERS, CPU))
    assert peaks[2] < peaks[0] < peaks[1]
    monkeypatch.setattr(auto, "_free", lambda device: peaks[2])
    auto.settle_micro_batch_size(large, ANSWERS, CPU)
    assert large.engine.micro_batch_size == 4


def test_the_longest_text_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_free", lambda device: with_rows(24))
    longer = run_config(model=model_config(depth=2, soft_layers=[1], max_text_length=24, text_positions=24))
    auto.settle_micro_batch_size(longer, ANSWERS, CPU)
    assert longer.engine.micro_batch_size == 12


def test_a_number_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(auto, "_free")  # is not asked for
    for given_size in (5, None):
        config = run_config(engine=EngineConfig(global_batch_size=SHARE, micro_batch_size=given_size))
        auto.settle_micro_batch_size(config, ANSWERS, CPU)
        assert config.engine.micro_batch_size == given_size


def test_before_it_is_settled_there_is_no_shape() -> None:
    with pytest.raises(ValueError, match="not settled"):
        batch_shape(run_config().engine, 1)


@pytest.mark.parametrize(("stored", "expected"), [(6, 6), (9, 8), (48, 24), ("auto", 24), (0, 24), (True, 24)])
def test_a_run_goes_on_with_the_number_it_began_with(
    stored: Any, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does a branch of it; 9 does not divide the share of other ranks."""
    monkeypatch.setattr(auto, "_free", lambda device: 2**40)
    begun = run_config(engine=EngineConfig(micro_batch_size=stored))
    config_tree.save(begun, tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").touch()
    for place in ({"output_dir": str(tmp_path)}, {"output_dir": "new", "resume_from": str(tmp_path)}):
        resumed = run_config(**place)
        auto.settle_micro_batch_size(resumed, ANSWERS, CPU)
        assert resumed.engine.micro_batch_size == expected


def test_a_task_that_cannot_be_forecast_asks_for_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*_: Any) -> int:
        raise NotImplementedError("meta_batch")

    monkeypatch.setattr(auto, "Rehearsal", lacks)
    with pytest.raises(UserError, match=r"no forecast of pretrain \(NotImplementedError: meta_batch\); give a number"):
        auto.settle_micro_batch_size(run_config(), ANSWERS, CPU)


def test_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free, total = host_memory()
    assert 0 < free < total
    monkeypatch.setattr(auto, "host_memory", lambda: (800, 1000))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert auto._free(CPU) == auto.OF_HOST * 800 / 4


@given(st.integers(1, 4096), st.integers(0, 5000))
def test_the_last_divisor_that_fits(share: int, limit: int) -> None:
    sizes = auto.divisors(share)
    assert all(share % size == 0 for size in sizes) and sizes == sorted(sizes) and sizes[-1] == share
    expected = max((size for size in sizes if size + 7 <= limit), default=0)
    assert auto.last_that_fits(sizes, lambda size: size + 7, limit) == expected


def test_the_plan_takes_what_a_run_on_such_a_device_would(repository: Path) -> None:
    recipe = str(repository / "eve_ds/configs/tiny_shapes.yaml")
    argv = ["--config", recipe, "--world_size", "2", "--device", "cpu", "--micro_batch_size", "auto"]
    taken = {}
    for memory in ("48MiB", "64GiB"):
        options = parse(PretrainPlan, [*argv, "--device_memory", memory], "plan")
        config, zero, batch, limit = figures._prepared(options)
        rows, forecast = auto.largest_micro_batch(config, ANSWERS, 2, False, int(auto.OF_HOST * limit))
        assert batch.rows == rows == config.engine.micro_batch_size and forecast <= auto.OF_HOST * limit
        assert figures._run(config, zero, batch, options)["micro_batch_size_is_auto"]
        taken[memory] = rows
    assert 1 < taken["48MiB"] < taken["64GiB"] == 64


@pytest.mark.parametrize(("recipe", "rows"), [("pretrain_base", 256), ("pretrain_large", 128)])
def test_recipes_fit_80_gib_and_any_number_of_nodes(recipe: str, rows: int) -> None:
    config = parse(PretrainPlan, ["--config", recipe], "plan")
    for world in (8, 16, 32, 64, 128, 256):
        assert batch_shape(config.engine, world)[0] == min(rows, 2048 // world)
    resolved, zero, batch, limit = figures._prepared(config)
    assert (batch.rows, zero.stage, zero.ep_size, limit) == (rows, 1, 1, 76 * 2**30)
    assert Rehearsal(resolved, zero, ANSWERS, on_gpu=True).memory(batch).peak < auto.OF_GPU * limit
