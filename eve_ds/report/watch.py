"""``--watch``: the page of a run is written again while the run trains, until it is finished."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from evaluation.common import InputError, write_text
from eve_ds.report.compared import Compared, read_training
from eve_ds.report.html import Html
from eve_ds.report.run_files import STAGES, number
from eve_ds.weights.model_folder import MODEL, checkpoints, exported_step, step_of

DEFAULT_SECONDS = 15
MOST_SECONDS = 86_400
_log = logging.getLogger(__name__)


@dataclass
class Watched:
    """How far a run is.

    Attributes:
        status: a sentence for the page.
        refresh: seconds until the page is written again; None if it is not.
    """

    status: str
    refresh: int | None


def watch(folder: Path, out: Path, seconds: int, build: Callable[[Path, Watched | None], Html]) -> None:
    """Write the page at ``out`` every ``seconds``, until the run is finished. The last page does not reload itself, nor
    does that which Ctrl-C leaves.

    Raises:
        InputError: the folder holds no run, or the page cannot be written. While the run trains, a file that is about
            to be replaced is no error: the page is written the next time.
        KeyboardInterrupt: of Ctrl-C, after the last page is written.
    """
    written = False
    try:
        while True:
            try:
                state = progress(folder, seconds)
                content = build(folder, state)
            except InputError as error:
                if not written:
                    raise
                _log.warning("%s; trying again in %d s", error, seconds)
            else:
                write_text(out, content)
                if not written:
                    print(f"writing {out} every {seconds} s; Ctrl-C ends it", flush=True)
                written = True
                if state.refresh is None:
                    print(f"wrote {out} for the last time: the run is finished")
                    return
            time.sleep(seconds)
    except KeyboardInterrupt:
        if written:
            write_text(out, build(folder, Watched(progress(folder, None).status, None)))
        raise


def progress(folder: Path, seconds: int | None, now: float | None = None) -> Watched:
    """How far the run is that trains in ``folder``, or in a stage of it.

    Args:
        folder: of a training run or of the demo.
        seconds: between two pages.
        now: seconds since the epoch; None takes the clock.
    """
    now = time.time() if now is None else now
    if (folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file():
        trained = [folder]
    else:
        trained = [folder / name for name in STAGES if (folder / name / "config.yaml").is_file()]
    if not trained:
        return Watched(f"Waiting for the first step{_written(now)}", seconds)
    run = read_training(trained[-1])
    finished = _finished(run) if trained[0] == folder else (folder / "metrics.json").is_file()
    where = "" if trained[0] == folder else f"{run.name}: "
    step, total = _step(run), total_steps(run)
    of = "" if total is None else f" of {total:,}"
    if finished:
        return Watched(f"{where}finished at step {step:,}{of}{_written(now)}", None)
    return Watched(
        f"{where}training, step {step:,}{of}{_ago(run.stage.folder / 'metrics.jsonl', now)}{_written(now)}", seconds
    )


def _step(run: Compared) -> int:
    curve = run.stage.curves.get("loss")
    return int(curve.steps[-1]) if curve else 0


def total_steps(run: Compared) -> int | None:
    """Optimizer steps of the whole run; None if neither its newest start nor its config tells."""
    found = number(run.start.get("total_steps")) or number(run.config.get("optimizer.total_steps"))
    return int(found) if found else None


def _finished(run: Compared) -> bool:
    """Whether the last thing that a run leaves is there: the exported model, or without one the scores of a
    fine-tuning and the last checkpoint of a pre-training."""
    total, exports = total_steps(run), run.config.get("checkpoint.export", True)
    if exports and run.config.get("checkpoint.patience"):
        total = max(_step(run), 1)  # it may end before
    if total is None or _step(run) < total:
        return False
    if exports:
        exported = exported_step(run.stage.folder / MODEL)
        return exported is not None and exported >= total
    if not run.pretrains:
        return any(run.stage.folder.glob(f"predictions_{run.config.get('split')}.*"))
    return any(step_of(path) >= total for path in checkpoints(run.stage.folder))


def _ago(path: Path, now: float) -> str:
    try:
        return f", last record {max(0, now - path.stat().st_mtime):.0f} seconds ago"
    except OSError:
        return ", no record yet"


def _written(now: float) -> str:
    return f" (written at {datetime.fromtimestamp(now):%H:%M:%S})."
