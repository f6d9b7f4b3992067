"""What a signal does to a process that heeds it, and what the death of its launcher does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eve_ds import finetune, pretrain
from eve_ds.engine import signals
from eve_ds.errors import StopError

RANK = """
import ctypes, sys, threading, time
from eve_ds.engine import signals
from eve_ds.errors import run_command

signals.SECOND_AFTER, signals.UNWIND_SECONDS = 1.0, 0.5

def held_up():  # in the C library: no Python code runs in the main thread, no signal gets it out
    threading.Timer(1.0, print, ["ready"], {"flush": True}).start()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

def train(stop, saved=None):
    with stop.deferred():
        print("ready", flush=True)
        while not stop.requested:
            print("a step", flush=True)
            time.sleep(0.05)
        time.sleep(0.1)
        if saved:
            open(saved, "w").close()
        stop.acted_on()
    return 75

def await_launchers_end(stop):
    while stop._launchers:
        time.sleep(0.05)
    time.sleep(0.5)  # in which a second signal would end it

def save(stop):
    with stop.deferred():
        print("ready", flush=True)
        time.sleep(60)

def main():
    with signals.StopRequest().handling() as stop:
        if "BODY".startswith("time"):
            print("ready", flush=True)
        return BODY

run_command(main)
"""
START_UP, TRAINING, HELD_UP = "time.sleep(60)", "train(stop)", "held_up()"
SAVING = "save(stop)"
TERM, INT, HUP, USR1 = signals.SIGNALS


def start(body: str, wrap: tuple[str, ...] = (), **options: object) -> subprocess.Popen[str]:
    script = RANK.replace("BODY", body)
    pipe = subprocess.PIPE
    started = subprocess.Popen([*wrap, sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True, **options)  # type: ignore[call-overload]
    return started  # type: ignore[no-any-return]


def wait_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stdout.readline() == "ready\n"


def test_each_signal_in_start_up_in_training_and_while_the_main_thread_is_held_up() -> None:
    expected = {
        (START_UP, TERM): -TERM,
        (START_UP, INT): -INT,
        (START_UP, HUP): -HUP,
        (START_UP, USR1): 75,  # a scheduler's notice: the job is to be queued again
        (HELD_UP, TERM): 128 + TERM,
        (HELD_UP, USR1): 75,
        **{(TRAINING, number): 75 for number in signals.SIGNALS},
    }
    started = {case: start(case[0]) for case in expected}
    for (_, number), process in started.items():
        wait_ready(process)
        process.send_signal(number)
    found = {case: (process.communicate()[1], process.returncode) for case, process in started.items()}
    assert {case: code for case, (_, code) in found.items()} == expected
    assert found[START_UP, TERM][0].startswith("rank 0: SIGTERM: stopped on request; the same command goes on")
    assert all("Traceback" not in text for text, _ in found.values())


@pytest.mark.parametrize("module", [pretrain, finetune])
@pytest.mark.parametrize("dry", [True, False])
def test_a_dry_run_speaks_of_no_checkpoint(module: Any, dry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def signal_comes() -> None:
        stop._handling = True
        stop._on_signal(TERM, None)

    stop = signals.StopRequest()
    monkeypatch.setattr(module, "late_imports", signal_comes)
    monkeypatch.setattr(sys, "argv", ["train", *(["--dry_run"] if dry else [])])
    after = "a dry run saves nothing" if dry else "the same command goes on from the last checkpoint"
    with pytest.raises(StopError, match=f"^SIGTERM: stopped on request; {after}$") as caught:
        module.run(stop)
    assert caught.value.code == -TERM


def test_a_signal_that_follows_at_once_is_the_same_request_and_a_later_one_ends() -> None:
    cases = {(TERM, TERM): 128 + TERM, (TERM, INT): 128 + INT, (USR1, USR1): 128 + USR1, (USR1, TERM): None}
    started = {case: start(SAVING) for case in cases}
    try:
        for (first, _), process in started.items():
            wait_ready(process)
            for _ in range(2):
                process.send_signal(first)
                time.sleep(0.1)
        time.sleep(1.5)
        assert [process.poll() for process in started.values()] == [None] * len(cases)
        for (_, second), process in started.items():
            process.send_signal(second)
        codes = {case: process.wait() for case, process in started.items() if cases[case] is not None}
        assert codes == {case: code for case, code in cases.items() if code is not None}
        assert started[USR1, TERM].poll() is None  # the notice, and then the request
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


@pytest.mark.long
def test_a_late_signal_ends_no_rank_that_has_saved() -> None:
    """As launchers send it to the others when the first one has ended."""
    process = start("train(stop) and time.sleep(3) or 75")
    wait_ready(process)
    process.send_signal(TERM)
    time.sleep(0.4)
    process.send_signal(TERM)
    assert process.wait() == 75
    process.communicate()


def test_each_way_of_asking_is_told_once_and_the_launchers_end_is_no_second_signal(tmp_path: Path) -> None:
    """A rank that was asked, and is long about it, saves all the same when its launcher dies."""
    parent, saved = tmp_path / "torchrun", tmp_path / "saved"
    parent.write_text(PARENT)
    body = f"train(stop, {str(saved)!r})"
    rank = RANK.replace("BODY", body).replace('"a step"', "__import__('os').getpid()")
    rank = rank.replace("time.sleep(0.1)", "await_launchers_end(stop)")
    launcher = subprocess.Popen(
        [sys.executable, str(parent), rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_ready(launcher)
    assert launcher.stdout is not None and launcher.stderr is not None
    process = int(launcher.stdout.readline())
    os.kill(process, TERM)
    time.sleep(1.5)  # longer than SECOND_AFTER
    launcher.kill()
    told = launcher.stderr.read()
    launcher.wait()
    launcher.stdout.close()
    until(lambda: not runs(process))
    assert saved.exists()
    assert told.count("SIGTERM: saves and ends as soon as the ranks agree; again, after 1 s") == 1
    assert told.count("the launcher was killed; this rank saves what there is and ends") == 1 and "ended at" not in told


def test_output_is_as_unbuffered_as_python_was_asked_to_be() -> None:
    script = (
        "import os; from eve_ds.engine import signals; signals.outlive_readers(); print('now', end=''); os._exit(0)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    found = [
        subprocess.run([sys.executable, *more, "-c", script], capture_output=True, text=True, env=environment).stdout
        for more in ((), ("-u",))
    ]
    assert found == ["", "now"]


def test_the_first_process_of_a_container_heeds_them_too() -> None:
    """The kernel lets no signal end it that it has no handler for."""
    namespace = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("a process namespace needs root")
    started = {body: start(body, namespace) for body in (TRAINING, START_UP)}
    for outer in started.values():
        wait_ready(outer)
        os.kill(int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text()), TERM)
    codes = {body: (outer.communicate(), outer.returncode)[1] for body, outer in started.items()}
    assert codes == {TRAINING: 75, START_UP: 128 + TERM}


def test_nohup_and_a_reader_that_is_gone() -> None:
    nohup = start(TRAINING, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_ready(nohup)
    nohup.send_signal(HUP)
    unread = start(TRAINING)
    wait_ready(unread)
    assert unread.stdout is not None and unread.stderr is not None
    unread.stdout.close()
    unread.stderr.close()
    time.sleep(0.3)
    assert (nohup.poll(), unread.poll()) == (None, None)
    for process in (nohup, unread):
        process.send_signal(TERM)
        assert process.wait() == 75
    nohup.communicate()


PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.parametrize("name", ["torchrun", pytest.param("nobody", marks=pytest.mark.long)])
def test_a_rank_saves_and_ends_when_its_launcher_is_killed(name: str, tmp_path: Path) -> None:
    parent, saved = tmp_path / name, tmp_path / "saved"
    parent.write_text(PARENT)
    rank = RANK.replace("BODY", f"train(stop, {str(saved)!r})").replace('"a step"', "__import__('os').getpid()")
    command = [sys.executable, str(parent), rank]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    wait_ready(launcher)
    assert launcher.stdout is not None
    process = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    try:
        if name == "nobody":  # a shell, say, that was left with the run in the background
            time.sleep(2.5)
            assert runs(process) and not saved.exists()
        else:
            until(lambda: saved.exists() and not runs(process))
    finally:
        if runs(process):
            os.kill(process, signal.SIGKILL)
        launcher.stdout.close()


def test_a_launcher_that_was_gone_before_we_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert signals.launchers_above() == []
    monkeypatch.setenv("CROSS_RANK", "0")
    ((process, began),) = signals.launchers_above()
    assert not signals.alive(process, began)
    assert signals.alive(os.getpid(), signals._stat(os.getpid())[1])
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert not signals.alive(ended.pid, signals._stat(ended.pid)[1])  # between its name and its start


def test_a_process_above_whose_name_is_no_text(tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"sleep\xc3")  # names are cut at 15 bytes, also within a letter
    shutil.copy("/bin/sleep", name)
    with subprocess.Popen([str(name), "60"]) as process:
        try:
            until(lambda: b"sleep\xc3" in Path(f"/proc/{process.pid}/stat").read_bytes())
            assert signals.alive(process.pid, signals._stat(process.pid)[1])
        finally:
            process.kill()


def runs(process: int) -> bool:
    return signals._stat(process)[1] != ""


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("module", ["eve_ds.demo", "eve_ds.launching", "eve_ds.sweep"])
def test_a_module_that_starts_ranks_is_a_launcher(module: str) -> None:
    """The demo and a sweep too: killed by themselves, they would leave their ranks to train on."""
    asleep = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)", "-m", module]
    with subprocess.Popen(asleep, stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_ready(process)
            assert signals._is_launcher(process.pid)
        finally:
            process.kill()
