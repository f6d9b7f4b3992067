"""TensorBoard's files, read back with its own reader: names, images, a resume."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eve_ds.callbacks.metric_groups import grouped
from eve_ds.callbacks.tensorboard import TensorBoardLog
from preprocessing.errors import UserError


def train(folder: Path, start_step: int, stop: int, offset: float = 0.0, is_main: bool = True) -> None:
    trainer: Any = SimpleNamespace(output_dir=folder, is_main=is_main, start_step=start_step, step=start_step)
    callback = TensorBoardLog()
    callback.fit_start(trainer)
    for trainer.step in range(start_step + 1, stop):
        callback.step_end(trainer, {"step": trainer.step, "loss": trainer.step + offset, "lr": 0.5, "moe/x": 1.0})
        callback.images_made(trainer, {"moe/expert_load": np.zeros((4, 6, 3), dtype=np.uint8)})
    callback.evaluation_end(trainer, {"step": trainer.step, "val/loss": 3.0})
    callback.close(trainer)


@pytest.mark.parametrize(
    ("group", "keys"),
    [
        ("optim", ["lr", "grad_norm", "skipped_steps"]),
        ("perf", ["samples_per_second", "step_seconds"]),
        ("train", ["loss"]),
    ],
)
def test_metrics_have_groups(group: str, keys: list[str]) -> None:
    assert [grouped(key) for key in keys] == [f"{group}/{key}" for key in keys]


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def test_steps_after_the_checkpoint_are_dropped_when_a_run_resumes(tmp_path: Path) -> None:
    train(tmp_path, 0, 8)
    train(tmp_path, 4, 7, offset=100.0)
    found = read(tmp_path)
    assert set(found.Tags()["scalars"]) == {"train/loss", "optim/lr", "moe/x", "val/loss"}
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 105.0), (6, 106.0)]
    assert [event.step for event in found.Scalars("val/loss")] == [6]
    assert [(event.step, event.width, event.height) for event in found.Images("moe/expert_load")][-1] == (6, 6, 4)


def test_a_run_that_begins_anew_drops_all(tmp_path: Path) -> None:
    train(tmp_path, 0, 4)
    train(tmp_path, 0, 3, offset=100.0)
    assert [event.value for event in read(tmp_path).Scalars("train/loss")] == [101.0, 102.0]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    train(tmp_path, 0, 3, is_main=False)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^logging\.tensorboard=true needs the package tensorboard; pip install"):
        TensorBoardLog()
