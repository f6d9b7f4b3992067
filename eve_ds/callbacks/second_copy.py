"""The second place of a run (checkpoint.second_place): a start takes what is newer there, and new files go there."""

from __future__ import annotations

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
from eve_ds.engine.second_place import SecondPlace
from eve_ds.engine.watchdog import mark, mark_again
from eve_ds.errors import NOT_COPIED, STOPPED
from eve_ds.weights.model_folder import CHECKPOINTS, newest_checkpoint

if TYPE_CHECKING:
    from eve_ds.config import FinetuneConfig, PretrainConfig
    from eve_ds.engine.trainer import Trainer

STOP_PATIENCE = 60.0  # seconds without a byte: the next start copies what is missing
_EVERY, _TOLD = 2.0, 30.0  # seconds between two looks of all ranks, and between two lines
_log = logging.getLogger(__name__)


class SecondCopy(Callback):
    """Hands checkpoints to a `BackgroundCopy` on rank 0. Does nothing without ``checkpoint.second_place``."""

    def __init__(self, config: PretrainConfig | FinetuneConfig) -> None:
        self._config, self._output = config, Path(config.output_dir)
        self._uri = None if config.dry_run else config.checkpoint.second_place
        self._copy: BackgroundCopy | None = None  # on rank 0
        self._taken = 0  # bytes downloaded

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
        place.check_owner(identity)
        if total_steps is not None:
            place.restore(identity, total_steps, self._config.checkpoint.resume, self._took)
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
            ``code``; NOT_COPIED in the place of 0 if something is missing there.
        """
        if self._uri is None:
            return code
        mark(f"copying to the second place {self._uri}")
        patience = min(patience, STOP_PATIENCE) if code == STOPPED else patience
        copied = _by_rank_0(lambda: self._finish(patience))
        return NOT_COPIED if not copied and code != STOPPED else code

    def _finish(self, patience: float) -> bool:
        assert self._copy is not None
        self._copy.submit()
        self._copy.start_patience()
        told = time.monotonic()
        while not self._copy.wait(min(_EVERY, patience)):
            why = f"; {self._copy.failure}" if self._copy.failure else ""
            if self._copy.idle_seconds() > patience:
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
        return True


def _by_rank_0(work: Callable[[], Any], moves: Callable[[], bool] = lambda: True) -> Any:
    """What ``work`` returns on rank 0, on all ranks. It may take longer than a collective: it runs in a thread, and the
    ranks meet meanwhile. Where ``moves`` stays false on rank 0, its watchdog ends the run."""
    pool = ThreadPoolExecutor(1, "second-place-main")
    future = pool.submit(work) if distributed.rank_and_world()[0] == 0 else None
    while not distributed.broadcast(future is not None and bool(wait([future], _EVERY).done)):
        if future is None or moves():
            mark_again()
    pool.shutdown(wait=False)
    return distributed.decide(lambda: future.result() if future else None)
