"""How often the host waits for the device, and how much it launches, in a step of EVE-Base: what waits for the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.kit_runner import figures_of

# One H100 at 0e234b1: 4,000 launches and 18 reads of a value in forward and backward, 10,020 launches in a step of the
# loop. Lower these with what is gained. In the dry run operations of torch are counted, of a model of two blocks.
MOST = {
    "cuda": {"forward_backward": {"launches": 4500, "value_reads": 18}, "engine_step": {"launches": 10500}},
    "cpu": {"forward_backward": {"launches": 7000, "value_reads": 8}, "engine_step": {"value_reads": 24}},
}


@pytest.mark.timeout(300)
def test_launches_and_waits(device: torch.device, figures: dict[str, Any], repository: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu.count_launches"]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    found = figures_of(ended.stdout)
    figures |= found
    assert ended.returncode == 0, ended.stderr
    for part, limits in MOST[device.type].items():
        assert found[part]["launches"] > 0 and sum(found[part]["ms_by_kind"].values()) > 0
        for name, most in limits.items():
            assert found[part][name] <= most, f"{part}: {found[part][name]} {name}"
