"""``engine.deterministic`` in whole runs: on CPUs the bits are those of a run without it, and no operation of ours
lacks a deterministic form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support import ranks

ON = "--engine.deterministic=true"


def learned(output: Path) -> tuple[list[float], bytes]:
    """Losses by step, and the exported weights."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    weights = (output / "model" / "model.safetensors").read_bytes()
    return list({record["step"]: record["loss"] for record in found if "lr" in record}.values()), weights


def test_the_bits_are_those_of_a_run_without_it(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is switched on as the run resumes."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")  # which tells whether it is on
    for name, more in (("off", []), ("on", [ON]), ("half", [ON])):
        said = ranks.run("eve_ds.pretrain", [*tiny_run, f"--output_dir={tmp_path / name}", *more])
        assert said.count("CUBLAS_WORKSPACE_CONFIG=:0:0 is replaced by :4096:8") == len(more)
        if name == "off":
            shutil.copytree(tmp_path / "off", half := tmp_path / "half")
            for gone in (max((half / "checkpoints").iterdir()), half / "model", half / "samples"):
                shutil.rmtree(gone)
    assert learned(tmp_path / "off") == learned(tmp_path / "on") == learned(tmp_path / "half")
    assert "from step 3 to step 6" in said
