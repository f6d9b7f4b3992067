"""docs/own_data.md: its files, and its commands in their order as they stand, with few steps on a part of easy-VQA."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.ranks import REPOSITORY
from tests.unit.test_documents import text_of

pytest.importorskip("easy_vqa", reason="pip install easy-vqa")

PAGE = text_of(REPOSITORY / "docs" / "own_data.md")
LAUNCHER = ["deepspeed", "--num_gpus", "2", "--module"]
NOT_HERE = "eve_base.th"  # in the command that starts from published weights
SHORT = ["--optimizer.total_steps=2", "--logging.eval_every=2", "--logging.eval_samples=8"]
SHORT += ["--engine.global_batch_size=8", "--data.num_workers=0"]
COLOR = "what color is the shape?"
IMAGES = 60  # of each split of the package


def commands() -> list[list[str]]:
    """The page's commands that can be run here, as words, in their order."""
    lines = re.findall(r"^ {4}(\S.*)$", re.sub(r"^```.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return [shlex.split(line) for line in lines if NOT_HERE not in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user begins with: `photos`, and the three files, of which the page's own lines write the questions."""
    folder = tmp_path_factory.mktemp("own")
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    subprocess.run([sys.executable, "-c", example], cwd=folder, check=True)
    with open(folder / "questions.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    few = [row for row in rows if int(Path(row[0]).stem) < IMAGES]
    for image in {row[0] for row in rows} - {row[0] for row in few}:
        (folder / "photos" / image).unlink()
    shape: dict[str, dict[str, str]] = defaultdict(dict)
    for image, question, answer in few:
        shape[image][question] = answer
    color = {image: told[COLOR] for image, told in shape.items() if COLOR in told}
    pairs = list(zip(color, [*color][1:], strict=False))
    for name, head, content in (
        ("questions", header, few),
        ("captions", ["image", "caption"], [(image, f"a shape in {name}") for image, name in color.items()]),
        (
            "statements",
            ["image_0", "image_1", "statement", "label"],
            [(a, b, f"{n}: the left shape is blue", color[a] == "blue") for n, (a, b) in enumerate(pairs)],
        ),
    ):
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([head, *content])
    return folder


def run(folder: Path, words: list[str]) -> str:
    """One command of the page; trainings are short, in one process without the launcher."""
    if words[: len(LAUNCHER)] == LAUNCHER:
        words = ["python", "-m", *words[len(LAUNCHER) :], *SHORT]
    assert words[:2] == ["python", "-m"], words
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_every_command_of_the_page_runs(folder: Path) -> None:
    """From three files to scores, a comparison, pages and predictions."""
    printed = {}
    for tuning, some in itertools.groupby(commands(), lambda words: "eve_ds.finetune" in words):
        with ThreadPoolExecutor(2 if tuning else 1) as threads:  # fine-tunings do not need one another
            chosen = [*some]
            told = threads.map(lambda words: run(folder, words), chosen)
            printed |= dict(zip(map(shlex.join, chosen), told, strict=True))
    prepared = "".join(text for command, text in printed.items() if "preprocessing own" in command)
    assert prepared.count("rows, ") == 9 and prepared.count("for comparison: always saying ") == 2
    metrics = {"itr": "r_mean", "vqa": "soft_accuracy", "nlvr": "accuracy", "vqa-first": "soft_accuracy"}
    for name, metric in metrics.items():
        scores = json.loads((folder / "runs" / name / "scores_test.json").read_text())
        assert metric in scores and "best" in scores and "incomplete" not in scores, name
    (compared,) = (text for command, text in printed.items() if "evaluation.compare" in command)
    assert "McNemar" in compared
    for page in ("questions.html", "errors.html", "report.html", "found.html"):
        assert (folder / page).stat().st_size > 1000, page


def test_the_three_forms_of_the_page_are_taken(folder: Path, tmp_path: Path) -> None:
    """Lines 1 to 3 of each column of its table, with the images that they name."""
    rows = [line.split("|")[2:-1] for line in PAGE.splitlines() if re.match(r"\| line \d", line)]
    assert len(rows) == 3
    image = next((folder / "photos").rglob("*.png")).read_bytes()
    for number, column in enumerate(zip(*rows, strict=True)):
        file = tmp_path / f"{number}.csv"
        file.write_text("".join(cell.strip().strip("`") + "\n" for cell in column), encoding="utf-8")
        for name in re.findall(r"[\w/]+\.jpg", file.read_text(encoding="utf-8")):
            (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "photos" / name).write_bytes(image)
        out = tmp_path / f"data{number}"
        words = f"python -m preprocessing own --annotations {file} --images photos --out {out} --val 0 --test 0"
        assert "2 samples" in run(tmp_path, words.split())
