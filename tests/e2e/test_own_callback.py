"""Callbacks named by import path in whole runs: their hooks, their learning rate, and their state after a resume."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import ranks

EXAMPLES = ranks.REPOSITORY / "docs/examples"
MODULE = """
import json
import sys
from eve_ds.engine.callback import Callback

class Recorder(Callback):
    def __init__(self):
        self.calls = []

    def fit_start(self, trainer):
        self.calls.append(f"fit_start {trainer.step}")

    def step_start(self, trainer):
        self.calls.append(f"step_start {trainer.step}")
        trainer.set_lr_factor(0.25 * (trainer.step + 1))

    def backward_end(self, trainer):
        self.calls.append(f"backward_end {trainer.step}")

    def step_end(self, trainer, record):
        self.calls.append(f"step_end {trainer.step} lr {record['lr']:g}")

    def checkpoint_saved(self, trainer, path):
        if trainer.is_main:
            (trainer.output_dir / "calls.json").write_text(json.dumps(self.calls))

    def state_dict(self):
        return {"calls": self.calls} if self.calls else {}

    def load_state_dict(self, state):
        self.calls = state["calls"]

class StopAtTwo(Callback):
    def step_end(self, trainer, record):
        if trainer.step == 1:
            # 1.8 s of every start: initialize, kernels.adam, model.flops. After this a memory forecast may import it.
            assert "torch._dynamo" not in sys.modules
            trainer.stop.requested = True

number = 3
"""
STEPS = 4


@pytest.fixture
def options(tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/callbacks_of_mine.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "own"), str(EXAMPLES)]))
    return [
        *tiny_run,
        "--engine.precision=fp32",
        "--engine.expert_parallel_size=1",
        "--engine.micro_batch_size=null",
        "--optimizer.eps=1e-4",
        "--optimizer.lr=0.01",
        f"--optimizer.total_steps={STEPS}",
        "--logging.wandb=false",
        "--logging.eval_every=0",
        "--checkpoint.export=false",
    ]


def callbacks(*names: str) -> str:
    return f"--logging.callbacks=[{', '.join(names)}]"


def expected(first: int, last: int) -> list[str]:
    calls = [f"fit_start {first}"]
    for step in range(first, last):
        lr = 0.01 * 0.25 * (step + 1)
        calls += [f"step_start {step}", f"backward_end {step}", f"step_end {step + 1} lr {lr:g}"]
    return calls


def check_profile(folder: Path, told: str) -> None:
    """A trace per rank, with what each of them did; and shares of rank 0's time, told and stored."""
    for rank in range(2):
        with gzip.open(folder / f"rank_{rank}.json.gz") as file:
            names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
        assert {"aten::mm", "aten::bmm", "aten::native_layer_norm", "Optimizer.step#LeanAdamW.step"} <= names
        assert any(name.startswith(("c10d::allreduce", "gloo:all_reduce")) for name in names)
    text = (folder / "summary.txt").read_text()
    assert text.startswith("profile: steps 3 to 4 of rank 0") and text in told
    shares = {line[2:46].strip(): float(line[46:].split("%")[0]) for line in text.splitlines()[1:]}
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert min(shares[kind] for kind in ("matrix products", "attention", "collectives", "optimizer")) > 0


def test_a_run_keeps_the_state_of_its_callbacks_over_a_stop_and_on_other_ranks(
    options: list[str], tmp_path: Path
) -> None:
    own = ["callbacks_of_mine:Recorder", "ema_callback:EMA"]
    straight, run = tmp_path / "straight", tmp_path / "run"
    profiled = callbacks(*own, "docs.examples.profiler_callback:Profiler")  # found in the working directory
    ranks.run("eve_ds.pretrain", [*options, f"--output_dir={straight}", profiled], world_size=1)
    assert json.loads((straight / "calls.json").read_text()) == expected(0, STEPS)
    assert json.loads((straight / "trace.json").read_text())["traceEvents"]

    codes, text = ranks.finish(
        ranks.start(
            "eve_ds.pretrain", [*options, f"--output_dir={run}", callbacks(*own, "callbacks_of_mine:StopAtTwo")], 1
        )
    )
    assert codes == [75], text
    assert (run / "checkpoints/step_00000002/callbacks.pt").is_file() and not (run / "ema.safetensors").exists()

    resumed = [*options, f"--output_dir={run}", callbacks(*own), "--logging.profile=3:4"]
    text = ranks.run("eve_ds.pretrain", resumed, world_size=2)
    check_profile(run / "profile", text)
    assert "world_size 1 (now 2); converted" in text
    assert json.loads((run / "calls.json").read_text()) == expected(0, 2) + expected(2, STEPS)
    left, right = (load_file(folder / "ema.safetensors") for folder in (straight, run))
    assert left.keys() == right.keys() and len(left) > 20
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-5

    more = [f"--output_dir={run}", f"--optimizer.total_steps={STEPS + 1}", "--optimizer.ema=0.5"]
    text = ranks.run("eve_ds.pretrain", [*options, *more], world_size=2)
    assert "holds a state of callback callbacks_of_mine:Recorder, which this run does not have; dropped" in text
    told = "holds no averages of the weights, as optimizer.ema was 0; they start as the weights of step 4"
    assert text.count(told) == 1
    assert {"callbacks.pt", "averages_rank_0.pt", "averages_rank_1.pt"} <= {
        path.name for path in (run / f"checkpoints/step_{STEPS + 1:08d}").iterdir()
    }
    assert not (run / "model_ema").exists()  # as checkpoint.export is false
    text = ranks.run("eve_ds.pretrain", [*options, more[0], f"--optimizer.total_steps={STEPS + 2}"], world_size=2)
    assert "holds a state of callback eve_ds.callbacks.ema:EMA, which this run does not have; dropped" in text
    assert not {path.name for path in (run / f"checkpoints/step_{STEPS + 2:08d}").glob("[ac]*.pt")}


def test_a_wrong_path_is_an_error_in_one_line(options: list[str], tmp_path: Path) -> None:
    wrong = [*options, f"--output_dir={tmp_path / 'run'}", callbacks("callbacks_of_mine:number")]
    codes, text = ranks.finish(ranks.start("eve_ds.pretrain", wrong, 1))
    assert codes == [2] and text.startswith("error: --logging.callbacks callbacks_of_mine:number: is no callback")
    assert text.count("\n") == 1 and not (tmp_path / "run").exists()
