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
from evaluation.bootstrap import Parts, nlvr_parts, numbered, paired, retrieval_parts
from evaluation.common import InputError, read_json
from evaluation.significance import sign_test
from eve_ds.data.shards import Row
from eve_ds.data.sources import open_split
from eve_ds.report.compared import Compared
from eve_ds.report.scores import RERANKED
from preprocessing.errors import UserError

T = TypeVar("T")
Tests = dict[str, str]  # result in words, by measure; reranked/MEASURE after re-ranking


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
    tests = _ranks(first, other, split)
    if all(_path(run, f"{split}_{RERANKED}", "npz").is_file() for run in (first, other)):
        tests |= {f"{RERANKED}/{name}": told for name, told in _ranks(first, other, f"{split}_{RERANKED}").items()}
    return tests


def _ranks(first: Compared, other: Compared, named: str) -> Tests:
    """Of the scores in predictions_NAMED.npz."""
    ours, theirs = (retrieval.file_ranks(str(_file(run, named, "npz"))) for run in (first, other))
    if not np.array_equal(ours[2], theirs[2]):
        raise NotTested("their predictions are of other images and texts")
    return _intervals(*(retrieval_parts(*ranks, retrieval.CUTOFFS) for ranks in (ours, theirs)), factor=1)


def _intervals(*parts: Parts, factor: float = 100) -> Tests:
    """Interval of the two models' difference, in percent: ``factor`` times the metrics; and p."""
    first, other = parts
    return {
        name: f"{factor * found.low:+.1f} to {factor * found.high:+.1f}, p\N{NO-BREAK SPACE}{_p(found.p)}"
        for name, found in paired(first, other).items()
    }


def _questions(first: Compared, other: Compared, split: str) -> Tests:
    given = [_answers(_file(run, split, "json")) for run in (first, other)]

    def answer(number: int, row: Row, item: int) -> tuple[int, tuple[int, dict[str, float]]]:
        answers, scores = (row.item(column, item) or [] for column in ("answers", "answer_scores"))
        return int(row.item("question_id", item)), (number, dict(zip(answers, scores, strict=True)))

    truths = _truths("vqa", first, other, split, answer)
    keys = _same_keys(given[0], given[1], truths)
    a, b = (np.array([truths[key][1].get(one[key], 0.0) for key in keys]) for one in given)
    image = numbered([truths[key][0] for key in keys])
    parts = [Parts({"soft_accuracy": (values, image)}, int(image.max()) + 1) for values in (a, b)]
    return _with_sign(_intervals(*parts), "soft_accuracy", a, b, "questions")


def _answers(path: Path) -> dict[Any, str]:
    rows = read_json(path)
    try:
        return {row["question_id"]: str(row["answer"]) for row in rows}
    except (TypeError, KeyError) as error:
        raise NotTested(f"{path} is no list of answers") from error


def _statements(first: Compared, other: Compared, split: str) -> Tests:
    given = [nlvr.read_predictions(str(_file(run, split, "csv"))) for run in (first, other)]

    def label(number: int, row: Row, item: int) -> tuple[str, str]:
        return str(row.item("identifier", item)), str(row.item("answers", item)).lower()

    truths = _truths("nlvr", first, other, split, label)
    keys = _same_keys(given[0], given[1], truths)
    a, b = (np.array([one[key].lower() == truths[key] for key in keys]) for one in given)
    sentences = [nlvr.sentence_of(key) for key in keys]
    parts = [nlvr_parts(right.tolist(), sentences) for right in (a, b)]
    return _with_sign(_intervals(*parts), "accuracy", a, b, "statements")


def _path(run: Compared, named: str, suffix: str) -> Path:
    return run.stage.folder / f"predictions_{named}.{suffix}"


def _file(run: Compared, named: str, suffix: str) -> Path:
    path = _path(run, named, suffix)
    if not path.is_file():
        raise NotTested(f"there is no {path.name} of {run.name}")
    return path


def _truths(
    kind: str, first: Compared, other: Compared, split: str, read: Callable[[int, Row, int], tuple[Any, T]]
) -> dict[Any, T]:
    """What ``read`` makes of each sample of the split: the number of its row, the row, and which item of it.

    From the data set of the first run or else that of the other.
    """
    tried = []
    for run in (first, other):
        home = str(run.config.get("data.path") or "")
        for folder in (Path(home), Path(str(run.start.get("directory", ""))) / home):
            try:
                found = open_split(folder, split, kind)
                samples = (found.sample(number) for number in range(found.samples))
                return dict(read(*sample) for sample in samples)
            except (UserError, ValueError, TypeError, OSError) as error:
                tried.append(str(error))
    raise NotTested(f"the right answers cannot be read: {tried[0]}")


def _same_keys(first: Mapping[Any, Any], other: Mapping[Any, Any], truths: Mapping[Any, Any]) -> list[Any]:
    if first.keys() != other.keys() or not first.keys() <= truths.keys():
        raise NotTested("their predictions are of other examples")
    if not first:
        raise NotTested("there are no predictions")
    return list(first)


def _with_sign(tests: Tests, measure: str, a: NDArray[Any], b: NDArray[Any], examples: str) -> Tests:
    """``tests``, that of ``measure`` with the exact test as well."""
    found = sign_test(a, b)
    exact = f"better on {found.second:,} {examples}, worse on {found.first:,}, p\N{NO-BREAK SPACE}{_p(found.p)}"
    return tests | {measure: f"{tests[measure]}; {exact}"}


def _p(value: float) -> str:
    return f"=\N{NO-BREAK SPACE}{value:.2g}" if value >= 0.0005 else "<\N{NO-BREAK SPACE}0.0005"
