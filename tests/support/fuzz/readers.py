"""Fuzz targets of evaluation and reports: predictions, annotations, score arrays, what a run leaves in its folder."""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import baselines, nlvr, retrieval, submission, vqa
from evaluation.common import run
from eve_ds.report import __main__ as report
from tests.support.fuzz.runner import Target, Wrong
from tests.support.fuzz.seeds import dumped, lines, tree_of
from tests.support.made_run import make_run

ANSWERS = [{"answer": "yes" if n < 7 else "no", "answer_id": n + 1, "answer_confidence": "yes"} for n in range(10)]
ANNOTATIONS = {
    "annotations": [
        {"question_id": n, "image_id": n, "answers": ANSWERS, "multiple_choice_answer": "yes", "answer_type": "yes/no",
         "question_type": "is it"}
        for n in range(4)
    ]
}  # fmt: skip
QUESTIONS = {"questions": [{"question_id": n, "image_id": n, "question": f"is it {n}?"} for n in range(4)]}
PREDICTIONS = [{"question_id": n, "answer": ("yes", "no", "maybe", "yes")[n]} for n in range(4)]
STATEMENTS = [
    {"identifier": f"dev-{n}-{pair}-0", "label": str(bool(n % 2)), "sentence": "a"} for n in range(3) for pair in (0, 1)
]


def _scored(command: Callable[[list[str]], None], ranges: tuple[float, float], *words: str) -> Callable[[Path], int]:
    """Run a command of ``evaluation``; every number that it writes must be finite and within its range."""

    def read(folder: Path) -> int:
        out = folder / "scores.json"
        arguments = [word.replace("@", f"{folder}/") for word in words]
        code = run(command, [*arguments, "--out", str(out)])
        if code == 0:
            _check_numbers(json.loads(out.read_text()), ranges, "")
        return code

    return read


def _check_numbers(value: Any, ranges: tuple[float, float], where: str) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _check_numbers(part, ranges, f"{where}.{key}")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise Wrong(f"score {where} is {value!r}")
    elif not (math.isfinite(value) and ranges[0] <= value <= ranges[1]):
        raise Wrong(f"score {where} is {value}")


def _arrays() -> bytes:
    buffer = io.BytesIO()
    scores = np.random.default_rng(0).random((3, 6), dtype=np.float32)
    np.savez(buffer, image_to_text=scores, text_to_image=scores.T.copy(), text_image_index=np.arange(6) // 2)
    return buffer.getvalue()


def _retrieved(folder: Path) -> int:
    """As ``_scored``; what was taken must be what NumPy reads, scored by sorting."""
    out = folder / "scores.json"
    code = run(retrieval.main, ["--scores", f"{folder}/s.npz", "--out", str(out)])
    if code == 0:
        with np.load(folder / "s.npz", allow_pickle=False) as arrays:
            scores, index = arrays["text_to_image"].astype(float), arrays["text_image_index"]
        right = [np.argsort(row)[::-1][0] == image for row, image in zip(scores, index, strict=True)]
        found = json.loads(out.read_text())["img_r1"]
        if len({*scores.ravel()}) == scores.size and abs(found - 100 * np.mean(right)) > 1e-6:
            raise Wrong(f"img_r1 is {found}, not {100 * np.mean(right)}")
    return code


def scores() -> list[Target]:
    """The three metrics and the baselines."""
    asked = {"p.json": dumped(PREDICTIONS), "a.json": dumped(ANNOTATIONS), "q.json": dumped(QUESTIONS)}
    judged = {
        "p.csv": lines(f"{row['identifier']},True" for row in STATEMENTS),
        "s.json": lines(json.dumps(row) for row in STATEMENTS),
        "l.jsonl": lines(json.dumps(row) for row in STATEMENTS),
    }
    both = {f"{part}.json": dumped(value) for part, value in
            (("tq", QUESTIONS), ("ta", ANNOTATIONS), ("q", QUESTIONS), ("a", ANNOTATIONS))}  # fmt: skip
    words = ("--train-questions", "@tq.json", "--train-annotations", "@ta.json", "--questions", "@q.json")
    return [
        Target("vqa", asked, list(asked), _scored(
            vqa.main, (0, 100), "--predictions", "@p.json", "--annotations", "@a.json", "--questions", "@q.json")),
        Target("submission", asked | {"a.json": dumped(["yes", "no", "maybe"])}, list(asked), _submitted),
        Target("nlvr", judged, ["p.csv", "l.jsonl"], _scored(
            nlvr.main, (0, 1), "--predictions", "@p.csv", "--annotations", "@l.jsonl")),
        Target("retrieval", {"s.npz": _arrays()}, ["s.npz"], _retrieved),
        Target("baselines", both, list(both), _scored(
            baselines.main, (0, 100), *words, "--annotations", "@a.json")),
    ]  # fmt: skip


def _submitted(folder: Path) -> int:
    """What is written for the VQA server must be in its format, with each question once."""
    words = [f"--{name}={folder}/{name[0]}.json" for name in ("predictions", "questions", "answers")]
    code = run(submission.main, [*words, f"--out={folder}/scores.json"])
    if code == 0:
        rows = json.loads((folder / "scores.json").read_text())
        asked = [row["question_id"] for row in json.loads((folder / "q.json").read_text("utf-8-sig"))["questions"]]
        if [row["question_id"] for row in rows] != asked or not all(isinstance(row["answer"], str) for row in rows):
            raise Wrong("the submission is not what the server takes")
    return code


def _few(records: bytes) -> bytes:
    """The last lines of metrics.jsonl, with as few numbers as make two charts: each is drawn."""
    found = [json.loads(line) for line in records.split(b"\n")[-8:] if line]
    kept = ("step", "samples", "loss", "val/loss", "val/soft_accuracy")
    return lines(json.dumps({key: value for key, value in record.items() if key in kept}) for record in found)


def reports() -> list[Target]:
    """The demo's folder and a training run's."""

    def shown(folder: Path) -> int:
        code = run(report.main, ["--run", str(folder), "--out", f"{folder}/report.html"])
        if code == 0 and b"<script" in (folder / "report.html").read_bytes():
            raise Wrong("markup of the run stands in the page")
        return code

    with tempfile.TemporaryDirectory() as scratch:
        make_run(Path(scratch))
        files = tree_of(Path(scratch))
    shorter = {name: _few(content) if name.endswith("jsonl") else content for name, content in files.items()}
    shorter = {name: content for name, content in shorter.items() if not name.startswith(("itr", "nlvr"))}
    single = {name.removeprefix("vqa/"): content for name, content in shorter.items() if name.startswith("vqa/")}
    single |= {"scores_test.json": b'{"soft_accuracy": 71.5}', "config.yaml": b"task: vqa\n"}
    text = [name for name in shorter if not name.endswith(".png")]
    return [
        Target("report-demo", shorter, [*text, next(name for name in shorter if name.endswith(".png"))], shown),
        Target("report-run", single, [name for name in single if not name.endswith(".png")], shown),
    ]
