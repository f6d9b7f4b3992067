"""A process that compares shards with their SHA-256 while a run trains; eve_ds.engine.verification starts it.

Run by its path, with the standard library alone: it is up in 50 ms and takes 10 MB. It gives way to everything else
(nice 19, by which its reads come last, too), reads no faster than it is told to, and ends with its parent.

On stdin one JSON object: `shards` ([path, bytes, sha256] each), `record` (a folder), `host`, `rate` (bytes a second).
When stdin ends, the run has no more steps, and the rate holds no longer. On stdout a JSON object a shard: `file`,
`state` (sound, damaged, unread) and `fault`.

What was found sound is appended to `record/HOST.jsonl`, and whatever a file there lists is not read again: by a resumed
run, nor by another host that sees the same file. A file is known by its inode, time of change, size and hash: a copy on
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
    """What a verified file is known by."""
    return sha256, found.st_size, found.st_ino, found.st_ctime_ns


def recorded(folder: Path) -> set[Key]:
    """What all hosts have verified; a line that is damaged or half written is none."""
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
    """Compare a file with its size and hash. Returns its state, what is wrong with it, and its key where it is sound.

    Args:
        pace: called with the number of bytes of each chunk that was read.
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
    """Sleeps as long as reading is ahead of the rate; until stdin ends."""

    def __init__(self, rate: float) -> None:
        self._rate, self._due = rate, time.monotonic()  # when the next chunk may be read

    def __call__(self, count: int) -> None:
        now = time.monotonic()
        self._due = max(self._due, now) + count / self._rate
        wait = self._due - now
        if wait > 0 and select.select([sys.stdin.buffer], [], [], wait)[0]:
            self._rate = float("inf")


def _give_way(parent: int) -> None:
    os.nice(19)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def main() -> None:
    """Check the shards that stdin names."""
    job = json.loads(sys.stdin.buffer.readline())
    _give_way(job["parent"])
    folder = Path(job["record"])
    folder.mkdir(parents=True, exist_ok=True)
    pace = _Pace(float(job["rate"]))
    with open(folder / f"{job['host']}.jsonl", "a", encoding="utf-8") as record:
        for path, size, sha256 in job["shards"]:
            state, fault, key = "sound", "", None
            try:
                known = key_of(os.stat(path), sha256) in recorded(folder)
            except OSError:
                known = False  # `check` says why
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
    except OSError as problem:  # no room for the record, or the run has gone
        sys.exit(f"data.verify: {problem}")
