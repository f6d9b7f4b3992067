"""A rank that gets no further says so: who waits, where, for whom, and the stacks of all ranks in the run folder.

Each rank writes what it does into RUN/ranks/rank_N.json, from a thread: each minute, and often once it waits. When a
rank has come no further for ``engine.timeout_seconds``, it writes its stacks beside that (rank_N.stacks) and asks the
others for theirs, looks twice at what the others wrote, names those that are stopped or behind, and ends with exit
code 3 (one without others tells, and waits on). A collective by itself waits for half an hour, or for ever, and names
nobody.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eve_ds.engine.signals import end, say

FOLDER = "ranks"  # of the run folder
ASKED = "stacks_wanted"  # in it: all ranks are to write their stacks
SLOWEST_LOOK = 8.0  # seconds between two looks at the clock, at most
PATIENCE = 6  # such intervals are given to the run folder; to find whom a rank waits for takes four
HEALTHY_BEAT = 60.0  # seconds between two signs of life of a rank that gets on


class Watchdog:
    """Watches over one rank.

    Args:
        folder: RUN/ranks, which all ranks see.
        rank, world_size: as in the process group.
        seconds: ``engine.timeout_seconds``.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, seconds: float) -> None:
        self.folder, self.rank, self.world_size, self.seconds = folder, rank, world_size, seconds
        self.interval = min(SLOWEST_LOOK, seconds / 10)
        self.doing, self._since, self._marks, self._beats = "the set-up", time.monotonic(), 0, 0
        self._asked_at: float | None = None  # when stacks were last wanted
        self._wanted = False  # since this start
        self._beaten = -HEALTHY_BEAT  # when it last wrote
        self._ended = threading.Event()
        self._files: threading.Thread | None = None  # at work on the run folder

    def start(self) -> None:
        """Begin to watch; an earlier request for stacks is not heeded."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def mark(self, doing: str) -> None:
        """The rank has come further: what it does now."""
        self.doing, self._since, self._marks = doing, time.monotonic(), self._marks + 1

    def go_on(self) -> None:
        """The rank gets on with what it does; not counted, for ranks may do so unequally often."""
        self._since = time.monotonic()

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()

    def _watch(self) -> None:
        self._in_folder(self._begin)
        looked = time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            if now - looked > 3 * self.interval + 1:  # this process itself was stopped (scontrol suspend, Ctrl-Z)
                self._since += now - looked
            beats = self._wanted or now - self._since > self.seconds / 4 or now - self._beaten > HEALTHY_BEAT
            self._in_folder(lambda beats=beats: self._look(beats))  # type: ignore[misc]
            if now - self._since > self.seconds:
                since, found = self._since, [""]
                self._in_folder(lambda found=found: found.insert(0, self._find_culprit()))  # type: ignore[misc]
                line = self._line(found[0])
                if self._since == since and not self._ended.is_set():
                    say(f"error: {line}")
                    if self.world_size > 1:
                        end(3)
                    self._since = time.monotonic()  # alone, it has nobody to wait for: tell, and tell again
            looked = time.monotonic()  # what the storage took is no stop of this process

    def _in_folder(self, work: Callable[[], None]) -> None:
        """Do what reads and writes the run folder in a thread of its own: storage that hangs must not silence us."""
        if self._files is not None and self._files.is_alive():
            return
        self._files = threading.Thread(target=work, name="watchdog-files", daemon=True)
        self._files.start()
        self._files.join(PATIENCE * self.interval)

    def _begin(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            os.close(
                os.open(self.folder / ASKED, os.O_CREAT, 0o666)
            )  # NFS keeps in mind for a minute what is not there
        self._others_ask()
        self._wanted = False
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
            with open(self.folder / ASKED) as file:  # NFS asks its server when a file is opened, and not for stat
                asked_at = os.fstat(file.fileno()).st_mtime
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
        """Write and ask for stacks, and find out whom this rank waits for; takes four beats."""
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
        """``who``: empty where the run folder did not answer."""
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
    """Remove what the ranks of an earlier start have written of themselves. Called by rank 0 before any ``start``."""
    for left in (run_folder / FOLDER).glob("rank_*.json"):
        with contextlib.suppress(OSError):
            left.unlink()


def start(run_folder: Path, rank: int, world_size: int, seconds: float) -> None:
    """Watch over this process from now on; ``mark`` tells what it does."""
    global _watchdog
    _watchdog = Watchdog(run_folder / FOLDER, rank, world_size, seconds)
    _watchdog.start()


def mark(doing: str) -> None:
    """This rank has come further. Cheap: a step may do it often."""
    if _watchdog is not None:
        _watchdog.mark(doing)


def mark_again() -> None:
    """This rank gets on with what it does, as by a batch of an evaluation or a part of a file."""
    if _watchdog is not None:
        _watchdog.go_on()


def stop() -> None:
    """Watch no longer; nothing was started, perhaps."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.close()
    _watchdog = None
