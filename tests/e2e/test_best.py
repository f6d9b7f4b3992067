"""The best weights by a metric: the same after a kill, what the final score is of, and the end of a run without any."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from eve_ds.weights.model_folder import HASHED, WEIGHTS, write_hashes
from tests.support import interrupted, ranks
from tests.support.shards import make_vqa_set, tiny_tokenizer

ANSWERS = 6  # of the answer list of ``make_vqa_set``
# From step 5 on every step makes the loss larger. A run kills itself once, between the evaluations of steps 6 and 8.
MODULE = """
import os
import signal
from eve_ds.engine.callback import Callback

class Ascend(Callback):
    def step_start(self, trainer):
        trainer.set_lr_factor(1.0 if trainer.step < 4 else -1.0)

class Killed(Ascend):
    def step_end(self, trainer, record):
        if trainer.step == 7 and trainer.start_step == 0:
            os.kill(os.getpid(), signal.SIGKILL)

class Ended(Ascend):
    def step_end(self, trainer, record):
        if trainer.step == 2:
            trainer.keep_checkpoint(2, by="a test")
        if trainer.step == 5:
            trainer.end()
"""
RECIPE = """
model: {image_size: 32, patch_size: 8, dim: 32, depth: 2, num_heads: 4, mlp_hidden: 64, vocab_size: 400,
        max_text_length: 16, text_positions: 16, soft_layers: [1], num_experts: 4, top_k: 2}
