"""Requests to stop: signals to this rank, and the death of the launcher that started it.

SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask a run to save and end. While it trains or scores (``StopRequest.deferred``), the
loop checks for the request between batches. At any other time nothing would be lost, and the process ends at once.

Launchers send a signal to a process and again to its group, or INT and TERM together. So signals within
``SECOND_AFTER`` seconds are one request; a later signal ends the process at once. SIGUSR1 is a scheduler's advance
notice: the first SIGTERM after it is no second signal. Standard library only, because entry points import this first.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from eve_ds.environment import launched_rank
from eve_ds.errors import STOPPED, StopError, notify_launching

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SECOND_AFTER = 5.0  # seconds
UNWIND_SECONDS = 5.0  # given to the main thread to end by itself; it may hang in a collective
LAUNCHERS = (
    *("deepspeed", "torchrun", "mpirun", "mpiexec", "orterun", "orted", "prterun", "prted", "hydra_pmi_proxy"),
    *("eve-launching", "eve-demo", "eve-sweep"),
)
LAUNCHER_MODULES = (
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torch.distributed.run",
    "eve_ds.launching",
    "eve_ds.demo",
    "eve_ds.sweep",
)
SET_BY_LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # by deepspeed and torchrun, only for their ranks


class StopRequest:
    """Receives the requests to stop of this process.

    Attributes:
        requested: whether this rank was asked to stop. A rank acts on it only after all ranks agree (evaluation.py).
        saves: False in a dry run: what is said does not speak of checkpoints.
    """

    def __init__(self) -> None:
        self.requested, self.saves = False, True
        self._number = 0  # the last signal
        self._deferred = 0
        self._handling = self._acted_on = self._announced = False
        self._first: dict[bool, float] = {}  # when the first SIGUSR1 (True) and the first other signal came
        self._end_at: tuple[float, int] | None = None  # when, and with which exit code, this process is ended
        self._launchers = launchers_above()

    @contextlib.contextmanager
    def handling(self) -> Iterator[StopRequest]:
        """Context in which a signal makes the main thread raise StopError: at once, or at the end of ``deferred``."""
        self._handling = True
        pipe, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._on_signal)
        notify_launching("")
        outlive_readers()
        threading.Thread(target=self._watch, args=(pipe,), name="signals", daemon=True).start()
        try:
            yield self
        finally:
            self._handling = False  # the handlers stay: when one rank ends, a launcher sends TERM to the others

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Context in which a signal only sets ``requested``. Raises StopError at its end unless it was acted on."""
        self._deferred += 1
        try:
            yield
        except StopError:  # the ranks have agreed
            self.acted_on()
            raise
        finally:
            self._deferred -= 1
        self._raise_if_due()

    def acted_on(self) -> None:
        """Say that the ranks agreed to stop and everything is saved, so that further requests need no action."""
        self._handling, self._acted_on = False, True

    def _raise_if_due(self) -> None:
        if self.requested and self._handling and not self._deferred:
            self._handling = False  # cleanup is not interrupted again
            raise StopError(self._number, self.saves)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, as soon as that is back in Python code."""
        self.requested, self._number = True, number
        self._raise_if_due()

    def _watch(self, pipe: int) -> None:
        """Runs in a thread, which learns of a signal at once."""
        while True:
            if select.select([pipe], [], [], 1.0)[0]:
                for number in os.read(pipe, 64):
                    self._arrived(number)
            if not all(alive(*each) for each in self._launchers):
                self._launchers = []
                say(f"the launcher was killed; this rank {'saves what there is and ends' if self.saves else 'ends'}")
                if not self.requested:  # else SIGTERM would count as a second signal
                    os.kill(os.getpid(), signal.SIGTERM)
            if self._end_at is not None and time.monotonic() > self._end_at[0]:
                end(self._end_at[1])

    def _arrived(self, number: int) -> None:
        if number not in SIGNALS:
            return
        name, now = signal.Signals(number).name, time.monotonic()
        first = self._first.setdefault(number == signal.SIGUSR1, now)
        if now - first > SECOND_AFTER:
            say(f"{name} again: ended at once{'; what was saved stands' if self.saves else ''}")
            end(STOPPED if self._acted_on else 128 + number)
        if self._acted_on:
            return
        if not self._deferred:
            code = STOPPED if number == signal.SIGUSR1 else 128 + number
            self._end_at = self._end_at or (now + UNWIND_SECONDS, code)
        elif not self._announced and launched_rank() == 0:
            self._announced = True
            say(f"{name}: saves and ends as soon as the ranks agree; again, after {SECOND_AFTER:.0f} s: ends at once")


def end(code: int) -> None:
    """End the process, from any thread."""
    notify_launching(str(code))
    os._exit(code)


def say(text: str) -> None:
    """Write one line to stderr without its lock, which the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"rank {launched_rank()}: {text}\n".encode())


def launchers_above() -> list[tuple[int, str]]:
    """(process id, start time) of the launchers among this process's ancestors on this host."""
    found, process = [], os.getppid()
    for _ in range(8):
        if process < 1:
            break
        if _is_launcher(process):
            found.append((process, _stat(process)[1]))
        process = int(_stat(process)[0])
    if not found and os.getppid() == 1 and any(name in os.environ for name in SET_BY_LAUNCHERS):
        return [(0, "killed before we looked")]
    return found


def alive(process: int, start: str) -> bool:
    """Whether that process still runs (and not another one with its id)."""
    return bool(start) and _stat(process)[1] == start


def _is_launcher(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # ended meanwhile
        return False
    names = [os.path.basename(word) for word in words[:2]]
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return module in LAUNCHER_MODULES or any(name in LAUNCHERS or name.startswith("slurmstepd") for name in names)


def _stat(process: int) -> tuple[str, str]:
    """(parent, start time) of a process; ("0", "") if it has ended."""
    try:
        state, parent, *rest = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "0", ""
    return ("0", "") if state in "ZX" else (parent, rest[17])


def outlive_readers() -> None:
    """Discard output once its reader has ended: with `| tee log`, the Ctrl-C that asks for a save ends tee, too."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is getattr(sys, f"__{name}__") and getattr(sys, name) is not None:
            old = getattr(sys, name)
            old.flush()
            raw: Any = _Forgiving(number, "w", closefd=False)
            out = raw if old.write_through else io.BufferedWriter(raw)  # unbuffered under python -u
            setattr(sys, name, io.TextIOWrapper(out, old.encoding, old.errors, None, True, old.write_through))


class _Forgiving(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe without a reader, a terminal that was closed
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes
