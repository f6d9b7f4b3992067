"""What a model gets on VQA without looking: counted by hand on a handful of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation import baselines
from evaluation.common import run


def rows(pairs: list[tuple[str, str]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    questions = [{"question_id": i, "question": question} for i, (question, _) in enumerate(pairs)]
    kinds = {"answer_type": "other", "question_type": "what"}
    humans = [{"question_id": i, "answers": [{"answer": a}] * 10} | kinds for i, (_, a) in enumerate(pairs)]
    return questions, humans


TRAIN = rows(
    [("What shape?", "circle"), ("what  shape?", "circle"), ("how many?", "2"), ("how many?", "2"), ("any?", "2")]
)
TEST = rows([("what shape?", "circle"), ("how many?", "3"), ("any?", "2"), ("never met?", "2")])


def test_majority_and_text_only() -> None:
    found = baselines.vqa_baselines(*TRAIN, *TEST)
    assert found == {"majority_baseline": 50, "text_only_baseline": 75}


NAMES = ("train_questions", "train_annotations", "questions", "annotations")


def command(folder: Path, **replaced: str) -> int:
    """Run it on the rows above, in files NAME.json of ``folder``, but for the files whose text is given."""
    arguments = [f"--out={folder}/out.json"]
    for name, value in zip(NAMES, (*TRAIN, *TEST), strict=True):
        text = replaced.get(name) or json.dumps({name.removeprefix("train_"): value})
        (folder / f"{name}.json").write_text(text)
        arguments.append(f"--{name.replace('_', '-')}={folder}/{name}.json")
    return run(baselines.main, arguments)


def test_command(tmp_path: Path) -> None:
    assert command(tmp_path) == 0
    assert json.loads((tmp_path / "out.json").read_text())["majority_baseline"] == 50


MORE = {"question_id": 9, "question": "why?"}
ONE_ANSWER = {"question_id": 0, "answers": [{"answer": "a"}], "answer_type": "b", "question_type": "c"}
SPLIT = "give questions and annotations of one split"


@pytest.mark.parametrize("train", ["", "train_"])
@pytest.mark.parametrize(
    ("name", "rows", "fault"),
    [
        ("questions", [{"question_id": 0}], "question 0 (question_id 0): 'question' must be text, got None"),
        (
            "annotations",
            [ONE_ANSWER],
            "annotation 0 (question_id 0): 'answers' must list at least two answers (VQA v2 has ten)",
        ),
        ("annotations", [], "there are no annotations"),
        (
            "annotations",
            [*TEST[1], {**TRAIN[1][0], "question_id": 9}],
            f"1 of 5 annotations are for no question of FOLDER/TRAINquestions.json: question_id 9; {SPLIT}",
        ),
    ],
)
def test_a_fault_names_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], train: str, name: str, rows: list[Any], fault: str
) -> None:
    assert command(tmp_path, **{f"{train}{name}": json.dumps({name: rows})}) == 2
    told = fault.replace("FOLDER", str(tmp_path)).replace("TRAIN", train)
    assert capsys.readouterr().err == f"error: {tmp_path}/{train}{name}.json: {told}\n"


def test_questions_without_annotation_are_named_and_training_questions_may_lack_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path, train_questions=json.dumps({"questions": [*TRAIN[0], MORE]})) == 0
    assert command(tmp_path, questions=json.dumps({"questions": [*TEST[0], MORE]})) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/questions.json: 1 of 5 questions have no annotation in {tmp_path}/annotations.json: "
        f"question_id 9; {SPLIT}\n"
    )
    assert command(tmp_path, train_annotations="{") == 2
    assert "train_annotations.json: invalid JSON at line 1" in capsys.readouterr().err