optimizer: {lr: 1.0e-12, total_steps: 40}
engine: {global_batch_size: 8, precision: fp32, expert_parallel_size: 2}
checkpoint: {every: 0, keep: 1, best: val/soft_accuracy, patience: 1}
logging: {wandb: false, eval_every: 1 epoch}
"""


def best_of(run: Path) -> tuple[dict[str, Any], bytes]:
    return json.loads((run / "model_best/best.json").read_text()), (run / "model_best/model.safetensors").read_bytes()


def held_out(run: Path, name: str = "val/loss") -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[name] for record in records if name in record}


@pytest.mark.parametrize("metric", ["val/loss", "val_ema/loss"])
def test_a_run_that_is_killed_between_evaluations_keeps_the_same_best_weights(
    metric: str, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/ascending.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "own"), os.environ.get("PYTHONPATH", "")]))
    options = [*tiny_run, *interrupted.OPTIONS, "--logging.eval_every=2", "--checkpoint.every=0", "--checkpoint.keep=1"]
    options += ["--optimizer.total_steps=8", f"--checkpoint.best={metric}", "--optimizer.ema=0.5"]

    def start(output: Path, callback: str) -> tuple[list[int], str]:
        own = [f"--output_dir={output}", f"--logging.callbacks=[ascending:{callback}]"]
        return ranks.finish(ranks.start("eve_ds.pretrain", [*options, *own], 2))

    codes, text = start(tmp_path / "whole", "Ascend")
    assert codes == [0, 0], text
    values = held_out(tmp_path / "whole", metric)
    best = min(values, key=lambda step: values[step])
    assert list(values) == [2, 4, 6, 8] and best < 8
    record, weights = best_of(tmp_path / "whole")
    assert record == {"metric": metric, "mode": "min", "value": values[best], "step": best}
    assert sorted(interrupted.saved(tmp_path / "whole")) == [best, 8]  # beside the newest one

    codes, text = start(tmp_path / "killed", "Killed")
    assert codes == [-9, -9] and max(interrupted.records(tmp_path / "killed")) == 7, text
    (tmp_path / "killed/model_best/best.json").unlink()  # as if the kill had come in the export
    codes, text = start(tmp_path / "killed", "Killed")
    assert codes == [0, 0], text
    assert best_of(tmp_path / "killed") == (record, weights)
    assert held_out(tmp_path / "killed", metric) == values


def test_a_callback_keeps_a_checkpoint_beside_the_best_and_ends_the_run_evaluated_and_saved(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ascending.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    options = [*tiny_run, *interrupted.OPTIONS, "--logging.eval_every=3", "--checkpoint.every=2", "--checkpoint.keep=1"]
    options += ["--optimizer.total_steps=8", "--checkpoint.best=val/loss", "--logging.callbacks=[ascending:Ended]"]
    ranks.run("eve_ds.pretrain", [*options, f"--output_dir={tmp_path / 'run'}"])
    values = held_out(tmp_path / "run")
    assert list(values) == [3, 5]
    best = min(values, key=lambda step: values[step])
    assert sorted(interrupted.saved(tmp_path / "run")) == sorted({2, best, 5})


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("vqa")
    for split, rows in (("train", 26), ("val", 9), ("test", 9)):  # 52 questions: 6.5 steps an epoch
        make_vqa_set(root / "vqa", rows=rows, split=split)
    tiny_tokenizer(root / "tokenizer")
    (root / "vqa.yaml").write_text(RECIPE)
    return [
        f"--config={root / 'vqa.yaml'}",
        "--task=vqa",
        f"--data={root / 'vqa'}",
        f"--data.tokenizer={root}/tokenizer",
    ]


def always(model: Path, answer: int) -> None:
    """Make the weights of a model folder give this answer to every question."""
    state = load_file(model / WEIGHTS)
    (bias,) = (name for name, value in state.items() if name.endswith("bias") and len(value) == ANSWERS)
    state[bias][answer] = 1e4
    save_file(state, model / WEIGHTS)
    write_hashes(model, HASHED)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_run_without_a_new_best_ends_and_its_score_is_of_the_best_weights(
    zero: str, vqa: list[str], tmp_path: Path
) -> None:
    options = [*vqa, f"--output_dir={tmp_path / 'run'}", f"--deepspeed_config={zero}"]
    text = ranks.run("eve_ds.finetune", options)
    assert list(held_out(tmp_path / "run", "val/soft_accuracy")) == [7, 13]  # the steps that complete epochs
    assert "step 13: training ends: 1 evaluations in a row were no better than val/soft_accuracy" in text
    record, _ = best_of(tmp_path / "run")
    assert record["step"] == 7 and sorted(interrupted.saved(tmp_path / "run")) == [7, 13]  # a tie: the earlier one
    scores = json.loads((tmp_path / "run/scores_test.json").read_text())
    assert scores["best"] == record and "(weights of step 7, the best by val/soft_accuracy: " in text

    evaluated = [*vqa, f"--checkpoint={tmp_path}/run/model_best", "--evaluate", f"--output_dir={tmp_path / 'scored'}"]
    ranks.run("eve_ds.finetune", evaluated, 2)
    again = json.loads((tmp_path / "scored/scores_test.json").read_text())
    sources = [found.pop("about")["checkpoint"]["sha256"] for found in (scores, again)]
    assert again == {name: value for name, value in scores.items() if name != "best"} and len(set(sources)) == 1
    predictions = [(tmp_path / run / "predictions_test.json").read_bytes() for run in ("run", "scored")]
    assert predictions[0] == predictions[1]

    last = (tmp_path / "run/model/model.safetensors").read_bytes()
    always(tmp_path / "run/model_best", answer=1)  # weights that are told from the last ones
    again = ranks.run("eve_ds.finetune", options)  # is at its end
    assert "step 13/40  finished" in again and list(held_out(tmp_path / "run", "val/soft_accuracy")) == [7, 13]
    answer = json.loads((tmp_path / "run/answer_list.json").read_text())[1]
    told = json.loads((tmp_path / "run/predictions_test.json").read_text())
    assert {row["answer"] for row in told} == {answer} != {row["answer"] for row in json.loads(predictions[0])}
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == last
    cards = [(tmp_path / f"run/{model}/README.md").read_text() for model in ("model", "model_best")]
    assert ["## Scores" in card for card in cards] == [False, True]

    # The best over other samples is another one, which a run at its end no longer finds.
    other = ranks.run("eve_ds.finetune", [*options, "--optimizer.total_steps=13", "--logging.eval_samples=8"])
    assert "its best is looked for anew" in other and "holds no best weights" in other
    scores = json.loads((tmp_path / "run/scores_test.json").read_text())
    assert "best" not in scores and scores["about"]["checkpoint"]["step"] == 13


def test_a_metric_that_no_evaluation_finds_is_refused_before_the_first_step(vqa: list[str], tmp_path: Path) -> None:
    options = [*vqa, f"--output_dir={tmp_path / 'run'}", "--checkpoint.best=val/acuracy"]
    codes, text = ranks.finish(ranks.start("eve_ds.finetune", [*options, "--engine.expert_parallel_size=1"], 1))
    assert codes == [2] and not interrupted.records(tmp_path / "run")
    assert text.splitlines()[-1].startswith(
        "error: checkpoint.best=val/acuracy: evaluations find no such metric, but val/"
    )
    assert "val/soft_accuracy" in text.splitlines()[-1] and "Traceback" not in text
