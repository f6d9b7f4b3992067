"""Progress: plain lines at intervals where nobody watches, a bar on a terminal, silence on other ranks."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eve_ds.callbacks.progress import Progress, duration, evaluation_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def trainer(total: int, start: int = 0, is_main: bool = True) -> Any:
    names = {"task_name": "vqa", "world_size": 2, "stopped_early": False}
    return SimpleNamespace(total_steps=total, start_step=start, step=start, is_main=is_main, **names)


def train(stream: io.StringIO, state: Any, seconds_per_step: float = 1.0, until: int | None = None) -> list[str]:
    now = [100.0]
    callback = Progress(stream, clock=lambda: now[0])
    callback.fit_start(state)
    while state.step < (until or state.total_steps):
        state.step += 1
        now[0] += seconds_per_step
        callback.step_end(state, {"step": state.step, "loss": 2.0 / state.step, "samples_per_second": 96.4})
    callback.evaluation_end(state, {"step": state.step, "val/loss": 0.25, "val/txt_r1": 51.3})
    callback.checkpoint_saved(state, Path("run/step9"))
    state.stopped_early = until is not None
    callback.fit_end(state)
    callback.close(state)
    return stream.getvalue().splitlines()


def test_plain_lines_every_five_seconds() -> None:
    lines = train(io.StringIO(), trainer(12))
    assert lines == [
        "vqa: training to step 12 on 2 rank(s)",
        "vqa: step 1/12  loss 2.0000  96 samples/s  0:11 left",
        "vqa: step 6/12  loss 0.3333  96 samples/s  0:06 left",
        "vqa: step 11/12  loss 0.1818  96 samples/s  0:01 left",
        "vqa: step 12/12  loss 0.1667  96 samples/s  0:00 left",
        "vqa: step 12  val/loss 0.25  val/txt_r1 51.3",
        "vqa: step 12  saved run/step9",
        "vqa: step 12/12  finished after 0:12",
    ]


def test_time_left_after_a_resume_counts_the_steps_of_this_process() -> None:
    lines = train(io.StringIO(), trainer(1000, start=900), seconds_per_step=10, until=910)
    assert lines[0] == "vqa: training from step 900 to step 1000 on 2 rank(s)"
    assert lines[1].endswith("step 901/1000  loss 0.0022  96 samples/s  16:30 left")
    assert "stopped early" in lines[-1]


def test_a_bar_on_a_terminal() -> None:
    text = "\n".join(train(Terminal(), trainer(12)))
    assert "12/12" in text
    assert "loss 0.1667, 96 samples/s" in text
    assert "vqa: step 12  val/loss 0.25" in text
    assert "left" not in text  # the bar has its own


def test_other_ranks_are_silent() -> None:
    assert train(io.StringIO(), trainer(12, is_main=False)) == []


def test_variants_of_a_metric_stand_behind_it() -> None:
    record = {"step": 9, "val/aux_loss": 1.02, "val/mlm_loss": 3.12345, "val/mlm_loss_no_image": 3.6}
    record |= {"val/mlm_loss_shuffled": 3.5, "val/loss": 4.0}
    assert evaluation_line(record) == "val/aux_loss 1.02  val/mlm_loss 3.123 (no_image 3.6, shuffled 3.5)  val/loss 4"
    assert evaluation_line({"val/txt_r1": 1.0, "val/txt_r10": 2.0}) == "val/txt_r1 1  val/txt_r10 2"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
