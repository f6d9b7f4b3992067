"""Scores that cannot be written are told in a line, and printed: they may have taken hours."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation import baselines, nlvr, retrieval, vqa
from evaluation.common import run

ASSETS = Path(__file__).parents[3] / "tests/assets"
PLACES = {"/dev/full": "No space left on device", "/proc/nowhere/scores.json": "No such file or directory"}
QUESTIONS, ANNOTATIONS = f"{ASSETS}/vqa_questions.json", f"{ASSETS}/vqa_annotations.json"
COMMANDS = {
    "retrieval": (retrieval.main, [f"--scores={ASSETS}/retrieval_scores.npz"], "txt_r1 "),
    "vqa": (vqa.main, [f"--predictions={ASSETS}/vqa_predictions.json", f"--annotations={ANNOTATIONS}"], "overall "),
    "nlvr": (
        nlvr.main,
        [f"--predictions={ASSETS}/nlvr2_predictions.csv", f"--annotations={ASSETS}/nlvr2_split.json"],
        "accuracy ",
    ),
    "baselines": (
        baselines.main,
        [
            *(f"--train-questions={QUESTIONS}", f"--train-annotations={ANNOTATIONS}"),
            *(f"--questions={QUESTIONS}", f"--annotations={ANNOTATIONS}"),
        ],
        "majority_baseline ",
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", COMMANDS)
def test_scores_are_printed(name: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, arguments, words = COMMANDS[name]
    assert run(command, [*arguments, f"--out={place}"]) == 2
    told = capsys.readouterr()
    assert told.err == f"error: {place}: cannot be written: {PLACES[place]}\n"
    assert told.out.startswith(words) and told.out.count("\n") == 1
