"""Runs that are stopped from outside: what they save, and that they leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.processes import ranks_of, run, stop_processes, wait_until
from tests.cluster.runs import TinyRun
from tests.cluster.slurm import ended, submit

ENDLESS = "--optimizer.total_steps=1000000"


def trains(output: Path) -> bool:
    metrics = output / "metrics.jsonl"
    return metrics.is_file() and metrics.read_text(encoding="utf-8").count("\n") > 1


def test_scancel_saves_a_checkpoint(
    repository: Path, tiny_run: TinyRun, environment: Mapping[str, str], slurm: dict[str, str], tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "job.log"
    ours = {name: value for name, value in environment.items() if not name.startswith("MASTER_")} | slurm
    job = ["--nodes=2", "--ntasks-per-node=1", f"--output={log}", "launch/slurm/pretrain.sbatch"]
    number = submit([*job, *tiny_run.arguments(output), ENDLESS], ours, repository)
    wait_until(lambda: trains(output), "the first training steps", seconds=120)
    run(["scancel", number], ours, repository)
    assert ended(number, ours, repository) == "CANCELLED"
    assert list((output / "checkpoints").glob("step_*/complete.json")), log.read_text()


def test_killed_ranks_leave_nothing_in_shared_memory(
    repository: Path, tiny_run: TinyRun, environment: Mapping[str, str], tmp_path: Path
) -> None:
    """conftest.py's fixture looks into /dev/shm."""
    output, log = tmp_path / "run", tmp_path / "log"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2"]
    port = f"--master_port={environment['MASTER_PORT']}"
    command = [*launcher, port, "--module", "eve_ds.pretrain", *tiny_run.arguments(output), ENDLESS]
    marker = tmp_path / "marker"
    with log.open("wb") as stream:
        started = subprocess.Popen(
            command,
            env=dict(environment) | {"EVE_DS_TEST_FOLDER": str(marker)},
            cwd=repository,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
    try:
        wait_until(lambda: trains(output), f"the first training steps\n{log.read_text()}", seconds=120)
        ranks = ranks_of(marker)
        assert len(ranks) == 2
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        assert started.wait(timeout=60) != 0
    finally:
        stop_processes(marker)
        started.wait()
