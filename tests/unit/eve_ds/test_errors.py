"""How entry points end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch

from eve_ds import rank_failure
from eve_ds.errors import RANK_0_SECONDS, RankError, exit_code
from preprocessing.errors import UserError

SCRIPT = """
import atexit, sys
from eve_ds.errors import run_command
from preprocessing.errors import UserError

class Last:
    def __del__(self):
        print("taken down")

kept = Last()
atexit.register(print, "at the exit")
def main():
    print("said", end=" ", flush=True)
    if sys.argv[1:]:
        raise UserError(sys.argv[1])
run_command(main)
"""


def test_a_process_ends_with_all_said_and_done_and_the_interpreter_left_standing() -> None:
    for arguments, code, error in (([], 0, ""), (["a file\nis missing"], 2, "error: a file is missing\n")):
        ended = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
        assert (ended.returncode, ended.stdout, ended.stderr) == (code, "said at the exit\n", error)


WARNS = """
import logging, warnings
from pathlib import Path
from types import SimpleNamespace
from eve_ds.callbacks.metrics import MetricsFile
from eve_ds.errors import run_command

def main():
    folder = Path("FOLDER")
    (folder / "metrics.jsonl").write_text("broken")
    MetricsFile().fit_start(SimpleNamespace(output_dir=folder, is_main=True, start_step=1, evaluation_due=False))
    logging.getLogger("eve_ds.data.loader").warning("a row is corrupt")
    warnings.warn("of a library's")

run_command(main)
"""


@pytest.mark.parametrize(("rank", "name"), [("0", ""), ("3", "[rank 3] ")])
def test_our_warnings_are_a_line_each_and_those_of_libraries_stay(rank: str, name: str, tmp_path: Path) -> None:
    script = WARNS.replace("FOLDER", str(tmp_path))
    environment = os.environ | {"RANK": rank}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0
    assert ended.stderr.splitlines() == [
        f"WARNING: {name}{tmp_path}/metrics.jsonl: line 1 is not a record with a step and was dropped",
        f"WARNING: {name}a row is corrupt",
        "<string>:13: UserWarning: of a library's",
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["eve_ds.plan", "--config", "tiny_shapes", "--device_memory", "6GiB"],
        pytest.param(["eve_ds.doctor"], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_who_reads_the_first_lines_alone_meets_no_traceback(command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, "-m", *command], stdout=writer, stderr=PIPE, text=True)
    os.close(writer)
    assert ended.stderr == "" and (ended.returncode == 0 or "doctor" in command[0])  # whose code counts faults


def test_another_broken_pipe_is_no_success() -> None:
    with pytest.raises(BrokenPipeError):
        raising(BrokenPipeError(32, "Broken pipe"))


def raising(error: BaseException) -> int:
    def main() -> None:
        raise error

    return exit_code(main)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_who_tells_a_mistake(rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    waits: list[float] = []
    monkeypatch.setattr("eve_ds.errors.time.sleep", waits.append)
    monkeypatch.setenv("RANK", rank)
    assert raising(RankError("one rank meets it")) == 2
    assert capsys.readouterr().err == "error: one rank meets it\n" and not waits
    assert raising(UserError("all ranks meet it")) == 2
    told = {"0": "error: all ranks meet it\n", "1": "error: rank 1: all ranks meet it\n"}
    assert capsys.readouterr().err == told[rank]
    assert waits == ([] if rank == "0" else [RANK_0_SECONDS])


def test_a_rank_that_waits_for_rank_0_is_ended_by_its_launcher_without_a_word() -> None:
    environment = os.environ | {"RANK": "3"}
    script = "import signal; signal.signal(signal.SIGTERM, lambda *_: None)\n" + SCRIPT  # as the trainer's handler
    waiting = subprocess.Popen(
        [sys.executable, "-c", script, "a mistake"], env=environment, stdout=PIPE, stderr=PIPE, text=True
    )
    assert waiting.stdout is not None
    assert waiting.stdout.read(4) == "said"
    while waiting.poll() is None:
        waiting.terminate()
        time.sleep(0.05)
    assert waiting.returncode == 2
    assert waiting.communicate()[1] == ""


def test_other_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("eve_ds.errors.time.sleep", lambda _: None)
    assert raising(RuntimeError("[..] Connection closed by peer [127.0.0.1]:1")) == 3
    assert "another rank has ended" in capsys.readouterr().err
    assert raising(OSError(28, "No space left on device", "runs/a")) == 2
    assert capsys.readouterr().err == ("error: runs/a: No space left on device; make room or choose another folder\n")
    assert raising(OSError(116, "Stale file handle", "data\n/a")) == 2
    assert capsys.readouterr().err == "error: data\\n/a: Stale file handle; see that it can be read and written\n"
    assert raising(KeyboardInterrupt()) == 130
    assert [raising(SystemExit(code)) for code in (None, 0, 2, "why")] == [0, 0, 2, 1]
    assert capsys.readouterr().err == "why\n"
    for defect in (RuntimeError("not enough memory of the past"), OSError(9, "Bad file descriptor"), KeyError("x")):
        with pytest.raises(type(defect)):
            raising(defect)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: torch.empty(1 << 56, dtype=torch.uint8),
            "can't allocate memory: you tried to allocate 72057594037927936 bytes",
        ),
        (
            lambda: torch.empty((1 << 40, 1 << 40)),
            "Storage size calculation overflowed with sizes=[1099511627776, 1099",
        ),
        (lambda: bytearray(1 << 60), "no memory is left; of a run, make the model"),
    ],
)
def test_a_model_beyond_the_memory_is_told_in_a_line(
    make: Callable[[], Any], said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own words for a processor's memory and for sizes beyond any."""
    monkeypatch.setattr(rank_failure, "_place", "")  # of a process that joined no group
    monkeypatch.delenv("RANK", raising=False)
    assert exit_code(lambda: len(make())) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: rank 0: ") and said in line and "eve_ds.plan" in line


