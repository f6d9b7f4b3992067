"""docs/own_data.md: its files, and its commands in their order as they stand, with few steps on a part of easy-VQA."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
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


def train(folder: Path, words: list[str]) -> None:
    """One training of the page, of few steps, in one process without the launcher."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", *words[len(LAUNCHER) :], *SHORT]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"


def run(folder: Path, words: list[str]) -> str:
    """Another command of the page, in this process: most of its time would be the imports."""
    name = words[2] if words[2].startswith("evaluation.") else f"{words[2]}.__main__"
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        code = importlib.import_module(name).main(words[3:])
    assert not code, f"{shlex.join(words)}\n{out.getvalue()}"
    return out.getvalue()


def run_all(folder: Path, *marks: str) -> str:
    """All commands of the page with one of these words, in their order; what they printed."""
    chosen = [words for words in commands() if words[0] == "python" and any(mark in words[2] for mark in marks)]
    return "".join(run(folder, words) for words in chosen)


@pytest.fixture(scope="module")
def prepared(folder: Path) -> str:
    return run_all(folder, "preprocessing")


@pytest.fixture(scope="module")
def pretrained(folder: Path, prepared: str) -> Path:
    (words,) = (words for words in commands() if "eve_ds.pretrain" in words)
    train(folder, words)
    return folder


@pytest.fixture(scope="module")
def tuned(pretrained: Path) -> Path:
    """All fine-tunings, two at a time: they do not need one another."""
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda words: train(pretrained, words), (w for w in commands() if "eve_ds.finetune" in w)))
    return pretrained


def test_every_command_is_run_here() -> None:
    known = ("preprocessing", "evaluation.compare", "eve_ds.report", "eve_ds.predict")
    for words in commands():
        assert words[: len(LAUNCHER)] == LAUNCHER or (words[:2] == ["python", "-m"] and words[2] in known), words


def test_the_three_files_become_splits(folder: Path, prepared: str) -> None:
    assert prepared.count("rows, ") >= 9 and prepared.count("for comparison: always saying ") == 2
    assert (folder / "questions.html").stat().st_size > 1000


def test_the_small_model_is_pretrained(pretrained: Path) -> None:
    assert (pretrained / "runs/own/model/model.safetensors").is_file()


def test_each_task_is_scored_with_its_best_weights(tuned: Path) -> None:
    metrics = {"itr": "r_mean", "vqa": "soft_accuracy", "nlvr": "accuracy", "vqa-first": "soft_accuracy"}
    for name, metric in metrics.items():
        scores = json.loads((tuned / "runs" / name / "scores_test.json").read_text())
        assert metric in scores and "best" in scores and "incomplete" not in scores, name


def test_runs_are_compared_shown_and_used(tuned: Path) -> None:
    assert "McNemar" in run_all(tuned, "evaluation")
    said = run_all(tuned, "eve_ds.report", "eve_ds.predict")
    assert len(re.findall(r"^0\.\d{4}  ", said, re.MULTILINE)) >= 3  # probabilities of answers
    for page in ("errors.html", "report.html", "found.html"):
        assert (tuned / page).stat().st_size > 1000, page


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
