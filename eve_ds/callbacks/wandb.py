"""Weights & Biases: the run's curves and config, offline without a key. Its failures never stop the training."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import secrets
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eve_ds.engine.callback import Callback
from preprocessing.local_files import write_text

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

_log = logging.getLogger(__name__)
ID_FILE = "wandb_id"
REACH_TIMEOUT_S = 5.0  # seconds for a first answer of the server, else the run is logged offline
INIT_TIMEOUT_S = 60
FINISH_TIMEOUT_S = 120


class WandbLog(Callback):
    """Sends every record to one wandb run, on rank 0. ``logging.wandb: false`` leaves this callback out.

    Online if WANDB_API_KEY is set, else offline; WANDB_MODE takes precedence. If no server answers within five seconds,
    the run is logged offline, with a warning. Files go to ``output_dir/wandb``. All curves are drawn over ``step``, the
    optimizer step, so that steps repeated after a resume overwrite the earlier ones. The run's id is kept in
    ``output_dir/wandb_id``: a resumed run continues the same curves, and the offline parts become one run when uploaded
    (``wandb sync OUTPUT_DIR/wandb/offline-run-*``).

    A failure in here (no network, a full disk, wandb not installed) is logged as one warning and ends the logging to
    wandb, not the training.
    """

    def __init__(self, project: str = "eve-ds") -> None:
        self._project = project
        self._run: Any = None
        self._finished = False

    def fit_start(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        try:
            self._run = self._init(trainer)
        except Exception as error:  # noqa: BLE001  # see the class
            self._give_up(error)

    def _init(self, trainer: Trainer) -> Any:
        chosen = mode()
        if chosen == "online" and not reachable(base_url()):
            chosen = self._offline(trainer, f"{base_url()} does not answer")
        try:
            run = self._begin(trainer, chosen)
        except Exception as error:
            if chosen != "online":
                raise
            run = self._begin(trainer, self._offline(trainer, " ".join(str(error).split())))
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _offline(self, trainer: Trainer, reason: str) -> str:
        folder = trainer.output_dir / "wandb"
        _log.warning("Weights & Biases: %s; logged offline, `wandb sync %s/offline-run-*` uploads it", reason, folder)
        return "offline"

    def _begin(self, trainer: Trainer, mode: Any) -> Any:
        import wandb

        return wandb.init(
            project=self._project,
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
        self._log(record)

    def evaluation_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self._log(record)

    def _log(self, record: dict[str, float]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(record, step=int(record["step"]))
        except Exception as error:  # noqa: BLE001  # see the class
            self._give_up(error)

    def fit_end(self, trainer: Trainer) -> None:
        self._finished = True

    def close(self, trainer: Trainer) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=0 if self._finished else 1)
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
    """The server's URL."""
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


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
