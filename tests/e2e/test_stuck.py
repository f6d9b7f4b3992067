"""A rank or a reader that is stopped, a peer that never comes: in the time that is set a line names them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import ranks

HOST = socket.gethostname()
VERIFY_OFF = "--data.verify=off"  # its process would be one more child of the rank


@pytest.fixture(scope="module")
def options(tiny_run: list[str]) -> list[str]:
    endless = ["--optimizer.total_steps=1000000", "--checkpoint.every=0", "--logging.eval_every=0"]
    return [*tiny_run, *endless, "--logging.wandb=false", "--data.max_corrupt=0.5"]


def begun(arguments: list[str], output: Path, world_size: int) -> list[subprocess.Popen[str]]:
    """Ranks that have taken a few steps; from the second one on they are soon impatient with each other."""
    arguments = [*arguments, f"--output_dir={output}", "--spike=impatient"]
    started = ranks.start("tests.support.spike", arguments, world_size)
    deadline = time.monotonic() + ranks.LIMIT
    while not (output / "metrics.jsonl").is_file() or (output / "metrics.jsonl").read_text().count("\n") < 4:
        alive = all(rank.poll() is None for rank in started)
        assert alive and time.monotonic() < deadline, ranks.finish(started)
        time.sleep(0.05)
    return started


def test_a_stopped_rank_is_named_with_the_stacks_of_those_who_wait(options: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    waiting, stopped = begun(options, output, 2)
    try:
        stopped.send_signal(signal.SIGSTOP)
        text = waiting.communicate(timeout=ranks.LIMIT)[0]
    finally:
        stopped.kill()
        stopped.communicate()
    (line,) = [line for line in text.splitlines() if "error:" in line]
    assert waiting.returncode == 3 and "Traceback" not in text, text
    who = rf"for rank 1 on {HOST} \(process {stopped.pid}, last in [^)]+\), which gives no sign of life"
    assert re.search(rf"rank 0 on {HOST} has waited \d+ s in (step \d+, \w+|[^,]+) {who}", line), line
    assert "raise engine.timeout_seconds=6" in line
    stacks = (output / "ranks/rank_0.stacks").read_text()
    assert "Current thread" in stacks and "_train_step" in stacks, stacks


def test_a_stopped_reader_is_named(options: list[str], tmp_path: Path) -> None:
    single = [
        *options,
        "--engine.expert_parallel_size=1",
        "--data.num_workers=1",
        "--data.timeout_seconds=8",
        VERIFY_OFF,
    ]
    (rank,) = begun(single, tmp_path / "run", 1)
    (reader,) = map(int, Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split())
    os.kill(reader, signal.SIGSTOP)
    text = rank.communicate(timeout=ranks.LIMIT)[0]
    (line,) = [line for line in text.splitlines() if "error:" in line]
    assert rank.returncode == 2 and "Traceback" not in text, text
    words = f"rank 0: on host {HOST}, its data loader (process {reader} is stopped) has given no batch for 8 s"
    assert words in line and not Path(f"/proc/{reader}").exists(), line


@pytest.mark.long
@pytest.mark.parametrize(("missing", "words"), [(1, "1/2 clients joined"), (0, "timed out after 62000ms")])
def test_a_peer_that_never_comes(options: list[str], tmp_path: Path, missing: int, words: str) -> None:
    arguments = [*options, f"--output_dir={tmp_path / 'run'}", "--engine.timeout_seconds=2", "--data.timeout_seconds=2"]
    started = ranks.start("eve_ds.pretrain", arguments, 2)
    came, other = started[1 - missing], started[missing]
    other.kill()
    other.communicate()
    text = came.communicate(timeout=ranks.LIMIT)[0]
    (line,) = [line for line in text.splitlines() if "error:" in line]
    assert came.returncode == 2 and "Traceback" not in text, text
    assert f"rank {1 - missing} on {HOST}: the ranks cannot meet at 127.0.0.1:" in line and words in line, line
