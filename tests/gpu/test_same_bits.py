"""The demo's pre-training whole, from raw files to the export: the same bits twice, and after SIGTERM and resume."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.gpu.kit_sizes import Sizes
from tests.support.shapes import shapes_world

SECONDS = 200  # of one run; a hang, and no slow machine
SMALL = ["--engine.global_batch_size=16", "--engine.precision=fp32", "--data.num_workers=1"]  # the dry run


@pytest.fixture(scope="module")
def command(device: torch.device, sizes: Sizes, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    world = shapes_world(tmp_path_factory.mktemp("world"), splits=("train",))
    return [
        *(sys.executable, "-m", "eve_ds.pretrain", "--config=eve_ds/configs/tiny_shapes.yaml"),
        *(f"--data.path={world / 'data'}", f"--data.tokenizer={world / 'tokenizer'}", "--data.val_split=null"),
        *("--deepspeed_config=ds_configs/zero2.json", "--engine.expert_parallel_size=1", "--logging.wandb=false"),
        *(f"--optimizer.total_steps={sizes.steps}", *(SMALL if device.type == "cpu" else ["--data.num_workers=2"])),
    ]


def start(command: list[str], output: Path, repository: Path) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    output.parent.mkdir(exist_ok=True)
    with (output.parent / f"{output.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, f"--output_dir={output}"], cwd=repository, env=environment, stdout=log, stderr=log
        )


def finish(process: subprocess.Popen[bytes], output: Path, code: int) -> None:
    log = output.parent / f"{output.name}.log"
    try:
        assert process.wait(SECONDS) == code, log.read_text(errors="replace")[-3000:]
    finally:
        process.kill()


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def stop_midway(process: subprocess.Popen[bytes], output: Path, steps: int) -> None:
    """SIGTERM after ``steps`` of its steps."""
    limit = time.monotonic() + SECONDS
    while lines(output / "metrics.jsonl") < steps:
        assert process.poll() is None and time.monotonic() < limit, "it ended before the signal"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    finish(process, output, 75)


@pytest.mark.timeout(4 * SECONDS)
def test_the_same_bits_twice_and_after_sigterm(
    command: list[str], sizes: Sizes, tmp_path: Path, repository: Path
) -> None:
    names = ("stopped", "straight", "again")
    running = {name: start(command, tmp_path / name, repository) for name in names}  # side by side: most is start-up
    try:
        stopped = tmp_path / "stopped"
        stop_midway(running["stopped"], stopped, sizes.steps // 3)
        assert not (stopped / "model").exists() and lines(stopped / "metrics.jsonl") < sizes.steps
        running["stopped"] = start(command, stopped, repository)
        for name in names:
            finish(running[name], tmp_path / name, 0)
    finally:
        for process in running.values():
            process.kill()
    digests = {
        name: hashlib.sha256((tmp_path / name / "model" / "model.safetensors").read_bytes()).hexdigest()
        for name in names
    }
    assert len(set(digests.values())) == 1, digests
