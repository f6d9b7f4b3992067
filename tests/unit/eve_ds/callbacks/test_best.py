"""Which metric of which evaluations a run can follow. What it does with it: tests/e2e/test_best.py."""

from __future__ import annotations

import math

import pytest

from eve_ds.callbacks import standard_callbacks
from eve_ds.callbacks.best import Best
from eve_ds.config import FinetuneConfig, parse
from preprocessing.errors import UserError

OPTIONS = ["--config", "vqa", "--init_from", "null"]


def follow(*options: str) -> Best | None:
    config = parse(FinetuneConfig, [*OPTIONS, *options], "test")
    return next((found for found in standard_callbacks(config) if isinstance(found, Best)), None)


def test_losses_are_best_when_small_and_all_else_when_large() -> None:
    modes = {
        ("val/itc_loss",): "min",
        ("val/accuracy",): "max",
        ("val/perplexity", "--checkpoint.best_mode", "min"): "min",
    }
    for words, mode in modes.items():
        found = follow("--checkpoint.best", *words)
        assert found is not None and found.mode == mode
    assert follow() is None
    assert follow("--checkpoint.best", "val/accuracy", "--evaluate", "true", "--data.val_split", "null") is None


def test_a_run_whose_evaluations_cannot_find_the_metric_is_refused() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.best=val/loss: data\.val_split=null leaves nothing to evaluate"):
        follow("--checkpoint.best", "val/loss", "--data.val_split", "null")
    with pytest.raises(UserError, match=r"checkpoint\.best=val_ema/loss is of the averages.*optimizer\.ema 0\.9999"):
        follow("--checkpoint.best", "val_ema/loss")
    assert follow("--checkpoint.best", "val_ema/loss", "--optimizer.ema", "0.9") is not None


def test_values_of_another_validation_set_are_not_compared() -> None:
    before, same, other = (
        follow("--checkpoint.best", "val/accuracy", "--logging.eval_samples", samples) for samples in ("8", "8", "9")
    )
    assert before is not None and same is not None and other is not None
    before.step, before.value, before.waited = 7, 0.1 + 0.2, 1
    for found in (same, other):
        found.load_state_dict(before.state_dict())
    assert same.record == {"metric": "val/accuracy", "mode": "max", "value": 0.1 + 0.2, "step": 7} and same.waited == 1
    assert not other.known and math.isnan(other.value) and other.waited == 0
