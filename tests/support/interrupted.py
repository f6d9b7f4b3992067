"""A tiny two-rank pre-training that is killed, and what it must have saved: as one that nothing disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.support import ranks

# Beginnings of names: by the clock, or counted since the process began.
OF_A_PROCESS = ("samples_per_second", "step_seconds", "data/wait_fraction", "perf/", "moe/")
OPTIONS = [
    "--engine.precision=fp32",
    "--logging.wandb=false",
    "--logging.samples=0",
    "--logging.eval_every=0",
    "--checkpoint.every=2",
]


def start(options: list[str], output: Path, steps: int, keep: int) -> list[subprocess.Popen[str]]:
    """Two ranks that train to ``steps``."""
    own = [f"--output_dir={output}", f"--optimizer.total_steps={steps}", f"--checkpoint.keep={keep}"]
    return ranks.start("eve_ds.pretrain", [*options, *OPTIONS, *own], 2)


def undisturbed(options: list[str], output: Path, steps: int) -> Path:
    """The run to compare with: it keeps all of its checkpoints."""
    codes, text = ranks.finish(start(options, output, steps, keep=steps))
    assert codes == [0, 0], text
    return output


def records(output: Path) -> dict[int, dict[str, float]]:
    """Of each training step, what depends neither on clock nor on restarts; an incomplete line at the end is none."""
    file = output / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return {
        (r := json.loads(line))["step"]: {k: v for k, v in r.items() if not k.startswith(OF_A_PROCESS)}
        for line in lines
    }


def saved(output: Path) -> dict[int, dict[str, list[object]]]:
    """{step: {file: [bytes, SHA-256]}} of the whole checkpoints, as they say themselves."""
    found = (output / "checkpoints").glob("step_????????/complete.json")
    return {int(path.parent.name[5:]): json.loads(path.read_text())["files"] for path in found}


def half(output: Path, since: int = 0) -> list[Path]:
    """Checkpoints that are not whole and that were touched after ``since``, in ns."""
    tags = (output / "checkpoints").glob("step_????????")
    return [path for path in tags if not (path / "complete.json").exists() and _touched(path, since)]


def _touched(path: Path, since: int) -> bool:
    try:
        return path.stat().st_mtime_ns > since
    except FileNotFoundError:
        return False


def kill(started: list[subprocess.Popen[str]], first: int = 0, gap: float = 0.0) -> str:
    """SIGKILL to both ranks, to ``first`` before the other one; returns what they had printed."""
    for rank in (started[first], started[1 - first]):
        rank.send_signal(signal.SIGKILL)
        time.sleep(gap)
    return "".join(rank.communicate(timeout=ranks.LIMIT)[0] for rank in started)


def until(started: list[subprocess.Popen[str]], condition: Callable[[], bool]) -> None:
    """Wait for the condition, or for the end of a rank, which is a failure."""
    limit = time.monotonic() + ranks.LIMIT
    while not condition():
        codes = [rank.poll() for rank in started]
        assert codes == [None, None] and time.monotonic() < limit, f"exit codes {codes}, after {kill(started)}"
        time.sleep(0.002)


def kill_at_random(options: list[str], output: Path, steps: int, draw: random.Random) -> str:
    """Start the run, and kill it at a random moment: of start-up, of a step, of a save. Returns what it had printed."""
    since, resumed = time.time_ns(), max(saved(output), default=0)
    started = start(options, output, steps, keep=2)
    moment = draw.choice(("start", "step", "step", "save", "save", "save"))
    if moment == "start" or resumed > steps - 8:  # near its end it would be over before the kill
        time.sleep(draw.uniform(0, 6))
    else:
        target = resumed + draw.randint(1, 4)
        metrics = output / "metrics.jsonl"
        until(started, lambda: _touched(metrics, since) and max(records(output), default=0) >= target)
        if moment == "save":
            until(started, lambda: bool(half(output, since)))
        time.sleep(draw.uniform(0, 0.1))
    return kill(started, draw.randint(0, 1), draw.uniform(0, 0.05))


def damage(output: Path) -> Path:
    """Flip a bit of the newest checkpoint; returns its folder."""
    path = max((output / "checkpoints").glob("step_????????/complete.json")).parent
    file = path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with open(file, "r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    return path
