"""Runs of a sweep as processes: order, failures, stops, and what is not run again."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eve_ds.errors import NOT_COPIED, STOPPED, StopError, exit_code
from eve_ds.sweep import runs
from eve_ds.sweep.stages import Stage
from preprocessing.errors import UserError


@pytest.fixture
def stage(tmp_path: Path) -> Callable[[str, str], Stage]:
    """A stage that is a real process: (name, Python code, in which PRODUCT is the path of its product)."""

    def made(name: str, code: str) -> Stage:
        folder = tmp_path / name / "seed_0" / "pretrain"
        product = folder / "product"
        folder.mkdir(parents=True)
        code = f"import pathlib, sys, time; PRODUCT = pathlib.Path({str(product)!r}); {code}"
        return Stage(f"{name}, seed 0: pre-training", ["python", "-c", code], folder, product)

    return made


TOUCH = "PRODUCT.write_text(str(time.time()))"


def test_what_is_done_is_not_run_again(stage: Callable[[str, str], Stage], capsys: pytest.CaptureFixture[str]) -> None:
    all_lanes = [[stage("a", TOUCH), stage("b", TOUCH)], [stage("c", TOUCH)]]
    runs.run(runs.left(all_lanes), 1, 1)
    first, second = all_lanes[0]
    assert float(first.product.read_text()) < float(second.product.read_text())
    told = capsys.readouterr().out
    assert f"    {first.shown}\n" in told and "[3/3] c, seed 0: pre-training: done" in told
    record = json.loads(first.record.read_text())
    assert record["command"] == first.shown and 0 < record["seconds"] < 60
    assert runs.left(all_lanes) == []
    second.product.unlink()
    assert runs.left(all_lanes) == [[second]]


def test_another_command_in_the_same_folder_is_refused(stage: Callable[[str, str], Stage]) -> None:
    begun = stage("a", TOUCH)
    begun.record.write_text(json.dumps({"command": "python -m eve_ds.pretrain --optimizer.total_steps 9"}))
    with pytest.raises(UserError, match=r"a/seed_0/pretrain: was begun with other options.*total_steps 9"):
        runs.left([[begun]])
    begun.record.write_text("{")
    with pytest.raises(UserError, match=r"pretrain\.json: is damaged"):
        runs.left([[begun]])


def test_a_failed_run_names_its_command_and_its_log(stage: Callable[[str, str], Stage]) -> None:
    failing = stage("a", "print('told'); sys.exit('error: no such file')")
    other = stage("b", f"time.sleep(600); {TOUCH}")
    with pytest.raises(UserError) as raised:
        runs.run([[failing], [other]], 2, 1)
    assert not other.product.exists()  # it was ended
    message = f"{raised.value}"
    assert message.startswith("a, seed 0: pre-training ended with exit code 1: error: no such file; ")
    assert f"{failing.log}" in message and failing.shown in message
    assert failing.log.read_text().split("\n")[:2] == ["told", "error: no such file"]
    assert runs.left([[failing]]) == [[failing]]  # and runs anew


def test_the_time_of_all_its_processes_counts(stage: Callable[[str, str], Stage]) -> None:
    again = "again = PRODUCT.with_name('again')\nif not again.exists(): again.touch(); time.sleep(1); sys.exit(75)\n"
    stopped = stage("a", again + TOUCH)
    with pytest.raises(StopError):
        runs.run([[stopped]], 1, 1)
    first = json.loads(stopped.record.read_text())["seconds"]
    assert first >= 1
    runs.run(runs.left([[stopped]]), 1, 1)
    assert json.loads(stopped.record.read_text())["seconds"] > first


def test_a_run_that_writes_no_product_has_failed(stage: Callable[[str, str], Stage]) -> None:
    quiet = stage("a", "pass")
    with pytest.raises(UserError, match=r"exit code 0 and did not write .*product"):
        runs.run([[quiet]], 1, 1)


def test_a_run_whose_second_place_lacks_a_part_is_done_and_tells_it(
    stage: Callable[[str, str], Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    told = f"print('s3://b/x lacks a part of this run'); sys.exit({NOT_COPIED})"
    runs.run([[stage("a", f"{TOUCH}; {told}")]], 1, 1)
    shown = capsys.readouterr().out
    assert "a, seed 0: pre-training: s3://b/x lacks a part of this run\n" in shown and "[1/1]" in shown
    with pytest.raises(UserError, match=f"exit code {NOT_COPIED}"):
        runs.run([[stage("b", told)]], 1, 1)


def test_a_run_that_was_asked_to_stop_stops_the_sweep(stage: Callable[[str, str], Stage]) -> None:
    with pytest.raises(StopError):
        runs.run([[stage("a", f"sys.exit({STOPPED})"), stage("b", TOUCH)]], 1, 1)


def test_a_signal_waits_for_the_runs_to_save(stage: Callable[[str, str], Stage]) -> None:
    saves = (
        "import signal\n"
        "ready, saving, twice = (PRODUCT.with_name(name) for name in ('ready', 'saving', 'twice'))\n"
        "def save(*_):\n"
        "    saving.touch()\n"
        "    while not twice.exists(): time.sleep(0.02)\n"
        f"    {TOUCH}; sys.exit({STOPPED})\n"
        "signal.signal(signal.SIGTERM, save); ready.touch(); time.sleep(600)"
    )
    running = stage("a", saves)
    ready, saving, twice = (running.product.with_name(name) for name in ("ready", "saving", "twice"))

    def stop() -> None:
        for come in (ready, saving):  # the second one changes nothing: the run is saving
            while not come.exists():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)
        twice.touch()

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    assert exit_code(lambda: runs.run([[running]], 1, 1)) == STOPPED
    thread.join()
    assert running.product.exists() and signal.getsignal(signal.SIGTERM) is before


def test_side_by_side(stage: Callable[[str, str], Stage]) -> None:
    """Each of two waits for the other, and has its share of the cores."""
    pair = [
        stage(own, f"import os\nwhile not PRODUCT.parents[3].joinpath('{other}.here').exists(): "
              f"PRODUCT.parents[3].joinpath('{own}.here').touch(); time.sleep(0.05)\n"
              f"PRODUCT.parents[3].joinpath('{own}.here').touch(); PRODUCT.write_text(os.environ['OMP_NUM_THREADS'])")
        for own, other in (("a", "b"), ("b", "a"))
    ]  # fmt: skip
    kept = os.environ.pop("OMP_NUM_THREADS", None)
    try:
        runs.run([[each] for each in pair], 2, 1)
    finally:
        if kept is not None:
            os.environ["OMP_NUM_THREADS"] = kept
    share = f"{max(1, len(os.sched_getaffinity(0)) // 2)}"
    assert [each.product.read_text() for each in pair] == [share, share]


def test_wandb_is_off_unless_it_is_set_up(stage: Callable[[str, str], Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    modes = {}
    for name, kept in (("none", None), ("mode", "WANDB_MODE"), ("key", "WANDB_API_KEY")):
        for variable in ("WANDB_MODE", "WANDB_API_KEY"):
            monkeypatch.delenv(variable, raising=False)
        if kept:
            monkeypatch.setenv(kept, "offline")
        asked = stage(name, "import os; PRODUCT.write_text(os.environ.get('WANDB_MODE', 'unset'))")
        runs.run([[asked]], 1, 1)
        modes[name] = asked.product.read_text()
    assert modes == {"none": "disabled", "mode": "offline", "key": "unset"}
