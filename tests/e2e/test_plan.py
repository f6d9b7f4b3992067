"""``python -m eve_ds.plan`` as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eve_ds.plan.work import days
from tests.support import ranks

CHOSEN = ("--world_size", "4", "--expert_parallel_size", "2", "--device", "cpu", "--device_memory", "64MiB")


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eve_ds.plan", *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=ranks.LIMIT,
        check=False,
    )


def test_the_command(tmp_path: Path, repository: Path) -> None:
    out = tmp_path / "plan.json"
    recipe = str(repository / "eve_ds/configs/tiny_shapes.yaml")
    averaging = ("--optimizer.ema", "0.9", "--engine.precision", "fp32")
    speed = ("--mfu", "0.4", "--peak_tflops", "989")
    done = command(
        "--config", recipe, *CHOSEN, *averaging, "--zero", "3", "--pairs", "16e6", *speed, "--json", str(out)
    )
    assert done.returncode == 0, done.stderr
    assert "largest micro-batch that fits" in done.stdout
    plan = json.loads(out.read_text(encoding="utf-8"))
    assert (plan["run"]["micro_batch_size"], plan["run"]["zero_stage"]) == (32, 3)
    total = plan["parameters"]["dense"] + plan["parameters"]["experts"]
    # ZeRO 3: a master copy, two moments, the averages; in fp32 the weights are the master copy.
    assert plan["checkpoint"] == 16 * total and "a checkpoint, of all ranks together" in done.stdout
    assert plan["memory"]["without_checkpointing"]["optimizer"] == pytest.approx(12 * total / 4, rel=0.01)
    assert plan["days"] == pytest.approx(days(16e6, plan["flops_per_sample"], 4, 989, 0.4))
    bad = command("--config", recipe, "--world_size", "100", "--expert_parallel_size", "2")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.count("\n") == 1
    assert "engine.global_batch_size=128 is not a positive multiple of the world size 100" in bad.stderr


def test_a_run_that_takes_what_fits_keeps_it_on_fewer_ranks(tiny_run: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = [*tiny_run, "--engine.micro_batch_size=auto", f"--output_dir={output}", "--checkpoint.export=false"]
    log = ranks.run("eve_ds.pretrain", [*arguments, "--optimizer.total_steps=1"])
    assert "engine.micro_batch_size auto: 4 of a rank's 4 samples a step; forecast" in log

    def stored() -> int:
        return int(yaml.safe_load((output / "config.yaml").read_text())["engine"]["micro_batch_size"])

    assert stored() == 4
    alone = ["--engine.expert_parallel_size=1", "--optimizer.total_steps=2"]
    assert "micro_batch_size auto" not in ranks.run("eve_ds.pretrain", [*arguments, *alone], 1)
    assert stored() == 4, "though all 8 samples would fit"
