"""The trainer's view of DeepSpeed's loss scaler."""

from __future__ import annotations

from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

from eve_ds.engine.loss_scale import can_fall, keep_settings, scale_of

SETTINGS = {"init_scale": 8.0, "scale_window": 100, "min_scale": 2, "delayed_shift": 1, "consecutive_hysteresis": False}


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's scaler asks for the rank before it logs; there is no process group here."""
    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 1)


def engine(dtype: torch.dtype = torch.half, **changes: float) -> SimpleNamespace:
    scaler = CreateLossScaler(dtype, 1.0, dtype == torch.half, {**SETTINGS, **changes})
    return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))


def test_a_scale_at_its_least_stays_there_and_excuses_no_overflow() -> None:
    run, seen = engine(), []
    for _ in range(4):
        seen.append((scale_of(run), can_fall(run)))
        run.optimizer.loss_scaler.update_scale(True)  # at its least, DeepSpeed itself would raise
    assert seen == [(8.0, True), (4.0, True), (2.0, False), (2.0, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_have_none(dtype: torch.dtype) -> None:
    run = engine(dtype)
    assert scale_of(run) is None and not can_fall(run)
    keep_settings(run, run.optimizer.loss_scaler)


def test_an_optimizer_without_a_scaler_has_none() -> None:
    assert scale_of(SimpleNamespace(optimizer=SimpleNamespace())) is None


def test_a_resumed_run_has_the_files_settings_and_the_checkpoints_scale() -> None:
    own, run = engine(scale_window=7, min_scale=1, delayed_shift=3, consecutive_hysteresis=True), engine()
    run.optimizer.loss_scaler.update_scale(True)
    keep_settings(run, own.optimizer.loss_scaler)
    scaler = run.optimizer.loss_scaler
    assert (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter) == (4.0, 1, 0)
    settings = (scaler.scale_window, scaler.min_scale, scaler.delayed_shift, scaler.consecutive_hysteresis)
    assert settings == (7, 1, 3, True)
