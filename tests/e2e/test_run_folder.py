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
        "def main():\n"
        "    for folder in sys.argv[1:]: run_folder.claim(PretrainConfig(output_dir=folder))\n"
        "run_command(main)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "other"), str(tmp_path / "run")]
    refused = subprocess.run(command, capture_output=True, text=True)  # the other folder is its own until it ends
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: --output_dir {tmp_path / 'run'}: another process trains or scores in it; wait for its end, or choose "
        "another folder\n"
    )
    assert (tmp_path / "other" / run_folder.LOCK).exists()  # and the lock goes with its process
    assert subprocess.run(command[:-1], capture_output=True, text=True).returncode == 0
