"""What Weights & Biases imports when a run begins, which waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import sys
from pathlib import Path
from tests.support.wandb_pieces import log
log(Path(sys.argv[1]), 0, 2, False, "offline")
print(sorted({"requests", "opentelemetry.sdk", "wandb.sdk.launch"} & set(sys.modules)))
"""


def test_an_offline_run_imports_nothing_that_sends(tmp_path: Path, repository: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    ended = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_inputs_for_launch_are_asked_for_if_any_may_be_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.sdk.wandb_run import Run

    from eve_ds.callbacks import wandb

    asked = Run._detect_and_apply_job_inputs
    monkeypatch.setitem(sys.modules, "wandb.sdk.launch", object())
    wandb._leave_out_launch()
    assert Run._detect_and_apply_job_inputs is asked
