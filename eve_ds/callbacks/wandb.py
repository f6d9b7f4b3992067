"""Weights & Biases: the run's curves and config, offline without a key. Its failures never stop the training."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import secrets
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eve_ds.callbacks.metric_groups import AXIS, grouped
from eve_ds.callbacks.metrics import FILE, lines_until
from eve_ds.callbacks.wandb_files import mend_and_read
from eve_ds.config_sections import LoggingConfig
from eve_ds.engine.callback import Callback
from preprocessing.local_files import write_text

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

_log = logging.getLogger(__name__)
ID_FILE = "wandb_id"
ATTACHED = ("config.yaml", "report.html")  # of the run folder
REACH_TIMEOUT_S = 5.0  # seconds for a first answer of the server, else the run is logged offline
INIT_TIMEOUT_S = 60
FINISH_TIMEOUT_S = 120


class WandbLog(Callback):
    """Sends every record to one wandb run, on rank 0. ``logging.wandb: false`` leaves this callback out.

    Online if WANDB_API_KEY is set, else offline; WANDB_MODE overrides that, and ``logging.wandb_mode`` both. If no
    server answers within five seconds, the run is logged offline, with a warning. Files go to ``output_dir/wandb``.
    Curves are grouped (see ``metric_groups``) and drawn over ``step``, the optimizer step. The run's id is kept in
    ``output_dir/wandb_id``: a resumed run continues the same curves, and the offline parts become one run when uploaded
    (``wandb sync OUTPUT_DIR/wandb/offline-run-*``).

    A step has one value of a metric: where a run resumes before steps that it has logged, the first values stay, online
    those that the server has, offline those of the run's earlier files. wandb's own process writes and sends every 15
    seconds: what a killed one took along is logged again from ``metrics.jsonl`` when the run resumes, up to the
    checkpoint; images are not.

    A failure in here (no network, a full disk, wandb not installed) is logged as one warning and ends the logging to
    wandb, not the training.

    Args:
        settings: the section ``logging``.
    """

    def __init__(self, settings: LoggingConfig) -> None:
        self._settings = settings
        self._run: Any = None
        self._finished = False
        self._logged: dict[int, set[str]] = {}  # keys by step, in earlier offline files
        self._sent = -1  # the last step that the server had when the run was resumed

    def fit_start(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        try:
            self._init(trainer)
        except Exception as error:  # noqa: BLE001  # see the class
            self._give_up(error)

    def _init(self, trainer: Trainer) -> None:
        chosen = self._settings.wandb_mode or mode()
        if chosen == "online" and not reachable(base_url()):
            chosen = self._offline(trainer, f"{base_url()} does not answer")
        last = self._look_back(trainer) if chosen == "offline" else None
        try:
            run = self._begin(trainer, chosen)
        except Exception as error:
            if chosen != "online":
                raise
            chosen = self._offline(trainer, " ".join(str(error).split()))
            last = self._look_back(trainer)
            run = self._begin(trainer, chosen)
        self._run = run
        run.define_metric(AXIS)
        run.define_metric("*", step_metric=AXIS)
        if chosen == "online":  # a server that was not reached before has nothing
            last = self._sent = run.starting_step - 1 if run.resumed else -1
        if last is not None and last < trainer.start_step:
            self._catch_up(trainer, last)

    def _look_back(self, trainer: Trainer) -> int | None:
        """The last step in the run's earlier offline files, if there are any."""
        found = mend_and_read(trainer.output_dir / "wandb", run_id(trainer.output_dir), trainer.start_step)
        self._logged = found.keys
        return found.last

    def _catch_up(self, trainer: Trainer, last: int) -> None:
        """Log the records of the steps after ``last`` up to the checkpoint, which a killed process took with it."""
        path = trainer.output_dir / FILE
        for line in lines_until(path, trainer.start_step) if path.exists() else []:
            record = json.loads(line)
            if record[AXIS] > last:
                self._log({key: value for key, value in record.items() if value is not None}, int(record[AXIS]))

    def _offline(self, trainer: Trainer, reason: str) -> str:
        folder = trainer.output_dir / "wandb"
        _log.warning("Weights & Biases: %s; logged offline, `wandb sync %s/offline-run-*` uploads it", reason, folder)
        return "offline"

    def _begin(self, trainer: Trainer, mode: Any) -> Any:
        import wandb

        # Its telemetry takes every process for one that is online, and imports what sends, unless it is told before.
        wandb.setup(wandb.Settings(mode=mode))
        return wandb.init(
            project=self._settings.wandb_project,
            entity=self._settings.wandb_entity,
            group=self._settings.wandb_group,
            tags=self._settings.wandb_tags or None,
            notes=self._settings.wandb_notes,
            name=trainer.output_dir.resolve().name,
            id=run_id(trainer.output_dir),
            resume="allow",
            mode=mode,
            dir=trainer.output_dir,
            job_type=trainer.task_name,
            config=dataclasses.asdict(trainer.config) | {"world_size": trainer.world_size},
            settings=wandb.Settings(
                console="off",  # its capture of stdout is slow and garbles the progress bar
                silent=True,
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
            ),
        )

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self._log(record, int(record[AXIS]))

    def evaluation_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self._log(record, int(record[AXIS]))

    def images_made(self, trainer: Trainer, images: dict[str, np.ndarray]) -> None:
        if self._run is None:
            return
        import wandb

        # Made inside: each is a file.
        self._guarded(lambda: self._log({name: wandb.Image(pixels) for name, pixels in images.items()}, trainer.step))

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        known = self._logged.get(step, set())
        new = {name: value for key, value in values.items() if (name := grouped(key)) not in known}
        if self._run is None or step <= self._sent or not new.keys() - {AXIS}:
            return
        self._guarded(lambda: self._run.log({AXIS: step, **new}, step=step))

    def alert(self, trainer: Trainer, title: str, text: str) -> None:
        if self._run is not None:
            self._guarded(lambda: self._run.alert(title, f"{trainer.output_dir}: {text}", level="WARN"))

    def fit_end(self, trainer: Trainer) -> None:
        self._finished = True
        if trainer.stopped_early:
            self.alert(trainer, "stopped", f"saved at step {trainer.step} on request; the same command goes on")

    def close(self, trainer: Trainer) -> None:
        if self._run is None:
            return
        if not self._finished and (error := sys.exc_info()[1]) is not None:  # the trainer closes in a finally clause
            self.alert(trainer, "ended by an error", f"step {trainer.step}: {error}")
        self._guarded(lambda: self._attach(trainer.output_dir))
        run, self._run = self._run, None
        if run is not None:
            self._guarded(lambda: run.finish(exit_code=0 if self._finished else 1))

    def _attach(self, folder: Path) -> None:
        """The run's own config and report, if there is one; below the run's name, since wandb has a config.yaml."""
        folder = folder.resolve()
        with contextlib.redirect_stderr(io.StringIO()):  # it warns of the link that it makes, whatever ``silent`` says
            for name in ATTACHED:
                if (folder / name).exists():
                    self._run.save(folder / name, base_path=folder.parent, policy="now")

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  # see the class
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = " ".join(str(error).split()) or type(error).__name__
        _log.warning("Weights & Biases logs no more of this run: %s", reason)


def mode() -> Any:
    """WANDB_MODE if it is set, else "online" with a key and "offline" without."""
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def base_url() -> str:
    """The server's URL: WANDB_BASE_URL, that of ``wandb login --host``, or wandb's own."""
    from wandb.sdk import wandb_setup

    return os.environ.get("WANDB_BASE_URL") or wandb_setup.singleton().settings.base_url


def reachable(url: str) -> bool:
    """Whether a server answers within `REACH_TIMEOUT_S`, with any status. Respects the proxy variables."""
    found = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=REACH_TIMEOUT_S).close()
        except urllib.error.HTTPError:
            found.set()
        except (OSError, ValueError) as error:
            if isinstance(getattr(error, "reason", None), ssl.SSLError):  # wandb may trust its certificate
                found.set()
        else:
            found.set()

    # In a thread, because name resolution has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_TIMEOUT_S)
    return found.is_set()


def run_id(output_dir: Path) -> str:
    """The id kept in ``output_dir``, or a new random one if there is none or it is damaged."""
    path = output_dir / ID_FILE
    stored = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
    if re.fullmatch(r"[0-9a-z]{8}", stored):
        return stored
    new = secrets.token_hex(4)
    write_text(path, new + "\n")
    return new
