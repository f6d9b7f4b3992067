"""A GPU fails on one rank, in the words that torch has for it: one line, and the other rank ends by itself."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.support import ranks

HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("incident", "what", "more"),
    [
        (
            "memory",
            "CUDA out of memory. Tried to allocate 1.50 GiB on a GPU of 4.00 GiB, of which 14.31 MiB is free "
            f"(on {HOST}); the plan forecasts ",
            ["; of engine.micro_batch_size=2 not even 1 fits; of a run, make the model, the batch"],
        ),
        (
            "fault",
            f"CUDA error: uncorrectable ECC error encountered (on {HOST}); where: ",
            ["rank_1.traceback; the GPU is faulty: "],
        ),
    ],
)
def test_the_rank_that_fails_says_so_and_the_other_one_ends(
    tiny_run: list[str], tmp_path: Path, incident: str, what: str, more: list[str]
) -> None:
    options = [*tiny_run, "--logging.wandb=false", "--engine.micro_batch_size=2", f"--output_dir={tmp_path / 'run'}"]
    started = ranks.start("tests.support.spike", [*options, f"--spike={incident}"], 2)
    failed = started[1].communicate(timeout=ranks.LIMIT)[0]
    began = time.monotonic()
    other = started[0].communicate(timeout=ranks.LIMIT)[0]
    waited = time.monotonic() - began
    (line,) = [line for line in failed.splitlines() if "rror" in line]
    assert started[1].returncode == 2 and "Traceback" not in failed, failed
    assert line.startswith(f"error: rank 1: {what}") and all(part in line for part in more), line
    assert started[0].returncode == 3 and "Traceback" not in other and waited < 30, other
    assert "rank 0: another rank has ended; its message says why" in other, other
    kept = tmp_path / "run/ranks/rank_1.traceback"
    assert kept.exists() == (incident == "fault")
    if kept.exists():
        assert "in spiked\n" in kept.read_text() and "cudaErrorECCUncorrectable" in kept.read_text()
