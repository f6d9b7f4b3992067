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
ZERO_1 = "ds_configs/zero1.json"
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
    who = rf"for rank 1 on {HOST} \(process {stopped.pid}, last heard of in [^)]+\), which gives no sign of life"
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
def test_each_phase_has_a_name_that_all_ranks_give_it(tiny_run: list[str], tmp_path: Path) -> None:
    """A rank that is stuck tells it, and who has been told less of them is behind."""
    run, data = tmp_path / "run", tiny_run[1].partition("=")[2]
    common = ["--logging.wandb=false", "--logging.samples=0", "--checkpoint.every=0", "--data.verify=full"]

    def marks(module: str, output: Path, *options: str) -> list[str]:
        file = tmp_path / "marks"
        ranks.run("tests.support.marks", [str(file), module, *options, *common, f"--output_dir={output}"])
        first, second = (Path(f"{file}.{rank}").read_text().splitlines() for rank in range(2))
        Path(f"{file}.0").unlink()
        Path(f"{file}.1").unlink()
        assert first == second
        return first

    def steps(*numbers: int) -> list[str]:
        found = [f"step {number}, {what}" for number in numbers for what in ("reading a batch", "computing")]
        return [*found[:2], "the comparison of the first step's memory with the plan", *found[2:]]

    def end(step: int, output: Path = run) -> list[str]:
        saved = [f"the evaluation after step {step}", f"saving step {step}", f"the end, after step {step}"]
        return [*saved, f"the export into {output}/model"]

    begun = ["the comparison of shards with their hashes"] * 2
    pretrain = [*tiny_run, "--engine.micro_batch_size=4", "--logging.eval_every=0"]
    set_up = "the set-up of DeepSpeed"
    found = marks("eve_ds.pretrain", run, *pretrain, "--optimizer.total_steps=2")
    assert found == [*begun, set_up, *steps(1, 2), *end(2)]
    found = marks("eve_ds.pretrain", run, *pretrain, "--optimizer.total_steps=3", f"--deepspeed_config={ZERO_1}")
    saved = run / "checkpoints/step_00000002"
    converted = run / "checkpoints" / f".universal_{saved.name}"
    resumed = [f"the check of {saved}", f"the conversion of {saved}", f"the load of {converted}"]
    assert found == [*begun, set_up, *resumed, *steps(3), *end(3)]
    found = marks("eve_ds.pretrain", run, *pretrain, "--optimizer.total_steps=4", f"--deepspeed_config={ZERO_1}")
    saved = run / "checkpoints/step_00000003"
    resumed = [f"the check of {saved}", f"the load of {saved}"]
    assert found == [*begun, set_up, *resumed, *steps(4), *end(4)]
    tuning = ["--task=itr_coco", f"--checkpoint={run}", f"--data={data}", "--split=val", "--bs=8"]
    tuning += ["--optimizer.total_steps=1", "--objective.embed_dim=16", "--engine.expert_parallel_size=2"]
    found = marks("eve_ds.finetune", tmp_path / "tuned", *tuning)
    trained = [*steps(1), *end(1, tmp_path / "tuned")]
    assert found == [*begun, f"the reading of {run}", set_up, *trained, "the scoring of val"]


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
