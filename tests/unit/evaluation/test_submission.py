"""Files for the VQA server: what is written, and what is refused before it is uploaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation import submission
from evaluation.common import run

QUESTIONS = [{"question_id": number, "image_id": 1, "question": "?"} for number in (12, 3, 7)]
PREDICTIONS = [
    {"question_id": 3, "answer": "café", "probability": 0.5},
    {"question_id": 7, "answer": "2"},
    {"question_id": 12, "answer": ""},
]


class Files:
    """Predictions, questions and an answer list in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("p.json", PREDICTIONS)
        self.write("q.json", {"data_subtype": "test2015", "questions": QUESTIONS})
        self.write("l.json", ["", "2", "café"])

    def write(self, name: str, value: Any) -> None:
        (self.folder / name).write_text(value if isinstance(value, str) else json.dumps(value))

    def run(self, *more: str) -> int:
        paths = {option: str(self.folder / name) for option, name in (("predictions", "p"), ("questions", "q"))}
        arguments = [word for option, path in paths.items() for word in (f"--{option}", f"{path}.json")]
        return run(submission.main, [*arguments, "--out", str(self.folder / "s.json"), *more])

    def answers(self) -> list[str]:
        return ["--answers", str(self.folder / "l.json")]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_the_servers_rows_are_written_in_the_order_of_the_questions(files: Files, capsys) -> None:
    assert files.run(*files.answers()) == 0
    text = (files.folder / "s.json").read_bytes()
    assert json.loads(text) == [
        {"question_id": 12, "answer": ""},
        {"question_id": 3, "answer": "café"},
        {"question_id": 7, "answer": "2"},
    ]
    assert text.isascii() and text.startswith(b"[") and text.endswith(b"]")  # one JSON list, no lines of JSON
    printed = capsys.readouterr()
    assert "3 answers, one for each question of test2015" in printed.out and printed.err == ""


def test_questions_of_test_dev_alone_are_remarked(files: Files, capsys) -> None:
    files.write("q.json", {"data_subtype": "test-dev2015", "questions": QUESTIONS})
    assert files.run() == 0
    assert "the server wants an answer to every question of test2015 for test-dev, too" in capsys.readouterr().err
    files.write("q.json", {"data_subtype": "test-dev\ud800\x1b[31m", "questions": QUESTIONS})
    assert files.run() == 0
    printed = capsys.readouterr()
    assert all(r"test-dev\ud800\x1b[31m" in text for text in (printed.out, printed.err))


def test_every_fault_is_counted_in_one_line(files: Files, capsys) -> None:
    files.write("p.json", [*PREDICTIONS[:2], *({"question_id": number, "answer": "owl"} for number in range(20, 26))])
    assert files.run(*files.answers()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "p.json against " in error
    assert "1 of 3 questions have no prediction: question_id 12; " in error
    assert "6 of 8 predictions are for no question: question_id 20, 21, 22 and 3 more; " in error
    assert "6 answers are not in the list: 'owl', of question_id 20, 21, 22 and 3 more; predict the " in error
    assert not (files.folder / "s.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", [*PREDICTIONS, PREDICTIONS[0]], "prediction 3: question_id 3 occurs twice\n"),
        ("l.json", ["", "2"], "1 answers are not in the list: 'café', of question_id 3\n"),
        ("p.json", [{"question_id": "3", "answer": "no"}], "ids are whole numbers, not text"),
        ("p.json", [{"question_id": 3, "answer": ["no"]}], "'answer' must be text, got ['no']"),
        ("p.json", [{"question_id": 3}], "'answer' must be text, got None"),
        ("p.json", " \n", "p.json: is empty"),
        ("p.json", '{"question_id": 3}\n{"question_id": 7}', "p.json: invalid JSON at line 2 column 1: Extra data"),
        ("p.json", {"3": "no"}, "p.json: must be a JSON list"),
        ("q.json", {"questions": []}, "there are no questions"),
        ("q.json", [], "q.json: must be a JSON object with a list 'questions'"),
        ("q.json", {"questions": [{"id": 3}]}, "question 0: no JSON object with a 'question_id'"),
        ("l.json", ["a", 2], "l.json: must be a JSON list of answers"),
        ("l.json", {}, "l.json: must be a JSON list of answers"),
    ],
)
def test_bad_files_exit_with_2_and_one_line(files: Files, capsys, name: str, content: object, words: str) -> None:
    files.write(name, content)
    assert files.run(*files.answers()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (files.folder / "s.json").exists()


def test_a_list_in_lxmerts_form_will_do(files: Files) -> None:
    files.write("l.json", {"": 0, "2": 1, "café": 2})
    assert files.run(*files.answers()) == 0


def test_the_output_may_not_be_the_predictions(files: Files, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        files.run("--out", str(files.folder / "p.json"))
    assert caught.value.code == 2 and "are one file" in capsys.readouterr().err
    assert json.loads((files.folder / "p.json").read_text()) == PREDICTIONS
