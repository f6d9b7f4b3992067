"""A run folder's lock, between processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from eve_ds.config import PretrainConfig
from eve_ds.engine import run_folder


def test_a_run_folder_keeps_a_second_process_out(tmp_path: Path) -> None:
    config = PretrainConfig(output_dir=str(tmp_path / "run"))
    run_folder.claim(config)
    script = (
        "import sys; from eve_ds.config import PretrainConfig; from eve_ds.engine import run_folder\n"
        "from eve_ds.errors import run_command\n"
        "run_command(lambda: run_folder.claim(PretrainConfig(output_dir=sys.argv[1])) and None)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: --output_dir {tmp_path / 'run'}: another process trains or scores in it; wait for its end, or choose "
        "another folder\n"
    )
    command[-1] = str(tmp_path / "other")
    for _ in range(2):  # the lock goes with its process
        assert subprocess.run(command, capture_output=True, text=True).returncode == 0
