"""Comparison of the shards with the hashes in their manifests, before a run or during it.

A flipped bit in an image or a text changes no size, and most decoders accept it. `data.verify` says when the SHA-256 of
each shard is computed: `full`, by all ranks before the first step; `background`, during training by one process of the
lowest priority per host; `off`, never. Sizes are compared whenever a split is opened.

If the background process finds a damaged shard, the run saves and ends with exit code 2: one shard has hardly changed
what the run learned, and the same command resumes it once the shard is repaired.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eve_ds.data import hashing_process
from eve_ds.data.shards import Shard
from eve_ds.engine import watchdog
from eve_ds.engine.callback import Callback
from eve_ds.engine.distributed import gather, host, launched_world
from preprocessing.errors import UserError

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

RATE = 64 << 20  # bytes per second that the process reads, at most; takes a tenth of a core
VERIFIED = ".verified"  # file in the run folder
END_SECONDS = 30.0  # that a finished run waits for the process
_log = logging.getLogger(__name__)
_MEND = (
    "copy or prepare it again (python -m preprocessing verify names the rows), then start the same command: it goes on"
)


def before_and_while(verify: str | bool, shards: Sequence[Shard], trains: bool = True) -> list[Callback]:
    """Verify now what `data.verify` wants before the run, and return the callback for what it wants during it.

    With `trains` False, `background` verifies now, since such a run is too short. Called by all ranks; raises as
    `verify_now`.
    """
    if verify == "off":
        return []
    if verify == "full" or not trains:
        verify_now(shards)
        return []
    return [VerifyShards(shards)]


def verify_now(shards: Sequence[Shard]) -> None:
    """Compare all shards with their hashes, shared among the ranks. Called by all ranks.

    First each file is read by one rank. Then the ranks of each host read its own copies of files, if any.

    Raises:
        UserError: on all ranks, naming the first damaged shard.
    """
    rank, world_size, _ = launched_world()
    sound, faults = _in_rounds(shards[rank::world_size])
    if not faults:
        here = [number for number, name in enumerate(gather(host())) if name == host()]
        left = [shard for shard in shards if not _is_known(shard, sound)]
        faults = _in_rounds(left[here.index(rank) :: len(here)])[1]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"data.verify: {faults[0]}{more}; {_MEND}")


def _in_rounds(mine: Sequence[Shard]) -> tuple[set[hashing_process.Key], list[str]]:
    """(keys of undamaged files, faults) found by all ranks in their shards ``mine``.

    The ranks synchronize after each shard, so that a collective waits at most for one shard.
    """
    sound: set[hashing_process.Key] = set()
    faults: list[str] = []
    watchdog.mark("the comparison of shards with their hashes")
    for number in range(max(gather(len(mine)))):
        found: tuple[str, hashing_process.Key | None] = ("", None)
        if number < len(mine):
            shard = mine[number]
            _, fault, key = hashing_process.check(
                str(shard.path), shard.bytes, shard.sha256, lambda count: watchdog.mark_again()
            )
            found = (f"{shard.path}: {fault}" if fault else "", key)
        for fault, key in gather(found):
            faults += [fault] if fault and fault not in faults else []
            sound |= {key} if key else set()
    return sound, faults


def _is_known(shard: Shard, known: set[hashing_process.Key]) -> bool:
    try:
        return hashing_process.key_of(os.stat(shard.path), shard.sha256) in known
    except OSError:
        return False


class VerifyShards(Callback):
    """Starts a process on each host that verifies the shards while the run trains (`data.verify: background`).

    Args:
        shards: of all splits that the run reads.
        rate: bytes per second that each process reads, at most.
    """

    def __init__(self, shards: Sequence[Shard], rate: float = RATE) -> None:
        self._shards, self._rate = list(shards), rate
        random.Random(host()).shuffle(self._shards)  # hosts share results for the same files
        self._process: subprocess.Popen[bytes] | None = None
        self._output = b""  # output of the process that is not a complete line yet
        self._seen = 0  # shards that the process has reported
        self._fault = ""

    def fit_start(self, trainer: Trainer) -> None:
        if launched_world()[2] != 0 or not self._shards:
            return
        # In a session of its own, where a launcher's signals to the group do not reach it. It ends with this process.
        self._process = subprocess.Popen(
            [sys.executable, "-P", hashing_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        job = {
            "shards": [[str(shard.path), shard.bytes, shard.sha256] for shard in self._shards],
            "record": str(trainer.output_dir / VERIFIED),
            "host": host(),
            "rate": self._rate,
            "parent": os.getpid(),
        }
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # it printed why it ended; `fit_end` says how far it came
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        os.set_blocking(self._process.stdout.fileno(), False)

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        if self._process is not None and not self._fault:
            self._look()
            trainer.stop.requested = trainer.stop.requested or bool(self._fault)

    def fit_end(self, trainer: Trainer) -> None:
        """Raises UserError, on all ranks, where a shard is damaged."""
        if self._process is not None and not trainer.stopped_early:
            self._wait()
        if fault := next(filter(None, gather(self._fault)), ""):
            raise UserError(f"data.verify: {fault}; the run is saved at step {trainer.step}; {_MEND}")
        if self._process is not None and trainer.is_main and self._seen < len(self._shards):
            _log.info(
                "data.verify: %d of %d shards were compared with their hashes so far; `python -m preprocessing verify` "
                "does the rest",
                self._seen,
                len(self._shards),
            )

    def close(self, trainer: Trainer) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _wait(self) -> None:
        """Let the process read at full speed for up to END_SECONDS."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()
        deadline = time.monotonic() + END_SECONDS
        while not self._fault and self._seen < len(self._shards) and time.monotonic() < deadline:
            if self._process.poll() is not None:
                self._look()
                return
            self._look()
            time.sleep(0.02)

    def _look(self) -> None:
        """Read the output of the process."""
        assert self._process is not None and self._process.stdout is not None
        self._output += self._process.stdout.read() or b""
        *whole, self._output = self._output.split(b"\n")
        for line in whole:
            found = json.loads(line)
            self._seen += found["state"] != "unread"
            if found["state"] == "damaged":
                self._fault = f"{found['file']}: {found['fault']}"
                return
            if found["state"] == "unread":
                _log.warning("data.verify: %s: %s", found["file"], found["fault"])
