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


@pytest.mark.parametrize("broken", [None, "train_annotations"])
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str | None) -> None:
    names = ("train_questions", "train_annotations", "questions", "annotations")
    arguments = ["--out", str(tmp_path / "out.json")]
    for name, value in zip(names, (*TRAIN, *TEST), strict=True):
        key = "annotations" if name.endswith("annotations") else "questions"
        (tmp_path / f"{name}.json").write_text("{" if name == broken else json.dumps({key: value}))
        arguments += [f"--{name.replace('_', '-')}", str(tmp_path / f"{name}.json")]
    assert run(baselines.main, arguments) == (2 if broken else 0)
    if broken:
        assert f"{broken}.json: invalid JSON at line 1" in capsys.readouterr().err
    else:
        assert json.loads((tmp_path / "out.json").read_text())["majority_baseline"] == 50
