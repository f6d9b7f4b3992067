"""A user's own objective and task (docs/examples), named by import path: trained, scored and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.support import ranks
from tests.support.shards import make_caption_set, tiny_tokenizer

OBJECTIVE, TASK = "docs.examples.my_objective:SPEC", "docs.examples.my_task:SPEC"
ROWS = 9  # 18 samples on 2 ranks: repeats must not count


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, rows in (("train", 24), ("val", ROWS), ("test", ROWS)):
        make_caption_set(root / "captions", rows=rows, split=split)
    tiny_tokenizer(root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the own objective, which a recipe names."""
    folder = tmp_path_factory.mktemp("pretrained")
    recipe = yaml.safe_load(Path("tests/e2e/tiny.yaml").read_text())
    recipe |= {"task": OBJECTIVE, "objective": {"text_mask_ratio": 0.3}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = [f"--config={folder / 'recipe.yaml'}", f"--data.path={data / 'captions'}"]
    options += [f"--data.tokenizer={data / 'tokenizer'}", f"--output_dir={folder / 'run'}", "--data.val_split=val"]
    ranks.run("eve_ds.pretrain", [*options, "--optimizer.total_steps=4", "--logging.wandb=false"])
    return folder / "run"


def test_an_own_objective_trains(pretrained: Path) -> None:
    records = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "words_loss" in record] == [1, 2, 3, 4]
    assert all(0 <= record["val/words_accuracy"] <= 1 for record in records if "val/loss" in record)
    shown = json.loads((pretrained / "samples" / "samples.json").read_text())
    assert shown.keys() == {"captions", "expert_load"} and len(shown["captions"]) == 8
    stored = yaml.safe_load((pretrained / "config.yaml").read_text())
    assert (stored["task"], stored["objective"]) == (OBJECTIVE, {"text_mask_ratio": 0.3})
    from docs.examples.my_objective import MaskedWords
    from eve_ds.tasks import load_task_model

    task = load_task_model(OBJECTIVE, pretrained)
    assert isinstance(task, MaskedWords) and task.text_mask_ratio == 0.3


def test_an_own_task_trains_and_is_scored(data: Path, pretrained: Path, tmp_path: Path) -> None:
    common = [f"--task={TASK}", f"--data={data / 'captions'}", "--logging.wandb=false", "--bs=8"]
    common += ["--engine.expert_parallel_size=2"]
    training = ["--optimizer.total_steps=4", "--logging.eval_every=2", "--objective.label_smoothing=0.1"]
    first, again = tmp_path / "first", tmp_path / "again"
    ranks.run("eve_ds.finetune", [*common, *training, f"--checkpoint={pretrained}", f"--output_dir={first}"])
    scores = json.loads((first / "scores_test.json").read_text())
    assert scores.keys() == {"color_accuracy", "about"} and 0 <= scores["color_accuracy"] <= 100
    lines = (first / "predictions_test.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in lines] == list(range(2 * ROWS))
    records = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "val/color_accuracy" in record] == [2, 4]
    assert len(json.loads((first / "samples" / "samples.json").read_text())["examples"]) == 8
    ranks.run("eve_ds.finetune", [*common, "--evaluate", f"--checkpoint={first}", f"--output_dir={again}"])
    assert json.loads((again / "scores_test.json").read_text()).keys() == scores.keys()


def test_a_path_that_names_no_task_is_told_in_a_line(tmp_path: Path) -> None:
    options = ["--task=docs.examples.my_task:SPEK", f"--data={tmp_path}", f"--output_dir={tmp_path / 'run'}"]
    codes, text = ranks.finish(ranks.start("eve_ds.finetune", options, 1))
    assert codes == [2]
    assert text == ("error: --task docs.examples.my_task:SPEK: docs.examples.my_task has no SPEK; check the spelling\n")
