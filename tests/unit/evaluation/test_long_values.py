"""A value of a file that a message shows is cut: a line of a megabyte hides what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import baselines, compare, nlvr, retrieval, submission, vqa
from evaluation.common import excerpt, run

COMMANDS = {
    module.__name__.rpartition(".")[2]: module for module in (baselines, compare, nlvr, retrieval, submission, vqa)
}
LONG = "x" * 100_000
QUESTION = {"question_id": 1, "question": "what?"}
ANNOTATION = {"question_id": 1, "answers": [{"answer": "a"}] * 10, "question_type": "b", "answer_type": "c"}
EXAMPLE = {"identifier": "dev-1-0-0", "label": "True"}
FILES: dict[str, Any] = {
    "p.json": [{"question_id": 1, "answer": "a"}],
    "q.json": {"questions": [QUESTION]},
    "a.json": {"annotations": [ANNOTATION]},
    "n.json": [EXAMPLE],
    "n.csv": "dev-1-0-0,True\n",
    "p_answer.json": [{"question_id": 1, "answer": [LONG]}],
    "p_id.json": [{"question_id": LONG, "answer": "a"}],
    "p_twice.json": [{"question_id": LONG, "answer": "a"}] * 2,
    "q_text.json": {"questions": [QUESTION | {"question": [LONG]}]},
    "q_id.json": {"questions": [QUESTION | {"question_id": LONG}]},
    "a_type.json": {"annotations": [ANNOTATION | {"answer_type": [LONG]}]},
    "a_id.json": {"annotations": [ANNOTATION | {"question_id": LONG}]},
    "answers.json": ["a"],
    "p_long.json": [{"question_id": 1, "answer": LONG}],
    "n_label.json": [EXAMPLE | {"label": LONG}],
    "n_form.json": [EXAMPLE | {"identifier": LONG}],
    "n_other.json": [EXAMPLE | {"identifier": f"dev-{LONG}-0-0"}],
    "n_form.csv": LONG,
    "n_twice.csv": f"{LONG},True\n" * 2,
}
BLIND = "--train-questions q.json --train-annotations a.json --questions q.json --annotations a.json"
CASES = [
    "vqa --predictions p_answer.json --annotations a.json",
    "vqa --predictions p_id.json --annotations a.json",
    "vqa --predictions p_twice.json --annotations a.json",
    "vqa --predictions p.json --annotations a_type.json",
    "vqa --predictions p.json --annotations a.json --questions q_id.json",
    "nlvr --predictions n.csv --annotations n_label.json",
    "nlvr --predictions n.csv --annotations n_form.json",
    "nlvr --predictions n.csv --annotations n_other.json",
    "nlvr --predictions n_form.csv --annotations n.json",
    "nlvr --predictions n_twice.csv --annotations n.json",
    "submission --predictions p_id.json --questions q.json",
    "submission --predictions p_long.json --questions q.json --answers answers.json",
    "submission --predictions p.json --questions q_id.json",
    f"baselines {BLIND} --questions q_text.json",
    f"baselines {BLIND} --train-annotations a_type.json",
    f"baselines {BLIND} --train-annotations a_id.json",
    "compare p.json p_id.json --annotations a.json",
    "retrieval --scores s.npz",
]


@pytest.mark.parametrize("line", CASES)
def test_a_message_stays_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("s.npz", **{"x" * 30_000: np.zeros(1)})
    for name, value in FILES.items():
        Path(name).write_text(value if isinstance(value, str) else json.dumps(value))
    command, *words = line.split()
    assert run(COMMANDS[command].main, [*words, "--out", "m.json"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "xxx" in told and len(told) < 500


def test_secrets_are_hidden_before_a_value_is_cut() -> None:
    assert excerpt("s3://me:" + "p" * 80 + "@bucket/a") == "'s3://***@bucket/a'"
