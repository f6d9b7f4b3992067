"""A score over a split that lacks a part of its raw data says so, where it is printed and in its file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from evaluation import submission
from eve_ds.engine import checkout
from eve_ds.errors import setup_logging
from eve_ds.weights.model_folder import write_hashes
from preprocessing.errors import UserError
from tests.support.console import logging_restored
from tests.support.scored import prepare, records, score, scorer


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
    counts = {name: part["scored"] for name, part in PARTS[task].items()}
    assert written["about"]["examples"] == counts
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


@pytest.mark.parametrize("task", PARTS)
def test_scores_say_what_they_are_of_and_how_sure_they_are(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(tmp_path, task, lost=None) == 0
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(save({"weight": torch.zeros(2)}, metadata={"format": "eve-ds step 7"}))
    ours, made = scorer(tmp_path, task, checkpoint=model)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("task: something\n")
    before = datetime.now(UTC).replace(microsecond=0)
    ours.score(made, "test", run)
    written = json.loads((run / "scores_test.json").read_text())
    written.pop("official_split", None)
    intervals, about = written.pop("intervals"), written.pop("about")
    assert intervals.keys() == written.keys()
    line = capsys.readouterr().out.splitlines()[-1]
    for name, (low, high) in intervals.items():
        assert low - 1e-6 <= written[name] <= high + 1e-6
        assert f"{name} {written[name]:.4g} [{low:.4g}, {high:.4g}]" in line
    assert (about["task"], about["split"]) == (ours.config.task, "test")
    assert about["checkpoint"] == {
        "path": str(model), "weights": str(model / "model.safetensors"), "step": 7,
        "sha256": sha256((model / "model.safetensors").read_bytes()).hexdigest(),
    }  # fmt: skip
    assert about["config_sha256"] == sha256((run / "config.yaml").read_bytes()).hexdigest()
    fingerprint = ours.datasets["test"].split.fingerprint
    assert about["data"] == {"path": str(tmp_path / "data" / "test"), "fingerprint": fingerprint}
    state = checkout.code(checkout.ROOT)
    assert (about["commit"], about["dirty"]) == (state.get("commit"), state.get("dirty"))
    assert about["version"] == checkout.own_version() != "absent"
    assert before <= datetime.fromisoformat(about["date"]) <= datetime.now(UTC)


def test_the_model_that_a_run_has_exported_is_named_in_its_scores(tmp_path: Path) -> None:
    assert prepare(tmp_path, "vqa", lost=None) == 0
    ours, made = scorer(tmp_path, "vqa")
    run = tmp_path / "run"

    def checkpoint(best: dict[str, Any] | None = None) -> Any:
        ours.score(made, "test", run, 40, best)
        return json.loads((run / "scores_test.json").read_text())["about"]["checkpoint"]

    run.mkdir()
    nothing = {"path": str(run), "weights": None, "sha256": None, "step": 40}
    assert checkpoint() == nothing
    for name, best in (("model", None), ("model_best", {"step": 40, "metric": "val/soft_accuracy", "value": 1.0})):
        weights = run / name / "model.safetensors"
        weights.parent.mkdir()
        weights.write_bytes(save({name: torch.zeros(2)}, metadata={"format": "eve-ds step 30"}))
        assert checkpoint(best) == nothing  # exported at another step
        weights.write_bytes(save({name: torch.zeros(2)}, metadata={"format": "eve-ds step 40"}))
        write_hashes(weights.parent, ("model.safetensors",))
        assert checkpoint(best) == nothing | {
            "weights": str(weights),
            "sha256": sha256(weights.read_bytes()).hexdigest(),
        }


@pytest.mark.parametrize("task", PARTS)
def test_each_prediction_is_stored_with_its_confidence(task: str, tmp_path: Path) -> None:
    assert prepare(tmp_path, task, lost=None) == 0
    score(tmp_path, task, tmp_path / "run")
    rows = pq.read_table(tmp_path / "run" / "details_test.parquet").to_pylist()
    scores = json.loads((tmp_path / "run" / "scores_test.json").read_text())
    assert [row["sample"] for row in rows] == [*range(12), *(range(6) if task == "retrieval" else ())]
    mean = {
        key: 100 * np.mean([row["score"] for row in rows if row.get("query") == key])
        for key in {row.get("query") for row in rows}
    }
    if task == "retrieval":
        assert (mean["text"], mean["image"]) == (pytest.approx(scores["img_r1"]), pytest.approx(scores["txt_r1"]))
        assert all((row["rank"] == 1) == row["score"] for row in rows)
    else:
        expected = scores["soft_accuracy"] if task == "vqa" else 100 * scores["accuracy"]
        assert mean[None] == pytest.approx(expected)
        assert all(0 <= row["confidence"] <= 1 and isinstance(row["prediction"], str) for row in rows)


def test_predictions_without_answers_have_details_without_scores(tmp_path: Path) -> None:
    asked = [{key: value for key, value in record.items() if key != "answer"} for record in records("vqa")]
    (tmp_path / "raw.json").write_text(json.dumps(asked))
    assert prepare(tmp_path, "vqa", lost=None) == 0
    score(tmp_path, "vqa", tmp_path / "run")
    rows = pq.read_table(tmp_path / "run" / "details_test.parquet").to_pylist()
    assert len(rows) == 12 and all(row["score"] is None for row in rows)
