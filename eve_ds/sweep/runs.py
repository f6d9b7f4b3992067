"""Runs the stages of a sweep, some side by side. What is done stays done; a stop or a failure ends all of them.

A lane is a list of stages of which each needs the one before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

from eve_ds.demo import clock
from eve_ds.errors import NOT_COPIED, STOPPED, StopError
from eve_ds.sweep.stages import Stage, read_json
from preprocessing.errors import UserError, shortened
from preprocessing.local_files import make_folder, write_json

POLL_SECONDS = 0.2


def left(lanes: Sequence[Sequence[Stage]]) -> list[list[Stage]]:
    """The lanes without the stages that are done.

    Raises:
        UserError: a stage was begun with another command.
    """
    for stage in (stage for lane in lanes for stage in lane):
        before = read_json(stage.record).get("command", stage.shown)
        if before != stage.shown:
            raise UserError(
                f"{stage.folder}: was begun with other options; repeat the sweep with those of before, or with another "
                f"--out (before: {before}; now: {stage.shown})"
            )
    found = [[stage for stage in lane if not stage.product.is_file()] for lane in lanes]
    return [lane for lane in found if lane]


def run(lanes: Sequence[Sequence[Stage]], jobs: int, ranks: int | None) -> None:
    """Run all stages: those of a lane one after the other, up to ``jobs`` lanes side by side.

    Args:
        lanes: from ``left``.
        jobs: stages at a time.
        ranks: processes of a stage, for the threads of each; None leaves these to the runs.
    Raises:
        UserError: a run failed; the message names its command and log.
        StopError: this process or a run was asked to stop.
    """
    environment = dict(os.environ)
    if ranks is not None:  # a value that the user has set wins
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // (jobs * ranks))))
    if "WANDB_API_KEY" not in environment:
        environment.setdefault("WANDB_MODE", "disabled")  # one run would log offline; dozens of those pile up
    waiting = [list(lane) for lane in lanes]
    total, done, began = sum(map(len, waiting)), 0, time.monotonic()
    running: dict[subprocess.Popen[bytes], tuple[Stage, list[Stage], float]] = {}
    with _stopping():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    stage, *later = waiting.pop(0)
                    running[_start(stage, environment)] = stage, later, time.monotonic()
                time.sleep(POLL_SECONDS)
                for process in [process for process in running if process.poll() is not None]:
                    stage, later, start = running.pop(process)
                    _finish(stage, process.returncode, time.monotonic() - start)
                    done += 1
                    spent = time.monotonic() - began
                    print(f"[{done}/{total}] {stage.title}: done; {clock(spent)} so far", flush=True)
                    if later:
                        waiting.insert(0, later)
        finally:
            for process in running:
                process.terminate()  # a run saves a checkpoint, then exits
            for process, (stage, _, start) in running.items():
                process.wait()
                _add_time(stage, time.monotonic() - start)


def _start(stage: Stage, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    print(f"{stage.title}\n    {stage.shown}", flush=True)
    make_folder(stage.folder.parent)
    write_json(stage.record, {"seconds": 0.0} | read_json(stage.record) | {"command": stage.shown})
    command = [sys.executable if word == "python" else word for word in stage.command]
    with stage.log.open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def _add_time(stage: Stage, seconds: float) -> None:
    """A stage that was stopped and goes on has taken the time of all its processes."""
    record = read_json(stage.record)
    write_json(stage.record, record | {"seconds": round(record["seconds"] + seconds, 1)})


def _finish(stage: Stage, code: int, seconds: float) -> None:
    _add_time(stage, seconds)
    if code == STOPPED:
        raise StopError
    made = stage.product.is_file()
    if code or not made:
        lines = stage.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        if made and code == NOT_COPIED:
            print(f"{stage.title}: {last}", flush=True)
            return
        missing = "" if code else f" and did not write {stage.product}"
        raise UserError(
            f"{stage.title} ended with exit code {code}{missing}: {shortened(last, 300)}; all of its output: "
            f"{stage.log}; its command: {stage.shown}"
        )


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Context in which the first signal raises StopError, and later ones change nothing: the runs are saving."""

    def stop(number: int, _: object) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise StopError

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
