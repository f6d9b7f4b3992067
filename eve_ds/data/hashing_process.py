"""A process that compares shards with their SHA-256 during training; eve_ds.engine.verification starts it.

It is run by its path and imports the standard library only: it starts in 50 ms and takes 10 MB. It has the lowest
priority for processor and disk (nice 19), reads at a limited rate, and ends with its parent.

stdin holds one JSON object: ``shards`` (a list of [path, bytes, sha256]), ``record`` (a folder), ``host``, ``parent``
(a process id) and ``rate`` (bytes per second). When stdin ends, training is over and the rate no longer applies. stdout
gets one JSON object per shard: ``file``, ``state`` (sound, damaged, unread) and ``fault``.

Verified files are appended to ``record/HOST.jsonl``. Files listed there are not read again, neither by a resumed run
nor by another host that sees the same file. A file is identified by its inode, time of change, size and hash: a copy on
a node's own disk is another file.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

CHUNK = 4 << 20
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Key = tuple[str, int, int, int]  # SHA-256, bytes, inode, time of change in ns


def key_of(found: os.stat_result, sha256: str) -> Key:
    """Identity of a verified file."""
    return sha256, found.st_size, found.st_ino, found.st_ctime_ns


def recorded(folder: Path) -> set[Key]:
    """Keys of the files that all hosts have verified; damaged or incomplete lines are skipped."""
    keys: set[Key] = set()
    for path in folder.glob("*.jsonl") if folder.is_dir() else ():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                sha256, size, inode, changed = json.loads(line)["key"]
                keys.add((str(sha256), int(size), int(inode), int(changed)))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                continue
    return keys


def check(path: str, size: int, sha256: str, pace: Any = None) -> tuple[str, str, Key | None]:
    """Compare a file with its size and hash. Returns its state, the fault, and its key if it is sound.

    Args:
        pace: called with the number of bytes after each chunk.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            digest, chunk = hashlib.sha256(), bytearray(CHUNK)
            while count := file.readinto(chunk):
                digest.update(memoryview(chunk)[:count])
                if pace is not None:
                    pace(count)
            after = os.fstat(file.fileno())
    except OSError as error:
        return "unread", f"cannot be read ({error.strerror})", None
    if before.st_size != size:
        return "damaged", f"has {before.st_size} bytes, the manifest says {size}", None
    if digest.hexdigest() != sha256:
        return "damaged", "its SHA-256 is not the manifest's, its bytes have changed", None
    return "sound", "", key_of(before, sha256) if before.st_ctime_ns == after.st_ctime_ns else None


class _Pace:
    """Limits the read rate by sleeping, until stdin ends."""

    def __init__(self, rate: float) -> None:
        self._rate, self._due = rate, time.monotonic()  # when the next chunk may be read

    def __call__(self, count: int) -> None:
        now = time.monotonic()
        self._due = max(self._due, now) + count / self._rate
        wait = self._due - now
        if wait > 0 and select.select([sys.stdin.buffer], [], [], wait)[0]:
            self._rate = float("inf")


def _set_low_priority(parent: int) -> None:
    os.nice(19)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def main() -> None:
    """Check the shards given on stdin."""
    job = json.loads(sys.stdin.buffer.readline())
    _set_low_priority(job["parent"])
    folder = Path(job["record"])
    folder.mkdir(parents=True, exist_ok=True)
    pace = _Pace(float(job["rate"]))
    with open(folder / f"{job['host']}.jsonl", "a", encoding="utf-8") as record:
        for path, size, sha256 in job["shards"]:
            state, fault, key = "sound", "", None
            try:
                known = key_of(os.stat(path), sha256) in recorded(folder)
            except OSError:
                known = False  # ``check`` reports the error
            if not known:
                state, fault, key = check(path, size, sha256, pace)
            if key is not None:
                record.write(json.dumps({"file": path, "key": key}) + "\n")
                record.flush()
            sys.stdout.write(json.dumps({"file": path, "state": state, "fault": fault}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except OSError as problem:  # no space for the record, or the run has ended
        sys.exit(f"data.verify: {problem}")
