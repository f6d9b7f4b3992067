"""Tests of two fine-tuned runs on the same examples, from their files of predictions.

Right answers to questions and statements are read from the data set that the runs name, if it is still there;
retrieval's scores have them with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from evaluation import nlvr, retrieval
from evaluation.common import InputError, read_json
from evaluation.significance import paired_bootstrap, sign_test
from eve_ds.data.shards import Row
from eve_ds.data.sources import open_split
from eve_ds.report.compared import Compared
from preprocessing.errors import UserError

T = TypeVar("T")
Tests = dict[str, str]  # result in words, by measure


class NotTested(Exception):
    """Why there is no test, in words."""


def paired_tests(task: str, first: Compared, other: Compared, split: str) -> Tests:
    """Test ``other`` against ``first`` on the examples of a split.

    Raises:
        NotTested: there are no predictions of both, or these are of other examples, or their answers are not known.
    """
    kind = {"retrieval": _retrieval, "vqa": _questions, "nlvr": _statements}.get(task)
    if kind is None:
        raise NotTested("there is no test for a task of one's own")
    try:
        return kind(first, other, split)
    except (InputError, UserError) as error:
        raise NotTested(str(error)) from error


def _retrieval(first: Compared, other: Compared, split: str) -> Tests:
    ours, theirs = (_ranks(run, split) for run in (first, other))
    if not np.array_equal(ours[2], theirs[2]):
        raise NotTested("their predictions are of other images and texts")
    tests = {}
    for name, a, b, image in (("txt", ours[0], theirs[0], None), ("img", ours[1], theirs[1], ours[2])):
        for k in retrieval.CUTOFFS:
            found = paired_bootstrap(a < k, b < k, image)
            tests[f"{name}_r{k}"] = (
                f"{100 * found.low:+.1f} to {100 * found.high:+.1f}, p\N{NO-BREAK SPACE}{_p(found.p)}"
            )
    return tests


def _ranks(run: Compared, split: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.integer]]:
    """Ranks of the right text of each image, of the right image of each text; and the image of each text."""
    path = _file(run, split, "npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = arrays["text_image_index"]
            texts = retrieval.text_ranks(arrays["image_to_text"], index)
            return texts, retrieval.image_ranks(arrays["text_to_image"], index), index
    except InputError:
        raise
    except Exception as error:  # zipfile and NumPy raise errors of all kinds on damaged files
        raise NotTested(f"{path} cannot be read ({type(error).__name__})") from error


def _questions(first: Compared, other: Compared, split: str) -> Tests:
    given = [_answers(_file(run, split, "json")) for run in (first, other)]

    def answer(row: Row, item: int) -> tuple[int, dict[str, float]]:
        answers, scores = (row.item(column, item) or [] for column in ("answers", "answer_scores"))
        return int(row.item("question_id", item)), dict(zip(answers, scores, strict=True))

    truths = _truths("vqa", first, other, split, answer)
    keys = _same_keys(given[0], given[1], truths)
    a, b = (np.array([truths[key].get(one[key], 0.0) for key in keys]) for one in given)
    return {"soft_accuracy": _sign(a, b, "questions")}


def _answers(path: Path) -> dict[Any, str]:
    rows = read_json(path)
    try:
        return {row["question_id"]: str(row["answer"]) for row in rows}
    except (TypeError, KeyError) as error:
        raise NotTested(f"{path} is no list of answers") from error


def _statements(first: Compared, other: Compared, split: str) -> Tests:
    given = [nlvr.read_predictions(str(_file(run, split, "csv"))) for run in (first, other)]

    def label(row: Row, item: int) -> tuple[str, str]:
        return str(row.item("identifier", item)), str(row.item("answers", item)).lower()

    truths = _truths("nlvr", first, other, split, label)
    keys = _same_keys(given[0], given[1], truths)
    a, b = (np.array([one[key].lower() == truths[key] for key in keys]) for one in given)
    return {"accuracy": _sign(a, b, "statements")}


def _file(run: Compared, split: str, suffix: str) -> Path:
    path = run.stage.folder / f"predictions_{split}.{suffix}"
    if not path.is_file():
        raise NotTested(f"there is no {path.name} of {run.name}")
    return path


def _truths(
    kind: str, first: Compared, other: Compared, split: str, read: Callable[[Row, int], tuple[Any, T]]
) -> dict[Any, T]:
    """What ``read`` makes of each sample of the split, from the data set of the first run or else that of the other."""
    tried = []
    for run in (first, other):
        home = str(run.config.get("data.path") or "")
        for folder in (Path(home), Path(str(run.start.get("directory", ""))) / home):
            try:
                found = open_split(folder, split, kind)
                samples = (found.sample(number) for number in range(found.samples))
                return dict(read(row, item) for _, row, item in samples)
            except (UserError, ValueError, TypeError, OSError) as error:
                tried.append(str(error))
    raise NotTested(f"the right answers cannot be read: {tried[0]}")


def _same_keys(first: Mapping[Any, Any], other: Mapping[Any, Any], truths: Mapping[Any, Any]) -> list[Any]:
    if first.keys() != other.keys() or not first.keys() <= truths.keys():
        raise NotTested("their predictions are of other examples")
    return list(first)


def _sign(a: NDArray[Any], b: NDArray[Any], examples: str) -> str:
    found = sign_test(a, b)
    return f"better on {found.second:,} {examples}, worse on {found.first:,}, p\N{NO-BREAK SPACE}{_p(found.p)}"


def _p(value: float) -> str:
    return f"=\N{NO-BREAK SPACE}{value:.2g}" if value >= 0.0005 else "<\N{NO-BREAK SPACE}0.0005"
