"""``python -m eve_ds.plan`` as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    done = command("--config", recipe, *CHOSEN, *averaging, "--zero", "3", "--pairs", "16e6", "--json", str(out))
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
