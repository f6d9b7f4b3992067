"""Reports of ranks that make no progress: who waits, where, for which rank, and the stacks of all ranks.

A thread of each rank writes its state into RUN/ranks/rank_N.json: each minute, and more often once it waits. A rank
without progress for ``engine.timeout_seconds`` writes its stacks (rank_N.stacks), asks the other ranks for theirs,
compares two states of each, names those that are stopped or behind, and ends with exit code 3. (A single rank reports,
and continues to wait.) A collective alone would wait for half an hour or for ever, and would name no rank. A rank that
ends by an error leaves word, because NCCL's collectives do not tell the others: they end soon after, with exit code 3.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eve_ds.engine.signals import end, say

FOLDER = "ranks"  # of the run folder
ASKED = "stacks_wanted"  # a file in it; touched to ask all ranks for their stacks; holds a line for each that left
SLOWEST_LOOK = 8.0  # seconds between two checks, at most
PATIENCE = 6  # intervals to wait for the run folder's file system; _find_culprit takes four
LOST_PATIENCE = 3  # intervals without progress after which a rank ends if another one has left
HEALTHY_BEAT = 60.0  # seconds between two writes of a rank that makes progress


class Watchdog:
    """Watches the progress of this rank.

    Args:
        folder: RUN/ranks, which all ranks see.
        rank, world_size: as in the process group.
        seconds: ``engine.timeout_seconds``.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, seconds: float) -> None:
        self.folder, self.rank, self.world_size, self.seconds = folder, rank, world_size, seconds
        self.interval = min(SLOWEST_LOOK, seconds / 10)
        self.doing, self._since, self._marks, self._beats = "the set-up", time.monotonic(), 0, 0
        self._asked_at: float | None = None  # when stacks were last asked for
        self._wanted = False  # whether they were, since this start
        self._left: list[str] = []  # the ranks that left, also in earlier starts
        self._left_before = 0  # how many of these
        self._beaten = -HEALTHY_BEAT  # when it last wrote
        self._ended = threading.Event()
        self._files: threading.Thread | None = None  # works on the run folder

    def start(self) -> None:
        """Start to watch. Requests for stacks from an earlier start are ignored."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def mark(self, doing: str) -> None:
        """Report progress, and what the rank does from now on."""
        self.doing, self._since, self._marks = doing, time.monotonic(), self._marks + 1

    def go_on(self) -> None:
        """Report progress within what the rank does. Not counted in marks, since ranks may do so unequally often."""
        self._since = time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()

    def leave(self) -> None:
        """Tell the other ranks that this one ends by an error. Waits an interval at most for the storage."""
        writing = threading.Thread(target=self._leave_word, name="watchdog-leaves", daemon=True)
        writing.start()
        writing.join(self.interval)

    def _leave_word(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)  # an error may come before ``_begin``
            with open(self.folder / ASKED, "a", encoding="utf-8") as file:
                file.write(f"rank {self.rank} on {socket.gethostname()} (process {os.getpid()})\n")

    def _watch(self) -> None:
        self._in_folder(self._begin)
        looked = time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            if now - looked > 3 * self.interval + 1:  # this process itself was stopped (scontrol suspend, Ctrl-Z)
                self._since += now - looked
            beats = self._wanted or now - self._since > self.seconds / 4 or now - self._beaten > HEALTHY_BEAT
            self._in_folder(lambda beats=beats: self._look(beats))  # type: ignore[misc]
            left = self._left[self._left_before :]
            if left and now - self._since > LOST_PATIENCE * self.interval and not self._ended.is_set():
                say(f"{left[0]} has ended; its message says why")
                end(3)
            if now - self._since > self.seconds:
                since, found = self._since, [""]
                self._in_folder(lambda found=found: found.insert(0, self._find_culprit()))  # type: ignore[misc]
                line = self._line(found[0])
                if self._since == since and not self._ended.is_set():
                    say(f"error: {line}")
                    if self.world_size > 1:
                        end(3)
                    self._since = time.monotonic()  # a single rank reports again after the next timeout
            looked = time.monotonic()  # time that the storage took does not count as a stop of this process

    def _in_folder(self, work: Callable[[], None]) -> None:
        """Do work on the run folder in a thread of its own, so that the watchdog still reports if the storage hangs."""
        if self._files is not None and self._files.is_alive():
            return
        self._files = threading.Thread(target=work, name="watchdog-files", daemon=True)
        self._files.start()
        self._files.join(PATIENCE * self.interval)

    def _begin(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            # Made now, because NFS clients remember for a minute that a file is missing.
            os.close(os.open(self.folder / ASKED, os.O_CREAT, 0o666))
        self._others_ask()
        self._wanted, self._left_before = False, len(self._left)
        self._beat()

    def _look(self, beats: bool) -> None:
        if beats:
            self._beat()
        if self._others_ask():
            self._write_stacks()

    def _beat(self) -> None:
        self._beats, self._beaten = self._beats + 1, time.monotonic()
        state = {"rank": self.rank, "host": socket.gethostname(), "process": os.getpid(), "beat": self._beats}
        state |= {"marks": self._marks, "doing": self.doing, "seconds": round(time.monotonic() - self._since, 1)}
        path = self.folder / f"rank_{self.rank}.json"
        with contextlib.suppress(OSError):
            path.with_suffix(".new").write_text(json.dumps(state), encoding="utf-8")
            os.replace(path.with_suffix(".new"), path)

    def _others_ask(self) -> bool:
        with contextlib.suppress(OSError):
            # An NFS client asks the server at open, not at stat.
            with open(self.folder / ASKED, encoding="utf-8", errors="replace") as file:
                asked_at = os.fstat(file.fileno()).st_mtime
                self._left = file.read().splitlines()
            if asked_at != self._asked_at:
                self._asked_at, self._wanted = asked_at, True
                return True
        return False

    def _write_stacks(self) -> None:
        with contextlib.suppress(OSError), open(self.folder / f"rank_{self.rank}.stacks", "w") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.doing}\n")
            file.flush()  # faulthandler writes past its buffer
            faulthandler.dump_traceback(file, all_threads=True)

    def _find_culprit(self) -> str:
        """Write stacks, ask the other ranks for theirs, and find out for whom this rank waits. Takes four intervals."""
        self._write_stacks()
        with contextlib.suppress(OSError):
            (self.folder / ASKED).touch()
            self._asked_at = (self.folder / ASKED).stat().st_mtime
        before = self._states()
        for _ in range(4):
            time.sleep(self.interval)
            self._beat()
        now = self._states()
        silent = [now.get(rank, {"rank": rank}) for rank in range(self.world_size) if _same_beat(rank, before, now)]
        behind = [state for state in now.values() if state.get("marks", 0) < self._marks]
        if silent:
            who = f"for {_names(silent)}, which gives no sign of life (stopped, killed, or its host is gone)"
        elif behind:
            who = f"for {_names(behind)}, which is behind"
        else:
            who = "as every rank has" if self.world_size > 1 else "alone"
        return who

    def _line(self, who: str) -> str:
        """The message; ``who`` is empty if the run folder's file system did not answer."""
        host, waited = socket.gethostname(), time.monotonic() - self._since
        found = f"{who}; the stacks are in {self.folder}/*.stacks" if who else f"and {self.folder} does not answer"
        return (
            f"rank {self.rank} on {host} has waited {waited:.0f} s in {self.doing} {found}; where it "
            f"only needs longer, raise engine.timeout_seconds={self.seconds:g}"
        )

    def _states(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(self.world_size):
            with contextlib.suppress(OSError, ValueError):
                found[rank] = json.loads((self.folder / f"rank_{rank}.json").read_text(encoding="utf-8"))
        return found


def _same_beat(rank: int, before: dict[int, dict[str, Any]], now: dict[int, dict[str, Any]]) -> bool:
    return bool(before.get(rank, {}).get("beat") == now.get(rank, {}).get("beat"))


def _names(states: list[dict[str, Any]]) -> str:
    names = [
        f"rank {state['rank']} on {state['host']} (process {state['process']}, last heard of in {state['doing']})"
        if "host" in state
        else f"rank {state['rank']} (never heard of)"
        for state in states[:3]
    ]
    return ", ".join(names) + (f" and {len(states) - 3} more" if len(states) > 3 else "")


_watchdog: Watchdog | None = None


def forget(run_folder: Path) -> None:
    """Remove the states that ranks of an earlier start wrote. Called by rank 0 before any ``start``."""
    for left in (run_folder / FOLDER).glob("rank_*.json"):
        with contextlib.suppress(OSError):
            left.unlink()


def start(run_folder: Path, rank: int, world_size: int, seconds: float) -> None:
    """Watch this process from now on; it reports progress by ``mark``."""
    global _watchdog
    _watchdog = Watchdog(run_folder / FOLDER, rank, world_size, seconds)
    _watchdog.start()


def keep_traceback(error: BaseException) -> Path | None:
    """Write where ``error`` was raised beside the stacks. Returns the file; None without a run folder."""
    if _watchdog is None:
        return None
    path = _watchdog.folder / f"rank_{_watchdog.rank}.traceback"
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return None
    return path


def mark(doing: str) -> None:
    """Report progress, and what this rank does from now on. Cheap enough for several calls a step."""
    if _watchdog is not None:
        _watchdog.mark(doing)


def mark_again() -> None:
    """Report progress within what this rank does, such as a batch of an evaluation or a part of a file."""
    if _watchdog is not None:
        _watchdog.go_on()


def stop(leaves: bool = False) -> None:
    """Stop watching, if ``start`` was called. ``leaves``: this rank ends by an error that the others do not meet."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.close()
        if leaves:
            _watchdog.leave()
    _watchdog = None
