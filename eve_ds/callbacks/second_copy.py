"""The second place of a run (checkpoint.second_place): a start takes what is newer there, and new files go there."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eve_ds.engine import background_copy, distributed
from eve_ds.engine.background_copy import BackgroundCopy
from eve_ds.engine.callback import Callback
from eve_ds.engine.identity import Identity
from eve_ds.engine.second_place import OPTION, SecondPlace
from eve_ds.engine.signals import StopRequest
from eve_ds.engine.watchdog import mark, mark_again
from eve_ds.errors import NOT_COPIED, STOPPED, RankError, StopError
from eve_ds.weights.model_folder import CHECKPOINTS, newest_checkpoint
from preprocessing.errors import UserError

if TYPE_CHECKING:
    from eve_ds.config import FinetuneConfig, PretrainConfig
    from eve_ds.engine.trainer import Trainer

STOP_PATIENCE = 60.0  # seconds without a byte: the next start copies what is missing
ERROR_SECONDS = 10.0  # given to the copy before an error is told: launchers end all ranks then
_EVERY, _TOLD = 2.0, 30.0  # seconds between two looks of all ranks, and between two lines
_log = logging.getLogger(__name__)


class SecondCopy(Callback):
    """Hands checkpoints to a `BackgroundCopy` on rank 0. Does nothing without ``checkpoint.second_place``.

    Also the context of a run: what ends it with an exception is followed by a wait for the copy, too.

    Args:
        config: the resolved tree.
        stop: the requests to stop of this rank.
    """

    def __init__(self, config: PretrainConfig | FinetuneConfig, stop: StopRequest) -> None:
        self._config, self._output, self._stop = config, Path(config.output_dir), stop
        self._uri = None if config.dry_run else config.checkpoint.second_place
        self._copy: BackgroundCopy | None = None  # on rank 0
        self._taken = 0  # bytes downloaded
        self._code, self._patience = 0, background_copy.PATIENCE

    def __enter__(self) -> SecondCopy:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, StopError) and error.agreed:
            self.finish(STOPPED)
        elif isinstance(error, UserError | OSError) and not isinstance(error, RankError) and self._copy is not None:
            self._copy.submit()
            with contextlib.suppress(StopError):  # of the launcher, as another rank has ended: the error says why
                self._copy.wait(ERROR_SECONDS)

    def begin(self, identity: Identity, total_steps: int | None) -> None:
        """Check that the place can be written to, and take what is newer there. Called by all ranks, before resuming.

        Args:
            total_steps: of the run; None if it does not train, and nothing is taken.
        Raises:
            UserError: the place cannot be used, or holds another run.
        """
        if self._uri is None:
            return
        mark(f"a look at the second place {self._uri}")
        before = 0

        def moves() -> bool:
            nonlocal before
            before, last = self._taken, before
            return before != last

        _by_rank_0(lambda: self._begin(str(self._uri), identity, total_steps), moves)

    def _begin(self, uri: str, identity: Identity, total_steps: int | None) -> None:
        place = SecondPlace(uri, self._output)
        place.check()
        try:
            place.check_owner(identity)
            if total_steps is not None:
                place.restore(identity, total_steps, self._config.checkpoint.resume, self._took)
        except OSError as error:  # of a read over the network: it names no file
            raise UserError(f"{OPTION}: {uri}: {error}; start again") from error
        self._copy = BackgroundCopy(place, self._config.checkpoint.keep)

    def _took(self, count: int) -> None:
        self._taken += count

    def fit_start(self, trainer: Trainer) -> None:
        if self._copy is not None and (newest := newest_checkpoint(self._output / CHECKPOINTS)):
            self._copy.submit(newest)  # an earlier process may have been killed before it had copied it

    def checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        if self._copy is not None:
            self._copy.submit(path)

    def finish(self, code: int, patience: float = background_copy.PATIENCE) -> int:
        """Wait until everything is copied, or no byte was taken for ``patience`` seconds (a run that stops: a minute).

        Called by all ranks, at the end.

        Returns:
            ``code``, or STOPPED if a rank was asked to stop meanwhile; NOT_COPIED in the place of 0 if something is
            missing there.
        """
        if self._uri is None:
            return code
        mark(f"copying to the second place {self._uri}")
        self._code, self._patience = code, patience
        with self._stop.deferred():
            copied = _by_rank_0(self._finish, meet=self._look_for_stops)
        return NOT_COPIED if not copied and self._code != STOPPED else self._code

    def _look_for_stops(self) -> None:
        if any(distributed.gather(self._stop.requested)):
            self._stop.acted_on()
            self._code = STOPPED
        if self._code == STOPPED:
            self._patience = min(self._patience, STOP_PATIENCE)

    def _finish(self) -> bool:
        assert self._copy is not None
        self._copy.submit()
        self._copy.start_patience()
        told = time.monotonic()
        while not self._copy.wait(min(_EVERY, self._patience)):
            why = f"; {self._copy.failure}" if self._copy.failure else ""
            if self._copy.idle_seconds() > self._patience:
                _log.error(
                    "%s lacks a part of this run, which is whole in %s%s; the same command tries again, or copy it by "
                    "hand: %s",
                    self._copy.place,
                    self._output,
                    why,
                    self._copy.by_hand(),
                )
                return False
            if time.monotonic() - told > _TOLD:
                told = time.monotonic()
                _log.info("copying to %s: %.2f GB so far%s", self._copy.place, self._copy.bytes_moved / 1e9, why)
        if self._copy.damage:
            _log.error("%s lacks the newest checkpoint, which is damaged: %s", self._copy.place, self._copy.damage)
        return self._copy.damage is None


def _by_rank_0(
    work: Callable[[], Any], moves: Callable[[], bool] = lambda: True, meet: Callable[[], None] = lambda: None
) -> Any:
    """What ``work`` returns on rank 0, on all ranks. It may take longer than a collective: it runs in a thread, and the
    ranks meet meanwhile, and call ``meet``. Where ``moves`` stays false on rank 0, its watchdog ends the run."""
    pool = ThreadPoolExecutor(1, "second-place-main")
    future = pool.submit(work) if distributed.rank_and_world()[0] == 0 else None
    done = False
    while not done:
        done = distributed.broadcast(future is not None and bool(wait([future], _EVERY).done))
        meet()
        if future is None or moves():
            mark_again()
    pool.shutdown(wait=False)
    return distributed.decide(lambda: future.result() if future else None)
