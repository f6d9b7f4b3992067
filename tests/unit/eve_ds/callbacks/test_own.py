"""Callbacks named by import path."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from eve_ds.callbacks import MetricsFile, Progress, own_callbacks, standard_callbacks
from eve_ds.callbacks.ema import EMA
from eve_ds.callbacks.start_record import Provenance
from eve_ds.config import FinetuneConfig, PretrainConfig, parse
from eve_ds.engine.callback import Callback
from preprocessing.errors import UserError

MODULE = """
from eve_ds.engine.callback import Callback

class Plain(Callback):
    pass

class Needy(Callback):
    def __init__(self, steps):
        self.steps = steps

named = Needy(3)
number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_callbacks_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def test_classes_and_instances_follow_the_built_in_ones() -> None:
    paths = "[own_callbacks_of_a_test:Plain, own_callbacks_of_a_test:named]"
    options = ["--logging.callbacks", paths, "--logging.wandb=false", "--logging.detail_every=0"]
    for root in (PretrainConfig, FinetuneConfig):
        config = parse(root, options, "test")  # type: ignore[type-var]
        provenance, metrics, progress, plain, named = standard_callbacks(config)
        assert isinstance(provenance, Provenance)
        assert isinstance(metrics, MetricsFile) and isinstance(progress, Progress)
        assert isinstance(plain, Callback) and named.steps == 3  # type: ignore[attr-defined]
    assert own_callbacks([]) == [] == PretrainConfig().logging.callbacks


def test_averages_come_before_what_writes_records_and_are_kept_in_a_dry_run() -> None:
    options = ["--optimizer.ema=0.5", "--logging.wandb=false", "--logging.detail_every=0"]
    _, ema, metrics, _ = standard_callbacks(parse(PretrainConfig, options, "test"))
    assert isinstance(ema, EMA) and ema.decay == 0.5 and isinstance(metrics, MetricsFile)
    (alone,) = standard_callbacks(parse(PretrainConfig, [*options, "--dry_run"], "test"))
    assert isinstance(alone, EMA)
    assert standard_callbacks(parse(PretrainConfig, [*options[1:], "--dry_run"], "test")) == []


@pytest.mark.parametrize(
    ("root", "options", "told"),
    [
        (PretrainConfig, ["--data.val_split=val"], None),
        (PretrainConfig, ["--data.val_split=null"], "there are no held-out images; name them by data.val_split"),
        (FinetuneConfig, ["--data.val_split=val"], "fine-tuning rebuilds no images"),
    ],
)
def test_images_that_nobody_makes_are_told(
    root: Any, options: list[str], told: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("eve_ds"), "propagate", True)
    standard_callbacks(parse(root, options, "test"))
    config = parse(root, [*options, "--logging.images_every=5"], "test")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        standard_callbacks(config)
    assert caplog.messages == ([f"logging.images_every=5 shows nothing: {told}"] if told else [])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", "own_callbacks_of_a_test has no absent"),
        ("number", "is no callback; name a subclass of"),
        ("Needy", "missing 1 required positional argument: 'steps'; give its arguments defaults, or name"),
    ],
)
def test_what_is_no_callback_is_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=f"^--logging.callbacks own_callbacks_of_a_test:{name}: .*{words}"):
        own_callbacks([f"own_callbacks_of_a_test:{name}"])