def test_a_bug_ends_with_its_traceback_and_the_interpreter_left_standing() -> None:
    script = SCRIPT.replace("UserError(sys.argv[1])", "KeyError(sys.argv[1])")
    ended = subprocess.run([sys.executable, "-c", script, "a bug"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "said at the exit\n")
    assert ended.stderr.startswith("Traceback (most recent call last):") and ended.stderr.endswith(
        "KeyError: 'a bug'\n"
    )


def test_control_characters_of_a_message_are_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(UserError("a\x1b]0;title\x07 b\x00c\nd")) == 2
    assert capsys.readouterr().err == "error: a\\x1b]0;title\\x07 b\\x00c d\n"


def test_a_reader_that_is_gone_at_the_last_flush_is_no_fault() -> None:
    """What is buffered until the end, as with `... | head`, is written when `main` has returned."""
    script = "from eve_ds.errors import run_command; run_command(lambda: print('much'))"
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run([sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, env=environment)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_below_stdout_is_one_line(unbuffered: str) -> None:
    script = "from eve_ds.errors import run_command; run_command(lambda: print('much'))"
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=PIPE, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}
        )
    assert ended.returncode == 2
    assert ended.stderr == b"error: No space left on device; make room or choose another folder\n"


PRINTS = "from eve_ds.errors import run_command; run_command(lambda: print('café 犬'))"


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", rb"caf\xe9 \u72ac"), ("latin-1", b"caf\xe9 \\u72ac"), ("utf-8", "café 犬".encode())],
)
def test_what_a_terminal_cannot_show_is_escaped(encoding: str, printed: bytes) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    ended = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, env=environment)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, printed + b"\n", b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_runs_with_closed_streams(closed: str) -> None:
    ended = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, PRINTS], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "") and (ended.stdout == "") == (" >&-" in f" {closed}")
