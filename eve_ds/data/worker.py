"""Loader worker processes: the signals that end one, the memory it keeps, and one-line messages about its failure."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import threading
from collections.abc import Sequence
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path

from preprocessing.errors import UserError

JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # end or warn a whole job
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_FREED_BYTES = 64 << 20
_SECONDS_WITHOUT_PARENT = 2  # at most


def initialize_worker(worker: int) -> None:
    """``worker_init_fn`` of the DataLoader."""
    ignore_job_signals(worker)
    keep_freed_memory()


def ignore_job_signals(worker: int) -> None:
    """In a worker process: ignore ``JOB_SIGNALS``, except for SIGTERM from the parent, which ends the process.

    Schedulers, launchers and terminals signal all processes of a job. The training process then finishes its step and
    saves; it needs its workers until then and ends them itself. (torch's own handler ignores only SIGTERM from others.)
    Signal handlers and wakeup descriptor are inherited from the parent at the fork and do not apply here.

    Args:
        worker: number of the worker.
    """
    signal.set_wakeup_fd(-1)
    for number in JOB_SIGNALS[1:]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS[1:])
    # Threads inherit the mask, so SIGTERM stays blocked in all of them and is left to the thread that waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_with_parent, name=f"reader-{worker}-signals", daemon=True).start()


def _exit_with_parent() -> None:
    """On the parent's SIGTERM, or once it has been killed: torch's own workers then wait for one another without end if
    the pipe of their batches is full, and keep the parent's memory, and that of its GPU."""
    process = parent_process()
    parent = process.pid if process is not None else os.getppid()
    while os.getppid() == parent:
        sent = signal.sigtimedwait({signal.SIGTERM}, _SECONDS_WITHOUT_PARENT)
        if sent is not None and sent.si_pid == parent:
            break
    os._exit(0)


def keep_freed_memory() -> None:
    """Make malloc keep up to 64 MiB of freed memory in this process, for the next image.

    A decoded photo takes a megabyte or more. By default glibc returns such blocks to the kernel, which zeroes the pages
    again for the next image: a quarter of the time of decoding and cropping.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every C library has it
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _FREED_BYTES // 2)
        mallopt(_M_TRIM_THRESHOLD, _FREED_BYTES)


def explain_worker_death(error: BaseException) -> str | None:
    """One line for the RuntimeError with which torch reports a dead worker process; None for other errors.

    torch raises it from its SIGCHLD handler, so it can appear anywhere in the main thread.
    """
    if error.__cause__ is not None and (line := explain_worker_death(error.__cause__)):
        return line  # the cause names the signal
    found = re.search(
        r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+)|exited unexpectedly)",
        str(error),
    )
    if not isinstance(error, RuntimeError) or found is None:
        return None
    return _death(found.group(1), found.group(2))


def check_alive(workers: Sequence[BaseProcess]) -> None:
    """Raise UserError with the same line if one of ``workers`` has died.

    torch tells of it once, by an exception wherever the main thread is: code of others may catch it there. Who then
    waits for the next batch would wait until the time-out.
    """
    for worker in workers:
        if code := worker.exitcode:
            raise UserError(_death(f"{worker.pid}", signal.strsignal(-code) if code < 0 else None))


def _death(pid: str, name: str | None) -> str:
    """Of a process that was ended by a signal of that name; None: by itself."""
    if name == "Bus error":
        cause, advice = "by a bus error: a shard was truncated while it was read, or memory ran out", "check both"
    elif name is None or name == "Killed":
        cause = f"{'by SIGKILL' if name else 'unexpectedly'}: most often for lack of memory"
        advice = "lower data.num_workers or engine.micro_batch_size"
    else:
        cause, advice = f"by a signal ({name})", "look for its message above"
    again = "start again: the run continues from its last checkpoint"
    return f"data loader process {pid} ended {cause}; {advice}, and {again}"


def explain_timeout(seconds: float, workers: Sequence[BaseProcess]) -> str:
    """One line for a batch that took longer than ``seconds``: the host, and the state of each worker process."""
    found = ", ".join(f"process {worker.pid} {_STATES.get(_state(worker.pid), 'runs')}" for worker in workers)
    loader = f"its data loader ({found})" if found else "its data loader"
    return (
        f"on host {socket.gethostname()}, {loader} has given no batch for {seconds:g} s; continue a stopped process "
        "with kill -CONT, check that the storage answers, or raise data.timeout_seconds, and start again: the run "
        "continues from its last checkpoint"
    )


_STATES = {"T": "is stopped", "t": "is being traced", "D": "waits for storage", "Z": "has ended", "S": "waits"}


def _state(process: int | None) -> str:
    """Letter of ``_STATES`` for a process, from /proc."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
