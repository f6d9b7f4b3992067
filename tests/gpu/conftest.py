"""What the GPU checks share: the device, the sizes that go with it, and the figures that the kit's report takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.gpu.kit_sizes import Sizes, kit_device, sizes_of

FIGURES: dict[str, Any] = {}


@pytest.fixture(scope="session")
def device() -> torch.device:
    found = kit_device()
    if found is None:
        pytest.skip("needs a CUDA device (EVE_DS_KIT_DEVICE=cpu: the dry run on the CPU, at tiny sizes)")
    return found


@pytest.fixture(scope="session")
def sizes(device: torch.device) -> Sizes:
    return sizes_of(device)


@pytest.fixture(scope="session")
def figures() -> dict[str, Any]:
    """Name: figure; printed as a JSON line at the end."""
    return FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.write_line(json.dumps(FIGURES))
