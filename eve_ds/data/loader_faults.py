"""Loader processes: which signals end one, and what torch says of its death, in one line for the user."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

OF_JOBS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # signals that end or warn a whole job


def ignore_sigterm_except_from_parent(worker: int) -> None:
    """Make this loader process ignore the signals of ``OF_JOBS``, except a SIGTERM from its parent. A worker_init_fn.

    Schedulers, launchers and terminals send a signal to all processes of a job. The training process then finishes its
    step and saves, for which it needs its loader processes; it ends them itself. The parent's handlers and wakeup
    descriptor, which a fork copies, are removed.

    Args:
        worker: its index, from torch's DataLoader.
    """
    signal.set_wakeup_fd(-1)
    for number in OF_JOBS[1:]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_JOBS[1:])
    # Threads inherit the block, so the signal stays pending for the thread that waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_parents_signal, name=f"reader-{worker}-signals", daemon=True).start()


def _await_parents_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def explain_worker_death(error: BaseException) -> str | None:
    """One line for the RuntimeError by which torch tells that a worker process died; None for another error.

    torch raises it from its SIGCHLD handler, so it may come up wherever the main thread happens to be.
    """
    if error.__cause__ is not None and (line := explain_worker_death(error.__cause__)):
        return line  # which knows the signal
    found = re.search(
        r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+)|exited unexpectedly)",
        str(error),
    )
    if not isinstance(error, RuntimeError) or found is None:
        return None
    pid, name = found.group(1), found.group(2)
    if name == "Bus error":
        cause, mend = "by a bus error: a shard was cut off while it was read, or memory ran out", "check both"
    elif name is None or name == "Killed":
        cause = f"{'by SIGKILL' if name else 'unexpectedly'}: most often for want of memory"
        mend = "lower data.num_workers or engine.micro_batch_size"
    else:
        cause, mend = f"by a signal ({name})", "look for its message above"
    return f"data loader process {pid} ended {cause}; {mend}, and start again: the run goes on from its last checkpoint"


def explain_silence(seconds: float, readers: Sequence[BaseProcess]) -> str:
    """One line for a batch that has not come for so long: on which host, and what each reading process is at."""
    found = ", ".join(f"process {reader.pid} {_STATES.get(_state(reader.pid), 'runs')}" for reader in readers)
    who = f"its data loader ({found})" if found else "its data loader"
    return (
        f"on host {socket.gethostname()}, {who} has given no batch for {seconds:g} s; continue a stopped process with "
        "kill -CONT, look whether the storage answers, or raise data.timeout_seconds, and start again: the run goes on "
        "from its last checkpoint"
    )


_STATES = {"T": "is stopped", "t": "is being traced", "D": "waits for storage", "Z": "has ended", "S": "waits"}


def _state(process: int | None) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
