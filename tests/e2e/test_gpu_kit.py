"""The GPU kit's dry run on the CPU: the commands that a session with a GPU will type work before it has one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.kit_sections import sections
from tests.gpu.real_loop import failed, measured
from tests.support.ranks import REPOSITORY

WITHOUT_GPU = {key: value for key, value in os.environ.items() if key != "EVE_DS_KIT_DEVICE"} | {
    "CUDA_VISIBLE_DEVICES": ""
}


def kit(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.gpu.kit", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=WITHOUT_GPU, capture_output=True, text=True)


def report_of(out: Path) -> dict[str, Any]:
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report | {"sections": {one["name"]: one for one in report["sections"]}}


def test_a_dry_run_of_a_few_sections(tmp_path: Path) -> None:
    chosen = ["attention", "launches", "tasks", "ceilings", "triton", "varlen"]
    ended = kit("--out", str(tmp_path / "out"), "--only", *chosen)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = report_of(tmp_path / "out")
    found = report["sections"]
    assert report["device"] == "cpu" and report["machine"]["torch"] and report["commit"]
    assert list(found) == ["attention", "tasks", "launches", "ceilings", "triton", "varlen"]  # in the kit's order
    assert {one["state"] for one in found.values()} == {"ok"}
    assert found["ceilings"]["figures"]["product_tflops"] > 0
    assert found["triton"]["figures"]["sums of hidden, even"]["wins_by"] > 0
    assert found["varlen"]["figures"]["2 pairs, texts of 40"]["wins_by"]["apart"] > 0
    assert found["launches"]["figures"]["engine_step"]["launches"] > 1000
    assert "skipped" not in found["attention"]["tail"] and "8 passed" in found["attention"]["tail"]
    assert (tmp_path / "out" / "table.txt").read_text(encoding="utf-8").count(" ok ") == 6


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_a_dry_run_of_all_sections(tmp_path: Path) -> None:
    ended = kit("--out", str(tmp_path / "out"), "--budget", "2200", "--device", "cpu")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    here = [section.name for section in sections("cpu", tmp_path) if section.on_cpu]
    assert [one["name"] for one in report_of(tmp_path / "out")["sections"].values()] == here


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--only", "speed", "--out", "x"], "--only speed"),
        (["--only", "demo", "--out", "x", "--device", "cpu"], "--only demo"),
        (["--device", "cuda", "--out", "x"], "--device cuda"),
        (["--only", "ceilings"], "--out is missing"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], culprit: str) -> None:
    ended = kit(*arguments)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and culprit in ended.stderr


def test_a_run_that_fails_costs_no_other_runs_figures(tmp_path: Path) -> None:
    found = {"fails": measured(["--no.such=1"], tmp_path / "run", 1, False), "ok": {"step_ms": 1.0}}
    assert found["fails"] == {"failed": "0 of 6 steps were done, exit code 2"}
    assert failed(found) and not failed({"ok": found["ok"]})


def test_without_a_gpu_the_checks_are_skipped_and_say_why() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "tests/gpu/test_attention_at_size.py"]
    ended = subprocess.run(command, cwd=REPOSITORY, env=WITHOUT_GPU, capture_output=True, text=True)
    assert ended.returncode == 0 and "8 skipped" in ended.stdout and "needs a CUDA device" in ended.stdout
