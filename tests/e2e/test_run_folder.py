"""A run folder's lock, between processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from eve_ds.config import PretrainConfig
from eve_ds.engine import run_folder
from eve_ds.engine.identity import identity_of


def test_a_run_folder_keeps_a_second_process_out(tmp_path: Path) -> None:
    config = PretrainConfig(output_dir=str(tmp_path / "run"))
    run_folder.claim(config, identity_of(config, {}))
    script = (
        "import sys; from eve_ds.config import PretrainConfig; from eve_ds.engine import run_folder\n"
        "from eve_ds.engine.identity import identity_of\n"
        "from eve_ds.errors import run_command\n"
        "def main():\n"
        "    for config in map(lambda folder: PretrainConfig(output_dir=folder), sys.argv[1:]):\n"
        "        run_folder.claim(config, identity_of(config, {}))\n"
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
