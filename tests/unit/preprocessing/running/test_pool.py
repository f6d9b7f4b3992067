import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from preprocessing.errors import UserError
from preprocessing.running.pool import check_workers, run_tasks, started_by_mpi
from tests.unit.preprocessing.helpers import ROOT


def double(value: int) -> int:
    return 2 * value


def fail(value: int) -> int:
    if value == 3:
        raise UserError("value 3: is bad")
    return value


def die(value: int) -> int:
    if value == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def stop(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)


def test_one_worker_is_this_process() -> None:
    assert list(run_tasks(1, double, ((value,) for value in range(50)))) == list(range(0, 100, 2))
    assert list(run_tasks(1, os.getpid, [()])) == [os.getpid()]


def test_a_task_is_begun_while_the_one_before_ends() -> None:
    """Each second step but the last waits for the next task's first; the results come in order all the same."""
    begun = [threading.Event() for _ in range(10)]

    def begin(value: int) -> Callable[[], int]:
        begun[value].set()

        def end() -> int:
            assert threading.current_thread() is not threading.main_thread()
            assert begun[min(value + 1, 9)].wait(60)
            return double(value)

        return end

    assert list(run_tasks(1, double, ((value,) for value in range(10)), begin)) == list(range(0, 20, 2))


@pytest.mark.parametrize("step", ["first", "second"])
def test_what_was_begun_is_ended_when_another_task_fails(step: str) -> None:
    begun, ended = [], []

    def begin(value: int) -> Callable[[], int]:
        begun.append(value)
        if step == "first":
            fail(value)

        def end() -> int:
            time.sleep(0.01)
            ended.append(fail(value))
            return value

        return end

    with pytest.raises(UserError, match="value 3: is bad"):
        list(run_tasks(1, fail, ((value,) for value in itertools.count()), begin))
    assert 4 <= len(begun) < 10 and sorted([*ended, 3]) == begun


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_ends_the_run(workers: int) -> None:
    """With tasks left to take, and taken: they are not done, or this would not end."""
    taken = 0

    def tasks():  # type: ignore[no-untyped-def]
        nonlocal taken
        while True:
            taken += 1
            yield (taken,)

    with pytest.raises(UserError, match="value 3: is bad"):
        list(run_tasks(workers, fail, tasks()))
    assert taken < 20


def test_a_worker_that_dies_is_reported() -> None:
    with pytest.raises(UserError, match="a worker process was killed"):
        list(run_tasks(2, die, ((value,) for value in range(10))))


def test_a_worker_that_is_stopped_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREPROCESSING_TIMEOUT_SECONDS", "0.5")
    with pytest.raises(UserError, match=r"no worker has done anything for 1 s \(process \d+: stopped") as raised:
        list(run_tasks(2, stop, [(str(tmp_path / "worker"),)]))
    process = int((tmp_path / "worker").read_text())
    assert f"process {process}: stopped: continue them with `kill -CONT {process}`" in str(raised.value)
    assert not _alive(process)


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    code = (
        "import sys; from preprocessing.running.pool import run_tasks\n"
        "from tests.unit.preprocessing.running.test_pool import sleep\n"
        "if __name__ == '__main__': list(run_tasks(2, sleep, [(sys.argv[1] + '/a',), (sys.argv[1] + '/b',)]))"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment) as process:
        pids = [_wait_for(tmp_path / name) for name in "ab"]
        process.kill()
    deadline = time.monotonic() + 60
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker has outlived its parent"
        time.sleep(0.05)


def _wait_for(path: Path) -> int:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text())


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # nobody may be there to collect an orphan


@pytest.mark.parametrize("workers", [0, -1, 5000])
def test_bad_numbers_of_workers_are_refused(workers: int) -> None:
    with pytest.raises(UserError, match=rf"--workers {workers}: must be between 1"):
        check_workers(workers)


def test_mpi_is_known_by_what_it_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    monkeypatch.delenv("PMI_SIZE", raising=False)
    monkeypatch.delenv("MPI_LOCALNRANKS", raising=False)
    assert not started_by_mpi()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert not started_by_mpi()
    monkeypatch.setenv("PMI_SIZE", "4")
    assert started_by_mpi()
