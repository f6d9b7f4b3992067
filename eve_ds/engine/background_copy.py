"""Copies a run to its second place in a thread, so that training does not wait for it."""

from __future__ import annotations

import logging
import random
import shlex
import threading
import time
from pathlib import Path

from eve_ds.engine import checkpoint
from eve_ds.engine.checkpoint_record import DamagedError
from eve_ds.engine.second_place import GoneError, SecondPlace
from preprocessing.errors import shortened, without_secrets
from preprocessing.running.storage import RemotePath

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts: doubled from the one to the other
PATIENCE = 300.0  # seconds at the end of a run in which not one byte is taken
_BY_HAND = {
    "s3": "aws s3 cp --recursive {}/ {}/",
    "gs": "gcloud storage rsync -r {} {}",
    "hdfs": "hdfs dfs -put -f {}/* {}",
}
_log = logging.getLogger(__name__)


class BackgroundCopy:
    """Copies the newest of the checkpoints that it is given, with the run's other files, until that succeeds.

    A checkpoint that waits is replaced by a newer one. One that is being copied is finished first, and local rotation
    spares it; after a failure the newest is tried. Failures are warnings.

    Args:
        place: the second place.
        keep: newest checkpoints kept there.
        first_pause: seconds before the second attempt.
    """

    def __init__(self, place: SecondPlace, keep: int, first_pause: float = FIRST_PAUSE) -> None:
        self.place, self._keep, self._first_pause = place, keep, first_pause
        self._changed = threading.Condition()
        self._wanted: Path | None = None
        self._files = self._busy = False
        self._failures = 0  # in a row
        self._failure: str | None = None
        self.damage: str | None = None  # of the newest checkpoint that it was given: such a one is not copied
        self.bytes_moved, self._moved_at = 0, time.monotonic()
        self._thread: threading.Thread | None = None

    def submit(self, path: Path | None = None) -> None:
        """Copy this checkpoint and the files of the run, or these alone."""
        with self._changed:
            if path is not None:
                self._wanted = path
            self._files = True
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="second-place", daemon=True)
                self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait until everything is there, at most so long; returns whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._files or self._busy), seconds)

    def idle_seconds(self) -> float:
        """Since a byte was taken."""
        return time.monotonic() - self._moved_at

    @property
    def failure(self) -> str | None:
        """Why the last attempt failed; None if it did not."""
        return self._failure

    def by_hand(self) -> str:
        """A command that copies the run."""
        run, root = shlex.quote(str(self.place.run)), shlex.quote(str(self.place))
        scheme = str(self.place).partition("://")[0] if isinstance(self.place.root, RemotePath) else ""
        return _BY_HAND.get(scheme, "cp -r {}/. {}").format(run, root)

    def start_patience(self) -> None:
        """Count ``idle_seconds`` from now on."""
        self._moved_at = time.monotonic()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._files)
                path, self._wanted, self._files, self._busy = self._wanted, None, False, True
            done = self._attempt(path)
            with self._changed:
                self._busy = False
                if not done:  # a newer one replaces it
                    self._wanted, self._files = self._wanted or path, True
                self._changed.notify_all()
            if not done:
                pause = min(self._first_pause * 2 ** (self._failures - 1), LONGEST_PAUSE)
                time.sleep(pause * random.uniform(0.5, 1))  # several runs do not all come back at once

    def _attempt(self, path: Path | None) -> bool:
        """Whether nothing is left to do for ``path``."""
        try:
            if path is None:
                self.place.upload_files(self._moved)
            else:
                checkpoint.held.add(path)
                self.place.upload(path, self._keep, self._moved)
                self.damage = None
        except GoneError:
            return True
        except DamagedError as error:
            self.damage = str(error)
            _log.warning("%s: not copied to %s", error, self.place)
        except Exception as error:  # noqa: BLE001 - the thread must live, and the run hear of what nobody expected
            self._failed(error)
            return False
        finally:
            if path is not None:
                checkpoint.held.discard(path)
        if self._failures:
            _log.info("%s: is reached again", self.place)
        self._failures, self._failure = 0, None
        return True

    def _failed(self, error: Exception) -> None:
        self._failures = min(self._failures + 1, 64)
        self._failure = shortened(without_secrets(" ".join(str(error).split())) or type(error).__name__, 300)
        if self._failures & (self._failures - 1) == 0:  # at the first, second, fourth … attempt
            _log.warning("second place: %s (attempt %d); it is tried again", self._failure, self._failures)

    def _moved(self, count: int) -> None:
        self.bytes_moved += count
        self._moved_at = time.monotonic()
