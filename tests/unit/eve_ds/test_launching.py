"""The guard around a launcher: signals go to the ranks, and their exit codes come out, whatever the launcher does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from preprocessing.errors import without_secrets

RANK = """
import os, sys, time
from pathlib import Path
from eve_ds.engine.signals import StopRequest
from eve_ds.errors import run_command
from preprocessing.errors import UserError

def main():
    folder, number, what = sys.argv[1:]
    with StopRequest().handling() as stop:
        Path(folder, "ready-" + number).touch()
        if what == "late" and number == "0":
            os.kill(os.getpid(), 15)
        if what == "start":
            time.sleep(60)
        with stop.deferred():
            if what == "mistake":
                raise UserError("a mistake")
            if what == "killed" or what == "lost" and number == "0":
                os.kill(os.getpid(), 9)
            while what == "train" and not stop.requested:
                time.sleep(0.05)
            if what in ("finish", "lost", "late"):
                return {"finish": 0, "lost": 3, "late": 3}[what]
            stop.acted_on()
            time.sleep(0.5)
            Path(folder, "saved-" + number).touch()
            return 75

run_command(main)
"""
# Two ranks; as torchrun does, it makes 1 of any exit code, and KILLs what it is asked to end.
LAUNCHER = """
import signal, subprocess, sys
ranks = [subprocess.Popen([sys.executable, *sys.argv[1:3], str(i), *sys.argv[3:]]) for i in range(2)]
def kill(*_):
    for rank in ranks:
        rank.kill()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, kill)
sys.exit(any([rank.wait() for rank in ranks]))
"""


def start(folder: Path, what: str, wrap: tuple[str, ...] = (), launcher: str = LAUNCHER) -> subprocess.Popen[str]:
    rank, script = folder / "rank.py", folder / "torchrun"
    rank.write_text(RANK)
    script.write_text(launcher)
    command = [sys.executable, "-m", "eve_ds.launching", sys.executable, script, rank, folder, what]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    return subprocess.Popen(
        [*wrap, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def until_ready(folder: Path, guard: subprocess.Popen[str]) -> None:
    until(lambda: len(list(folder.glob("ready-*"))) == 2, guard)


def until(condition: Callable[[], bool], guard: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert guard.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def saved(folder: Path) -> int:
    return len(list(folder.glob("saved-*")))


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_a_signal_reaches_the_ranks_past_their_launcher(number: signal.Signals, tmp_path: Path) -> None:
    guard = start(tmp_path, "train")
    until_ready(tmp_path, guard)
    guard.send_signal(number)
    assert (guard.wait(), saved(tmp_path)) == (75, 2), guard.communicate()


def test_the_code_of_ranks_that_a_signal_ended_at_once_is_told(tmp_path: Path) -> None:
    guard = start(tmp_path, "start")
    until_ready(tmp_path, guard)
    guard.send_signal(signal.SIGTERM)
    assert (guard.wait(), saved(tmp_path)) == (143, 0), guard.communicate()


def test_it_outlives_a_launcher_that_was_killed(tmp_path: Path) -> None:
    guard = start(tmp_path, "train")
    until_ready(tmp_path, guard)
    (launcher,) = children(guard.pid)
    os.kill(launcher, signal.SIGKILL)
    assert (guard.wait(), saved(tmp_path)) == (75, 2), guard.communicate()


def test_as_the_first_process_of_a_container(tmp_path: Path) -> None:
    namespace = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("a process namespace needs root")
    outer = start(tmp_path, "train", namespace)
    until_ready(tmp_path, outer)
    (first,) = children(outer.pid)
    os.kill(first, signal.SIGTERM)
    assert (outer.wait(), saved(tmp_path)) == (75, 2), outer.communicate()


@pytest.mark.long
def test_exit_codes(tmp_path: Path) -> None:
    codes = {}
    for what in ("finish", "mistake", "lost", "late", "killed"):
        folder = tmp_path / what
        folder.mkdir()
        guard = start(folder, what)
        guard.communicate()
        codes[what] = guard.returncode
    assert codes == {"finish": 0, "mistake": 2, "lost": 3, "late": 3, "killed": 1}  # the last is the launcher's
    command = [sys.executable, "-m", "eve_ds.launching"]
    for arguments, code, words in (
        ([], 2, "error: no launcher named"),
        (["/nowhere"], 2, "error: /nowhere: cannot be started (No such file or directory)"),
        (["sh", "-c", "kill -9 $$"], 137, ""),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stderr[: len(words)]) == (code, words), done.stderr


@pytest.mark.parametrize("option", ["--data.path=s3://k:sEcReT@bucket/a", "s3://b/a?secret_key=sEcReT"])
def test_a_password_is_refused_before_the_launcher_sees_it(option: str, tmp_path: Path) -> None:
    """Launchers log their command line."""
    command = [sys.executable, "-m", "eve_ds.launching", "touch", str(tmp_path / "started"), option]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and not (tmp_path / "started").exists()
    assert done.stderr.startswith(
        f"error: {without_secrets(option)}: holds a user, a password or a key; leave them out"
    )
    assert done.stderr.count("\n") == 1 and "sEcReT" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("ranks", "number", "code"), [(2, signal.SIGTERM, 143), (0, signal.SIGTERM, 143), (0, signal.SIGUSR1, 75)]
)
def test_without_living_ranks_a_signal_is_the_launchers(
    ranks: int, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    """One that hangs when its ranks have ended can be ended, and one that has not come to start any."""
    waits = LAUNCHER.partition("for number")[0].replace("range(2)", f"range({ranks})")
    ended = tmp_path / "ended"
    waits += f"[rank.wait() for rank in ranks]\nopen({str(ended)!r}, 'w').close()\nsignal.sigwait([signal.SIGCHLD])\n"
    guard = start(tmp_path, "finish", launcher=waits)
    until(ended.exists, guard)
    guard.send_signal(number)
    assert guard.wait() == code, guard.communicate()


def test_nohup_holds_for_the_guard_and_what_it_starts(tmp_path: Path) -> None:
    guard = start(tmp_path, "train", ("nohup",))
    until_ready(tmp_path, guard)
    guard.send_signal(signal.SIGHUP)
    status = Path(f"/proc/{guard.pid}/status").read_text()
    assert int(status.partition("SigIgn:")[2].split()[0], 16) & 1 << (signal.SIGHUP - 1)
    assert guard.poll() is None and saved(tmp_path) == 0
    guard.send_signal(signal.SIGTERM)
    assert (guard.wait(), saved(tmp_path)) == (75, 2), guard.communicate()


def test_a_launcher_hears_that_its_guard_was_killed(tmp_path: Path) -> None:
    """That of ranks on other hosts: srun's are no descendants of the guard, and trained on."""
    waits = f"""
import signal
signal.signal(signal.SIGUSR1, lambda *_: (open({str(tmp_path / "heard")!r}, "w").close(), exit()))
open({str(tmp_path / "waits")!r}, "w").close()
signal.pause()
"""
    guard = start(tmp_path, "finish", launcher=waits)
    until((tmp_path / "waits").exists, guard)
    guard.kill()
    guard.wait()
    deadline = time.monotonic() + 60
    while not (tmp_path / "heard").exists():
        assert time.monotonic() < deadline, "it was not told"
        time.sleep(0.05)
