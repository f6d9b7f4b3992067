"""What Weights & Biases imports when a run begins, which waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RUN = """
import sys
from pathlib import Path
from tests.support.wandb_pieces import log
log(Path(sys.argv[1]), 0, 2, False, "offline")
print(sorted({"requests", "opentelemetry.sdk"} & set(sys.modules)))
"""


def test_an_offline_run_imports_nothing_that_sends(tmp_path: Path, repository: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    ended = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
