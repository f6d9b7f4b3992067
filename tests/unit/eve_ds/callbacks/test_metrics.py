"""metrics.jsonl: each record at once, no step twice after a resume, nothing from other ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eve_ds.callbacks.metrics import FILE, MetricsFile
from eve_ds.engine.divergence import SUSPECTS


def trainer(folder: Path, start_step: int = 0, is_main: bool = True, evaluation_due: bool = False) -> Any:
    return SimpleNamespace(output_dir=folder, start_step=start_step, is_main=is_main, evaluation_due=evaluation_due)


def train(state: Any, steps: range) -> None:
    callback = MetricsFile()
    callback.fit_start(state)
    for step in steps:
        callback.step_end(state, {"step": step, "loss": 1 / step})
        if step % 2 == 0:
            callback.evaluation_end(state, {"step": step, "val/loss": 2 / step})
    callback.close(state)


def read(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_there_before_the_run_ends(tmp_path: Path) -> None:
    callback = MetricsFile()
    callback.fit_start(trainer(tmp_path / "new"))
    callback.step_end(trainer(tmp_path), {"step": 1, "loss": 0.5, "lr": 1e-3})
    assert read(tmp_path / "new") == [{"step": 1, "loss": 0.5, "lr": 1e-3}]
    callback.close(trainer(tmp_path))
    callback.close(trainer(tmp_path))


def test_resume_cuts_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    train(trainer(tmp_path), range(1, 6))
    train(trainer(tmp_path, start_step=4), range(5, 9))
    records = read(tmp_path)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
    assert [r["step"] for r in records if "val/loss" in r] == [2, 4, 6, 8]


def test_a_run_from_the_start_keeps_nothing(tmp_path: Path) -> None:
    train(trainer(tmp_path), range(1, 6))
    train(trainer(tmp_path), range(1, 3))
    assert [r["step"] for r in read(tmp_path)] == [1, 2, 2]


def test_a_half_written_line_is_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    train(trainer(tmp_path, start_step=2), range(3, 4))
    assert "metrics.jsonl: line 2 is not a record" in caplog.text
    assert [r["step"] for r in read(tmp_path)] == [1, 3]


def test_values_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    callback = MetricsFile()
    callback.fit_start(trainer(tmp_path))
    callback.step_end(trainer(tmp_path), {"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    callback.close(trainer(tmp_path))
    assert read(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    train(trainer(tmp_path, is_main=False), range(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_that_is_made_again_stands_there_once(tmp_path: Path) -> None:
    records = [{"step": 1, "lr": 0.1}, {"step": 2, "lr": 0.1}, {"step": 2, "val/loss": 3.0}, {"step": 3, "lr": 0.1}]
    for name in (FILE, SUSPECTS):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    callback, resumed = MetricsFile(), trainer(tmp_path, start_step=2, evaluation_due=True)
    callback.fit_start(resumed)
    callback.close(resumed)
    for name in (FILE, SUSPECTS):
        assert [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == records[:2]
