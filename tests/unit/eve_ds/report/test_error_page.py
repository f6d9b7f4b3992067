"""The page of errors: mistakes first, with images, escaped and self-contained; bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from evaluation.common import run
from eve_ds.report.__main__ import main
from eve_ds.report.error_page import chosen
from tests.support.page import Page
from tests.support.scored import prepare, records, score

EVIL = "<script>alert & red"
TASKS = {"vqa": "vqa", "nlvr": "nlvr", "retrieval": "itr_coco"}
TEXT = {"vqa": "question", "nlvr": "sentence", "retrieval": "caption"}


def scored_run(folder: Path, task: str) -> Path:
    """The folder of a run that scored 12 texts about 6 images; one text is markup."""
    made = records(task)
    made[3][TEXT[task]] = EVIL
    (folder / "raw.json").write_text(json.dumps(made))
    assert prepare(folder, task, lost=None) == 0
    out = folder / "run"
    score(folder, task, out)
    config = {"task": TASKS[task], "data": {"path": str(folder / "data")}}
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    return out


def written(folder: Path, *options: str) -> tuple[str, Page]:
    assert run(main, ["errors", "--run", str(folder), "--html", str(folder / "errors.html"), *options]) == 0
    content = (folder / "errors.html").read_text()
    return content, Page(content)


def cards(page: Page) -> list[dict[str, str | None]]:
    return [attributes for name, attributes in page.tags if name == "article"]


@pytest.mark.parametrize("task", TASKS)
def test_every_prediction_is_there_with_its_images_by_falling_confidence(task: str, tmp_path: Path) -> None:
    folder = scored_run(tmp_path, task)
    _, page = written(folder)
    details = pq.read_table(folder / "details_test.parquet").to_pylist()
    found = cards(page)
    expected = sorted((row["confidence"] for row in details), reverse=True)
    assert [float(card["data-confidence"] or "") for card in found] == pytest.approx(expected, rel=1e-5)
    wrong = sum(not row["score"] for row in details)
    assert [card["data-result"] for card in found].count("wrong") == wrong
    assert [card["data-result"] for card in found].count("right") == len(details) - wrong
    sources = [attributes["src"] or "" for name, attributes in page.tags if name == "img"]
    assert len(sources) >= {"nlvr": 2}.get(task, 1) * len(found)
    assert all(source.startswith("data:image/") for source in sources)


@pytest.mark.parametrize("task", TASKS)
def test_a_text_that_is_markup_stays_text_and_nothing_is_loaded(task: str, tmp_path: Path) -> None:
    content, page = written(scored_run(tmp_path, task))
    assert page.count("script") == 1 and "<script>alert" not in content and EVIL in page.text
    assert not [name for name, _ in page.tags if name in ("link", "iframe", "object")]
    assert all("://" not in (value or "") for _, attributes in page.tags for value in attributes.values())
    words = [card["data-words"] or "" for card in cards(page)]
    assert any(EVIL.lower() in each for each in words)


def test_the_form_has_what_there_is_to_choose(tmp_path: Path) -> None:
    made = records("vqa")
    for number, answer in enumerate(("yes", "7", "red", "no")):
        made[number]["answer"] = answer
    (tmp_path / "raw.json").write_text(json.dumps(made))
    folder = tmp_path / "run"
    (tmp_path / "answers.json").write_text("[]")
    assert prepare(tmp_path, "vqa", lost=None) == 0
    score(tmp_path, "vqa", folder)
    (folder / "config.yaml").write_text(yaml.safe_dump({"task": "vqa", "data": {"path": str(tmp_path / "data")}}))
    _, page = written(folder)
    values = [attributes["value"] for name, attributes in page.tags if name == "option"]
    assert {"wrong", "right", "yes/no", "falling", "rising"} <= set(values)
    assert {card["data-kind"] for card in cards(page)} <= set(values)
    assert [attributes["name"] for name, attributes in page.tags if name == "input"] == ["words"]


def test_of_many_predictions_the_most_confident_wrong_ones_are_shown(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    score_of, confidence = (rng.random(1000) < 0.6).astype(float), rng.random(1000)
    parts = chosen(score_of, confidence, 100)
    places, total = parts["wrong"]
    assert (len(places), total) == (75, int((score_of == 0).sum()))
    left_out = np.setdiff1d(np.flatnonzero(score_of == 0), places)
    assert confidence[places].min() > confidence[left_out].max()
    places, total = parts["right"]
    assert (len(places), total) == (25, int(score_of.sum())) and (score_of[places] == 1).all()
    assert confidence[places].max() > 0.95 and confidence[places].min() < 0.1  # from all over
    few = chosen(np.array([0, 1, 1, 1, 1, np.nan]), np.arange(6.0), 4)
    assert [few[name][0].tolist() for name in ("wrong", "right", "unknown")] == [[0], [4, 3, 2], []]
    unknown = chosen(np.full(10, np.nan), np.arange(10.0), 5)
    assert (unknown["unknown"][0].tolist(), unknown["unknown"][1]) == ([9, 7, 5, 3, 1], 10)


def test_the_page_says_how_many_of_how_many_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = scored_run(tmp_path, "nlvr")
    details = pq.read_table(folder / "details_test.parquet")
    result = pa.array([0.0] * 9 + [1.0] * 3, pa.float32())
    place = details.column_names.index("score")
    pq.write_table(details.set_column(place, "score", result), folder / "details_test.parquet")
    _, page = written(folder, "--limit", "8")
    assert len(cards(page)) == 8 and "6 of 9 wrong, 2 of 3 right (of those left out" in page.text
    assert "MB): 6 of 9 wrong, 2 of 3 right\n" in capsys.readouterr().out


def test_answers_that_nobody_knows_are_shown_as_such(tmp_path: Path) -> None:
    asked = [{key: value for key, value in record.items() if key != "answer"} for record in records("vqa")]
    (tmp_path / "raw.json").write_text(json.dumps(asked))
    assert prepare(tmp_path, "vqa", lost=None) == 0
    score(tmp_path, "vqa", tmp_path / "run")
    config = {"task": "vqa", "data": {"path": str(tmp_path / "data")}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    _, page = written(tmp_path / "run")
    assert {card["data-result"] for card in cards(page)} == {"unknown"} and "12 of 12 answer not known" in page.text


def damage(folder: Path, what: str) -> list[Any]:
    details = folder / "details_test.parquet"
    if what == "split":
        return ["--split", "val"]
    if what == "limit":
        return ["--limit", "0"]
    if what == "details":
        details.write_bytes(b"PAR1")
    elif what == "column":
        pq.write_table(pq.read_table(details).drop_columns(["confidence"]), details)
    elif what == "data":
        assert prepare(folder.parent, "vqa", "--overwrite", "--exclude", f"{folder.parent}/list.txt", lost=None) == 0
    elif what == "gone":
        return ["--data", str(folder / "nothing")]
    elif what == "run":
        (folder / "config.yaml").unlink()
    return []


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("split", "details_val.parquet: no such file; it has test; choose one with --split"),
        ("limit", "--limit 0 is not from 1 to"),
        ("details", "details_test.parquet: is no Parquet file that can be read"),
        ("column", "details_test.parquet: has no column 'confidence'"),
        ("data", "data/test: is not the data that was scored"),
        ("gone", "(--data names the prepared data set that was scored)"),
        ("run", "config.yaml: "),
    ],
)
def test_bad_input_is_one_line(what: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = scored_run(tmp_path, "vqa")
    (tmp_path / "list.txt").write_text("2.png\n")
    more = damage(folder, what)
    capsys.readouterr()
    try:
        code = run(main, ["errors", "--run", str(folder), "--html", str(tmp_path / "errors.html"), *more])
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "errors.html").exists()
