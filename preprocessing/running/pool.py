"""Runs tasks in this process, in N worker processes, or in the ranks that mpirun started. All are Executors.

`--workers N`: N spawned processes. This process reads the annotations and sends the rows of a part to a worker, so the
rows are in memory once, for any N. Workers exit when this process dies, even from kill -9.
`mpirun -n N python -m preprocessing …`: the same with rank 0 in charge and N - 1 ranks as workers, on machines that
share the output.
"""

import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar, cast

from preprocessing.errors import UserError

_T = TypeVar("_T")
_WORLD_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")  # Open MPI, MPICH and Intel MPI
_MOST_WORKERS = 1024
_TIMEOUT_SECONDS = 150  # a wait for a result; two waits without any activity end the run
_AHEAD = 3  # tasks that finish in threads while the next one begins
_mpi: Executor | None = None  # set on rank 0 while the other ranks serve


def started_by_mpi() -> bool:
    """Whether mpirun (or srun with MPI) started this process together with others."""
    return any(int(os.environ.get(name, "1")) > 1 for name in _WORLD_SIZES)


def run_under_mpi(main: Callable[[], int]) -> int:
    """Run `main` on rank 0 while the other ranks serve its `executor`. Returns rank 0's exit code; 0 on the others."""
    global _mpi
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"mpi4py: cannot be used under mpirun ({message}); install it and an MPI library") from None
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as ranks:
        if ranks is None:  # another rank, after rank 0 has finished
            return 0
        _mpi = cast(Executor, ranks)
        try:
            return main()
        finally:
            _mpi = None


def check_workers(workers: int) -> None:
    """Raise UserError unless `executor(workers)` can work."""
    if not 1 <= workers <= _MOST_WORKERS:
        raise UserError(f"--workers {workers}: must be between 1 and {_MOST_WORKERS}")
    if _mpi is not None and workers > 1:
        raise UserError(f"--workers {workers}: mpirun has started the processes already; leave it out")


def process_count(workers: int) -> int:
    """The number of processes: the ranks under mpirun, else the workers and, if there are several, this one."""
    if _mpi is not None:
        return int(getattr(_mpi, "num_workers", 1)) + 1
    return workers + 1 if workers > 1 else 1


@contextmanager
def executor(workers: int) -> Iterator[tuple[Executor, int]]:
    """An Executor and how many tasks to give it at a time. On an error its processes are stopped at once."""
    if _mpi is not None:
        yield _mpi, 2 * getattr(_mpi, "num_workers", 1)
    elif workers == 1:
        yield _InlineExecutor(), 1
    else:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
        try:
            yield pool, 2 * workers
        except BaseException:
            started: Iterable[BaseProcess] = (pool._processes or {}).values()
            for process in list(started):  # 3.14 has terminate_workers() for it
                process.kill()  # a stopped process does not react to anything else
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class _InlineExecutor(Executor):
    """Calls each function at once, in this process."""

    def submit(self, function: Callable[..., _T], /, *args: Any, **kwargs: Any) -> "Future[_T]":
        """See Executor; what the function raises is raised here."""
        future: Future[_T] = Future()
        future.set_result(function(*args, **kwargs))
        return future


def _start_worker() -> None:
    """Ignore Ctrl-C, since the parent stops its workers, and exit when the parent dies, even from kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with_parent, args=(parent,), name="parent-watch", daemon=True).start()


def _exit_with_parent(parent: Any) -> None:
    parent.join()
    os._exit(1)


def run_tasks(
    workers: int,
    function: Callable[..., _T],
    tasks: Iterable[tuple[Any, ...]],
    begin: Callable[..., Callable[[], _T]] | None = None,
) -> Generator[_T, None, None]:
    """The results of `function(*task)`, in the order of completion. Only a few tasks are in memory at a time.

    `begin(*task)()` does the same in two steps: without workers, this process begins a task while threads run the
    second steps of earlier tasks. Raises what the function raises, and UserError when a worker process dies.
    """
    if begin is not None and workers == 1 and _mpi is None:
        yield from _run_overlapped(begin, tasks)
        return
    with executor(workers) as (pool, most):
        running: set[Future[_T]] = set()
        try:
            for task in tasks:
                running.add(pool.submit(function, *task))
                if len(running) >= most:
                    done, running = _first_done(pool, running)
                    for future in done:
                        yield future.result()
            while running:
                done, running = _first_done(pool, running)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (by the system for want of memory?); run the same command again, it "
                "continues; fewer --workers need less memory"
            ) from None
        finally:
            for future in running:
                future.cancel()


def _first_done(pool: Executor, running: set["Future[_T]"]) -> tuple[set["Future[_T]"], set["Future[_T]"]]:
    """Wait for the first result; (done, not done). Raises UserError when no worker is active for a long time.

    The time is a few minutes, or twice the environment variable PREPROCESSING_TIMEOUT_SECONDS.
    """
    if not isinstance(pool, ProcessPoolExecutor):
        return cast(Any, wait(running, return_when=FIRST_COMPLETED))
    seconds = float(os.environ.get("PREPROCESSING_TIMEOUT_SECONDS", _TIMEOUT_SECONDS))
    quiet = 0  # consecutive waits in which no worker used the processor
    before = _activity(pool)
    while True:
        done, rest = wait(running, timeout=seconds, return_when=FIRST_COMPLETED)
        now = _activity(pool)
        if done:
            return done, rest
        quiet = quiet + 1 if [ticks for _, _, ticks in now] == [ticks for _, _, ticks in before] else 0
        if quiet == 2:  # one may mean that this process was stopped together with the workers
            raise UserError(_stall_message(now, 2 * seconds))
        before = now


def _activity(pool: ProcessPoolExecutor) -> list[tuple[int, str, int]]:
    """(process, its state in a letter, processor time in clock ticks) of each worker."""
    found = []
    for process in list(pool._processes or ()):
        try:
            words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended, which the pool reports
            continue
        found.append((process, words[0], int(words[11]) + int(words[12])))
    return found


def _stall_message(workers: list[tuple[int, str, int]], seconds: float) -> str:
    stopped = [process for process, state, _ in workers if state in "Tt"]
    names = ", ".join(str(process) for process in stopped or [process for process, _, _ in workers])
    what = f"stopped: continue them with `kill -CONT {names.replace(',', '')}`" if stopped else "waiting for storage?"
    return (
        f"on host {socket.gethostname()}, no worker has done anything for {seconds:g} s (process {names}: {what}); run "
        "the same command again, it continues; PREPROCESSING_TIMEOUT_SECONDS sets the time"
    )


def _run_overlapped(
    begin: Callable[..., Callable[[], _T]], tasks: Iterable[tuple[Any, ...]]
) -> Generator[_T, None, None]:
    """The results in the order of the tasks. Each task that was begun is finished, even if another one fails."""
    with ThreadPoolExecutor(_AHEAD, "second-step") as threads:
        ending: deque[Future[_T]] = deque()
        for task in tasks:
            ending.append(threads.submit(begin(*task)))
            while len(ending) >= _AHEAD or (ending and ending[0].done()):
                yield ending.popleft().result()
        while ending:
            yield ending.popleft().result()
