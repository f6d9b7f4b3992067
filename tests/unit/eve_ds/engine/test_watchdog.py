"""Whom a rank that gets no further names, by what the others have written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eve_ds.engine import watchdog
from eve_ds.engine.distributed import collective_seconds
from eve_ds.engine.watchdog import FOLDER, PATIENCE, Watchdog

HOST = socket.gethostname()


def waiting(folder: Path, world_size: int) -> Watchdog:
    """Rank 0, which has come further five times and beats each hundredth of a second."""
    dog = Watchdog(folder, 0, world_size, seconds=0.1)
    for _ in range(5):
        dog.mark("step 7, computing")
    return dog


def state(rank: int, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "host": "b", "process": 9, "beat": 4, "marks": 5, "doing": "step 7, computing", **more}


def write(folder: Path, **found: Any) -> None:
    (folder / f"rank_{found['rank']}.json").write_text(json.dumps(found))


def test_a_rank_that_gives_no_sign_of_life_is_named_first_and_then_one_that_is_behind(tmp_path: Path) -> None:
    dog = waiting(tmp_path, 4)
    write(tmp_path, **state(1, marks=3, doing="step 7, reading a batch"))
    write(tmp_path, **state(2))
    line = dog._line(dog._find_culprit())
    assert (
        line.startswith(f"rank 0 on {HOST} has waited ")
        and " s in step 7, computing for rank 1 on b (process 9" in line
    )
    assert "rank 2 on b" in line and "rank 3 (never heard of), which gives no sign of life" in line
    assert f"the stacks are in {tmp_path}/*.stacks" in line and "raise engine.timeout_seconds=0.1" in line

    beats = iter(range(100))
    states = dog._states
    dog._states = lambda: {  # type: ignore[method-assign]
        **states(),
        **{rank: state(rank, beat=next(beats), marks=5 - (rank == 1)) for rank in (1, 2, 3)},
    }
    line = dog._line(dog._find_culprit())
    assert "for rank 1 on b (process 9, last heard of in step 7, computing), which is behind;" in line


def test_stacks_are_written_when_another_rank_asks(tmp_path: Path) -> None:
    dog = waiting(tmp_path, 2)
    assert not dog._others_ask()
    (tmp_path / watchdog.ASKED).touch()
    assert dog._others_ask() and not dog._others_ask()
    dog._write_stacks()
    text = (tmp_path / "rank_0.stacks").read_text()
    assert "step 7, computing" in text.splitlines()[0] and "test_watchdog.py" in text


def test_a_rank_ends_soon_if_another_one_leaves_word_of_its_end(tmp_path: Path) -> None:
    """Word from an earlier start counts for nothing, nor does any as long as the rank makes progress."""
    script = (
        "import sys, time; from pathlib import Path; from eve_ds.engine import watchdog\n"
        "watchdog.start(Path(sys.argv[1]), 0, 2, 10.0)\n"
        "print('watches', flush=True)\n"
        "for _ in range(25):\n    time.sleep(0.2)\n    watchdog.mark('a step')\n"
        "print('stands', flush=True)\n"
        "time.sleep(60)\n"
    )
    folder = tmp_path / FOLDER
    folder.mkdir()
    Watchdog(folder, 3, 4, 10.0).leave()
    waits = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=-1, stderr=-1, text=True)
    assert waits.stdout is not None
    while not (folder / "rank_0.json").exists():
        time.sleep(0.02)
    Watchdog(folder, 1, 4, 10.0).leave()
    assert [waits.stdout.readline(), waits.stdout.readline()] == ["watches\n", "stands\n"]
    began = time.monotonic()
    told = waits.communicate()[1]
    line = f"rank 0: rank 1 on {HOST} (process {os.getpid()}) has ended; its message says why\n"
    assert (told, waits.returncode) == (line, 3) and 2 < time.monotonic() - began < 10


def test_a_folder_that_does_not_answer_silences_nobody(tmp_path: Path) -> None:
    """From the start on, or later. A pipe that nobody reads stands for it: who opens that to write waits for ever."""
    script = (
        "import os, sys, time; from pathlib import Path; from eve_ds.engine.watchdog import Watchdog\n"
        "dog, folder = Watchdog(Path(sys.argv[1]), 0, 2, 4.0), Path(sys.argv[1])\nsince = dog._since\n"
        "if folder.name == 'start':\n    os.mkfifo(folder / 'rank_0.new')\ndog.start()\n"
        "while folder.name == 'later' and not (folder / 'rank_0.json').exists():\n    time.sleep(0.01)\n"
        "if folder.name == 'later':\n    os.mkfifo(folder / 'rank_0.new')\n"
        "for _ in range(900):\n    time.sleep(0.1)\n    assert dog._since == since, 'put off'\n"
    )
    folders = [tmp_path / "start", tmp_path / "later"]
    for folder in folders:
        folder.mkdir()
    started = [
        subprocess.Popen([sys.executable, "-c", script, folder], stderr=subprocess.PIPE, text=True)
        for folder in folders
    ]
    for folder, process in zip(folders, started, strict=True):
        told = process.communicate()[1]
        words = f"in the set-up and {folder} does not answer; where it only needs longer, raise engine.timeout"
        assert process.returncode == 3 and told.count("\n") == 1 and words in told, told


def test_collectives_outwait_what_the_watchdog_needs_to_tell() -> None:
    for seconds in (1, 10, 59, 60, 100, 119, 120, 600, 86400):
        look = Watchdog(Path("/nonexistent"), 0, 2, seconds).interval
        assert collective_seconds(seconds) - seconds >= 60 > look + PATIENCE * look
        assert PATIENCE > 4, "for the four beats of _find_culprit"


@pytest.mark.long
def test_a_rank_that_was_stopped_itself_waits_on_without_a_word(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from eve_ds.engine import watchdog\n"
        "watchdog.start(Path(sys.argv[1]), 0, 2, 3.0)\n"
        "for _ in range(18):\n    time.sleep(0.1)\n"
    )
    started = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / FOLDER / "rank_0.json").exists():
        time.sleep(0.02)
    os.kill(started.pid, 19)  # STOP
    time.sleep(3.5)
    os.kill(started.pid, 18)  # CONT
    assert (started.communicate()[1], started.returncode) == ("", 0)
