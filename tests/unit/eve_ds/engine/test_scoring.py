"""A score over a split that lacks a part of its raw data says so, where it is printed and in its file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evaluation import submission
from eve_ds.config import FinetuneConfig
from eve_ds.engine import setup
from eve_ds.engine.scoring import Scorer
from eve_ds.engine.signals import StopRequest
from eve_ds.errors import setup_logging
from eve_ds.model.backbone import Backbone
from eve_ds.tasks import Task
from eve_ds.tasks.nlvr import NLVR
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.vqa import VQA
from preprocessing.__main__ import main
from preprocessing.errors import UserError
from tests.support.console import logging_restored
from tests.support.shards import image_of, tiny_tokenizer
from tests.support.tiny_tasks import tiny_config

LOST = 3  # the number of the image that is not there


def records(task: str) -> list[dict[str, Any]]:
    """Six images, or pairs of them, with two captions, questions or statements each."""
    made: list[dict[str, Any]] = []
    texts = [(i, text) for i in range(6) for text in (f"image {i} is red", f"a square in image {i}")]
    for i, text in texts:
        if task == "nlvr":
            pair = {"images": [f"{i}.png", "0.png"], "identifier": f"test1-{i}-0-{len(made) % 2}"}
            made.append(pair | {"sentence": text, "label": "True"})
        elif task == "vqa":
            made.append({"image": f"{i}.png", "question": text, "question_id": len(made), "answer": "yes"})
        else:
            made.append({"image": f"{i}.png", "caption": text})
    return made


def prepare(folder: Path, task: str, *options: str, lost: int | None = LOST) -> int:
    (folder / "images").mkdir(exist_ok=True)
    for i in range(6):
        if i != lost:
            (folder / f"images/{i}.png").write_bytes(image_of(i))
    if not (folder / "raw.json").exists():
        (folder / "raw.json").write_text(json.dumps(records(task)))
    (folder / "answers.json").write_text('["yes", "no"]')
    words = ["json", "--task", task, "--annotations", f"{folder}/raw.json", "--images", f"{folder}/images"]
    words += ["--split", "test", "--out", f"{folder}/data", "--answer-list", f"{folder}/answers.json"]
    return main([*words, *options])


def scorer(folder: Path, task: str, nan: str = "none") -> tuple[Scorer, Task]:
    """With random weights; those whose names begin with ``nan`` are NaN."""
    config = FinetuneConfig()
    config.task = {"retrieval": "itr_coco"}.get(task, task)
    config.data.path, config.data.val_split = str(folder / "data"), "test"
    config.model = tiny_config()
    config.model.vocab_size = 512
    tokenizer = tiny_tokenizer()
    samples = setup.build_dataset(config, "test", tokenizer, train=False)
    backbone = Backbone(config.model)
    tasks = {"nlvr": NLVR, "vqa": lambda backbone: VQA(backbone, 2), "retrieval": Retrieval}
    made: Task = tasks[task](backbone).eval()
    for name, parameter in made.named_parameters():
        if name.startswith(nan):
            parameter.data.fill_(torch.nan)
    return Scorer(config, {"test": samples}, torch.device("cpu"), StopRequest()), made


def score(folder: Path, task: str, out: Path, nan: str = "none") -> None:
    ours, made = scorer(folder, task, nan)
    out.mkdir(exist_ok=True)
    ours.score(made, "test", out)


@pytest.fixture(autouse=True)
def console() -> Iterator[None]:
    """Scores are logged; a command prints them."""
    with logging_restored():
        setup_logging(0)
        yield


PARTS = {
    "retrieval": {"images": {"scored": 5, "of": 6}, "captions": {"scored": 10, "of": 12}},
    "vqa": {"questions": {"scored": 10, "of": 12}},
    "nlvr": {"statements": {"scored": 10, "of": 12}},
}


@pytest.mark.parametrize("task", PARTS)
def test_a_test_split_that_lacks_an_image(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(tmp_path, task) == 2  # nothing is dropped from a test split by default
    assert "more than --max-dropped 0 of 6 rows must be dropped: 3.png" in capsys.readouterr().err
    assert prepare(tmp_path, task, "--max-dropped", "0.2") == 0
    score(tmp_path, task, tmp_path / "run")
    line = capsys.readouterr().out.splitlines()[-1]
    whole = {"retrieval": "5 of 6 images, 10 of 12 captions", "vqa": "10 of 12 questions"}.get(
        task, "10 of 12 statements"
    )
    assert line.endswith(f"(over {whole}; dropped in preparation: 1 image is missing)")
    written = json.loads((tmp_path / "run" / "scores_test.json").read_text())
    assert written.pop("incomplete") == PARTS[task] | {"dropped": {"image is missing": 1}}
    assert prepare(tmp_path, task, "--overwrite", lost=None) == 0
    score(tmp_path, task, tmp_path / "again")
    assert "incomplete" not in json.loads((tmp_path / "again" / "scores_test.json").read_text())
    assert "dropped" not in capsys.readouterr().out.splitlines()[-1]


def test_nlvr2_scores_say_which_official_split_they_are_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(tmp_path, "nlvr", lost=None) == 0
    score(tmp_path, "nlvr", tmp_path / "run")
    assert capsys.readouterr().out.splitlines()[-1].startswith("test (test-P): accuracy ")
    assert json.loads((tmp_path / "run" / "scores_test.json").read_text())["official_split"] == "test-P"
    assert all(line.startswith("test1-") for line in (tmp_path / "run" / "predictions_test.csv").read_text().split())
    (tmp_path / "vqa").mkdir()
    assert prepare(tmp_path / "vqa", "vqa", lost=None) == 0
    score(tmp_path / "vqa", "vqa", tmp_path / "vqa" / "run")
    assert "official_split" not in json.loads((tmp_path / "vqa" / "run" / "scores_test.json").read_text())


def test_predictions_of_a_split_without_answers_are_what_the_vqa_server_takes(tmp_path: Path, capsys) -> None:
    asked = [{name: row[name] for name in ("image", "question", "question_id")} for row in records("vqa")]
    (tmp_path / "raw.json").write_text(json.dumps(asked))
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "test2015", "questions": asked[::-1]}))
    assert prepare(tmp_path, "vqa", lost=None) == 0
    score(tmp_path, "vqa", tmp_path / "run")
    assert capsys.readouterr().out.endswith("test: predictions written; the split has no answers to score them by\n")
    assert not (tmp_path / "run" / "scores_test.json").exists()
    words = [f"--predictions={tmp_path}/run/predictions_test.json", f"--questions={tmp_path}/q.json"]
    submission.main([*words, f"--answers={tmp_path}/data/answer_list.json", f"--out={tmp_path}/s.json"])
    rows = json.loads((tmp_path / "s.json").read_text())
    assert [row["question_id"] for row in rows] == [*range(11, -1, -1)]
    assert {row["answer"] for row in rows} <= {"yes", "no"} and all(len(row) == 2 for row in rows)


def test_a_question_without_a_word_in_a_test_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = records("vqa")
    asked[4]["question"] = " ?"
    (tmp_path / "raw.json").write_text(json.dumps(asked))
    assert prepare(tmp_path, "vqa", lost=None) == 2
    error = capsys.readouterr().err
    assert "more than --max-dropped 0 of a test split must be left out: 1 times question without a word;" in error
    assert "--max-dropped 0.084:" in error
    assert prepare(tmp_path, "vqa", "--max-dropped", "0.084", lost=None) == 0
    score(tmp_path, "vqa", tmp_path / "run")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("(over 11 of 12 questions; dropped in preparation: 1 question without a word)")
    (tmp_path / "list.txt").write_text("2.png\n")  # that is meant, but the score is not over all questions
    excluding = ["--overwrite", "--exclude", f"{tmp_path}/list.txt"]
    assert prepare(tmp_path, "vqa", *excluding, lost=None) == 0
    score(tmp_path, "vqa", tmp_path / "excluded")
    written = json.loads((tmp_path / "excluded" / "scores_test.json").read_text())
    assert written["incomplete"]["questions"] == {"scored": 10, "of": 12}


def test_predictions_without_answers_say_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [{key: value for key, value in record.items() if key != "answer"} for record in records("vqa")]
    (tmp_path / "raw.json").write_text(json.dumps(asked))
    assert prepare(tmp_path, "vqa", "--max-dropped", "0.2") == 0
    score(tmp_path, "vqa", tmp_path / "run")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("test: predictions written; ") and "(over 10 of 12 questions; dropped" in line


def test_a_score_that_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(tmp_path, "vqa", lost=None) == 0
    (tmp_path / "run/predictions_test.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"predictions_test\.json: is no regular file"):
        score(tmp_path, "vqa", tmp_path / "run")
    assert capsys.readouterr().out.splitlines()[-1].startswith("test: soft_accuracy ")


def test_scores_that_are_nan_are_one_line(tmp_path: Path) -> None:
    assert prepare(tmp_path, "retrieval", lost=None) == 0
    with pytest.raises(UserError, match="is nan: scores must be real numbers"):
        score(tmp_path, "retrieval", tmp_path / "run", nan="itc_text_proj_head")
    assert not list((tmp_path / "run").iterdir())
    ours, made = scorer(tmp_path, "retrieval", nan="itc_text_proj_head")
    trainer: Any = SimpleNamespace(task=made, whole_weights=contextlib.nullcontext)  # all that is asked of a trainer
    with pytest.raises(UserError, match="is nan: scores must be real numbers"):
        ours.while_training(trainer)
