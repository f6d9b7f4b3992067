"""Details by hand or of a user's own task: shown as far as they tell, else refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from evaluation.common import run
from eve_ds.report.__main__ import main
from tests.support.page import Page
from tests.support.scored import prepare, records, score

OWN = "docs.examples.my_task:SPEC"


def scored_run(folder: Path, task: str, named: str) -> Path:
    (folder / "raw.json").write_text(json.dumps(records(task)))
    assert prepare(folder, task, lost=None) == 0
    score(folder, task, folder / "run")
    config = {"task": named, "data": {"path": str(folder / "data")}}
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "run"


def rewrite(folder: Path, **columns: Any) -> None:
    """Other columns in the place of those that the file of details has; None leaves one out."""
    path = folder / "details_test.parquet"
    table = pq.read_table(path)
    held = {name: table[name] for name in table.column_names} | columns
    kept = {name: column for name, column in held.items() if column is not None}
    pq.write_table(pa.table(kept, metadata=table.schema.metadata), path)


def page_of(folder: Path) -> Page:
    assert run(main, ["errors", "--run", str(folder), "--html", str(folder / "errors.html")]) == 0
    return Page((folder / "errors.html").read_text())


def test_a_task_of_ones_own_over_captions_has_a_page(tmp_path: Path) -> None:
    folder = scored_run(tmp_path, "retrieval", OWN)
    own = pa.array([*range(12)] * 2)[:18]
    rewrite(folder, sample=own, query=None, rank=None, prediction=pa.array(range(100, 118)))
    page = page_of(folder)
    assert "a square in image 5" in page.text and "117 · confidence " in page.text
    assert page.count("article") == page.count("img") == 18
    rewrite(folder, rank=pa.array([1.5] * 18))  # a column that happens to be called so
    assert page_of(folder).text == page.text


def test_numbers_as_predictions_and_no_known_score(tmp_path: Path) -> None:
    folder = scored_run(tmp_path, "vqa", "vqa")
    rewrite(folder, prediction=pa.array(range(12)), score=pa.nulls(12), confidence=pa.array([1] * 12))
    page = page_of(folder)
    assert "12 of 12 answer not known" in page.text and "11 · confidence 1.000" in page.text


ODD: list[tuple[str, dict[str, Any], str]] = [
    ("vqa", {"confidence": pa.array([0.5, None] * 6)}, "row 1: confidence is None; score the split again"),
    ("vqa", {"confidence": pa.array([0.5, float("nan")] * 6)}, "row 1: confidence is nan"),
    ("vqa", {"confidence": pa.array(["much"] * 12)}, "column 'confidence' holds string, not numbers"),
    ("vqa", {"score": pa.array(["1"] * 12)}, "column 'score' holds string, not numbers or nulls"),
    ("vqa", {"sample": pa.array([0.0] * 12)}, "column 'sample' holds double, not whole numbers"),
    ("vqa", {"sample": pa.array([*range(11), 12])}, "row 11: sample is 12, but the split has 0 to 11"),
    ("vqa", {"sample": pa.array([-1] * 12)}, "row 0: sample is -1, but the split has 0 to 11"),
    ("retrieval", {"prediction": pa.array(["0"] * 18)}, "column 'prediction' holds string, not whole numbers"),
    ("retrieval", {"prediction": pa.array([6] * 18)}, "row 0: prediction is 6, but the split has 0 to 5"),
    ("retrieval", {"prediction": pa.array([0] * 17 + [12])}, "row 17: prediction is 12, but the split has 0 to 11"),
    ("retrieval", {"rank": pa.array([None] * 18, pa.int64())}, "row 0: rank is None"),
    ("retrieval", {"query": pa.array(["text"] * 17 + ["sound"])}, "row 17: query is 'sound'"),
]


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_odd_details_are_one_line(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = scored_run(tmp_path, task, {"retrieval": "itr_coco"}.get(task, task))
    path = folder / "details_test.parquet"
    good = path.read_bytes()
    for named, columns, words in ODD:
        if named == task:
            path.write_bytes(good)
            rewrite(folder, **columns)
            capsys.readouterr()
            assert run(main, ["errors", "--run", str(folder), "--html", str(tmp_path / "errors.html")]) == 2, words
            error = capsys.readouterr().err
            assert f"{path}: {words}" in error and error.count("\n") == 1
            assert not (tmp_path / "errors.html").exists()
