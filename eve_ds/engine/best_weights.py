"""``RUN/model_best``: a model folder with the weights of the best evaluation (``checkpoint.best``), and its record.

``best.json`` in it, {"metric", "mode", "value", "step"}, is written last.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.engine import distributed
from eve_ds.engine.first_weights import load_initial
from eve_ds.engine.watchdog import mark
from eve_ds.tasks.base import Task
from eve_ds.weights.model_folder import BEST, MODEL_BEST
from preprocessing.local_files import write_json

_log = logging.getLogger(__name__)


def read_best(run: Path) -> dict[str, Any]:
    """The record of the best weights in the folder of a run; empty if there is none, or an export was interrupted."""
    try:
        found = json.loads((run / MODEL_BEST / BEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_best(run: Path, record: dict[str, Any] | None) -> None:
    """Write the record, atomically; remove it for None, before the weights change. Called by rank 0."""
    file = run / MODEL_BEST / BEST
    if record is not None:
        write_json(file, record)
        return
    with contextlib.suppress(FileNotFoundError):
        file.unlink()


def load_best(task: Task, config: PretrainConfig | FinetuneConfig) -> dict[str, Any]:
    """Copy the best weights of a run that is at its end into ``task``, head and this rank's experts included.

    Called by all ranks, under ZeRO 3 while the weights are gathered.

    Returns:
        their record; empty without ``checkpoint.best``, or if there are none: then the weights stay, with a warning.
    Raises:
        UserError: the folder is damaged.
    """
    if config.checkpoint.best is None:
        return {}
    run = Path(config.output_dir)
    found = distributed.same_view(lambda: read_best(run), str(run / MODEL_BEST))
    if found:
        mark(f"the reading of {run / MODEL_BEST}")
        load_initial(task, run / MODEL_BEST, load_head=True)
    elif distributed.rank_and_world()[0] == 0:
        _log.warning("%s: holds no best weights; scored are those of the last step", run / MODEL_BEST)
    return found
