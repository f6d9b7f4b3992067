"""VQA accuracy as the official evaluation computes it (GT-Vision-Lab/VQA; Agrawal, Lu, Antol et al., ICCV 2015).

A question has (ten) human answers. An answer's accuracy is the mean, over the sets that leave one human out, of
``min(1, matches in the set / 3)``: 0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3 and at least 4 matches of ten. Answers are
compared after the official normalization, oddities included (``normalize`` lists them), but *only if* the human answers
are not all the same text: where they are, the prediction must equal that text to the letter.
"""

from __future__ import annotations

import contextlib
import gc
import re
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from evaluation import bootstrap
from evaluation.common import (
    InputError,
    Parser,
    excerpt,
    first_few,
    naming,
    printable,
    read_json,
    run,
    write_json,
    write_scores,
)
from evaluation.contractions import CONTRACTIONS

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # not ' : $ % nor the period, which has a rule of its own
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_REMOVED = 32  # the official code passes the flag re.UNICODE, 32, where re.sub expects a count
KEPT = 1 << 18  # texts whose forms are remembered: people give the same few answers over and over
DECIMALS = 6  # scores are rounded as the official evaluation rounds them, with its precision n = 6


@lru_cache(maxsize=KEPT)
def clean(text: str) -> str:
    """Replace newlines and tabs with spaces, and strip."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=KEPT)
def normalize(text: str) -> str:
    """The official normal form of an answer returned by ``clean``.

    - A punctuation mark is deleted everywhere if it is next to a space somewhere in the *original* text, or if that
      text has digit-comma-digit anywhere; otherwise it becomes a space.
    - Of the periods that are not followed by a digit, the first 32 are deleted.
    - Lower case; "none", "zero" to "ten" become digits; articles are removed; contractions without apostrophe get one.
    """
    result = text
    keep_together = DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in PUNCTUATION:
        if mark in text:
            touches_space = f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if touches_space or keep_together else " ")
    result = PERIOD.sub("", result, count=PERIODS_REMOVED)
    words = [DIGITS.get(word, word) for word in result.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The accuracy of one prediction, in percent, against the human answers (ten in VQA v2, at least two)."""
    prediction, humans = clean(prediction), [*map(clean, answers)]
    if humans.count(humans[0]) < len(humans):
        prediction, humans = normalize(prediction), [*map(normalize, humans)]
    matches = humans.count(prediction)
    # Of the leave-one-out sets, `matches` have one match fewer. Counted in thirds, so that the result is exact.
    thirds = matches * min(3, matches - 1) + (len(humans) - matches) * min(3, matches)
    return 100.0 * thirds / (3 * len(humans))


def per_question(
    predictions: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], allow_extra: bool = False
) -> dict[Hashable, float]:
    """Accuracy of each question in percent, by ``question_id``, in the order of the annotations.

    Args:
        predictions: ``{"question_id": ..., "answer": text}`` each, the official results; one for each annotation.
        annotations: the official objects, of which ``question_id``, ``answers[].answer``, ``answer_type`` and
            ``question_type`` are read.
        allow_extra: take predictions for other questions than the annotated ones, and leave them out.
    Raises:
        InputError: an object of another form, and a missing, duplicate or (but with ``allow_extra``) unknown
            ``question_id``.
    """
    given = by_id(predictions, "prediction", read_prediction)
    humans = by_id(annotations, "annotation", read_annotation)
    if not humans:
        raise InputError("there are no annotations to score against")
    if not allow_extra and (unknown := [question for question in given if question not in humans]):
        raise InputError(
            f"{len(unknown)} of {len(given)} predictions have a question_id that is not in the annotations: "
            f"{first_few(unknown)}; --allow_extra leaves them out"
        )
    if missing := [question for question in humans if question not in given]:
        raise InputError(
            f"{len(missing)} of {len(humans)} questions have no prediction: question_id {first_few(missing)}"
        )
    return {question: accuracy(given[question], answers) for question, answers in humans.items()}


def score(predictions: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``{"overall": ..., "per_answer_type": {...}, "per_question_type": {...}}`` in percent, rounded to 6 decimals.

    Arguments and errors are those of ``per_question``.
    """
    return summary(per_question(predictions, annotations), annotations)


def summary(by_question: Mapping[Hashable, float], annotations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``score`` gives, of the accuracies that ``per_question`` gives."""
    result: dict[str, Any] = {"overall": round(sum(by_question.values()) / len(by_question), DECIMALS)}
    for key in ("answer_type", "question_type"):
        groups = defaultdict(list)
        for annotation in annotations:
            groups[annotation[key]].append(by_question[annotation["question_id"]])
        result[f"per_{key}"] = {name: round(sum(g) / len(g), DECIMALS) for name, g in sorted(groups.items())}
    return result


def by_id(rows: Sequence[Mapping[str, Any]], kind: str, read: Any) -> dict[Hashable, Any]:
    """``question_id`` -> what ``read`` makes of its row; what ``read`` raises gets the row's number and id."""
    result: dict[Hashable, Any] = {}
    for number, row in enumerate(rows):
        if (question := _question_id(row)) is None:
            raise InputError(f"{kind} {number}: no JSON object with a 'question_id'")
        if question in result:
            raise InputError(f"{kind} {number}: question_id {excerpt(question)} occurs twice")
        try:
            result[question] = read(row)
        except InputError as error:
            raise InputError(f"{kind} {number} (question_id {excerpt(question)}): {error}") from error
    return result


def _question_id(row: Any) -> int | str | None:
    """The id of a row, None where it has none."""
    question = row.get("question_id") if isinstance(row, Mapping) else None
    return question if isinstance(question, int | str) and not isinstance(question, bool) else None


def read_prediction(row: Mapping[str, Any]) -> str:
    """The answer in a row of predictions."""
    if not isinstance(row.get("answer"), str):
        raise InputError(f"'answer' must be text, got {excerpt(row.get('answer'))}")
    return str(row["answer"])


def read_annotation(row: Mapping[str, Any]) -> list[str]:
    for key in ("answer_type", "question_type"):
        if not isinstance(row.get(key), str):
            raise InputError(f"{key!r} must be text, got {excerpt(row.get(key))}")
    answers = row.get("answers")
    if not isinstance(answers, list) or len(answers) < 2:
        raise InputError("'answers' must list at least two answers (VQA v2 has ten)")
    try:
        texts = [answer["answer"] for answer in answers]
    except (TypeError, KeyError, IndexError):
        texts = []
    if not (texts and all(isinstance(text, str) for text in texts)):
        raise InputError("'answers' must hold objects with a text 'answer'")
    return texts


def read_list(path: str, key: str | None) -> list[Any]:
    """The list in a JSON file, under ``key`` if one is given."""
    return listed(read_json(path), path, key)


def listed(value: Any, path: str, key: str | None) -> list[Any]:
    """The list that ``value``, read from file ``path``, is, or has under ``key``. Raises InputError."""
    if key is not None:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, list):
        raise InputError(f"{path}: must be " + (f"a JSON object with a list {key!r}" if key else "a JSON list"))
    return value


def _restrict(annotations: list[Any], questions: list[Any], path: str) -> list[Any]:
    """The annotations of the questions listed in file ``path``, each of which must have one."""
    with naming(path):
        wanted = by_id(questions, "question", lambda row: None)
    kept = [row for row in annotations if _question_id(row) in wanted]
    found = {_question_id(row) for row in kept}
    if lacking := [question for question in wanted if question not in found]:
        raise InputError(f"{path}: questions without annotation: question_id {first_few(lacking)}")
    return kept


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's collector walks through the millions of objects of the files time and again, and finds nothing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def read_annotations(annotations: str, questions: str | None) -> tuple[list[Any], str]:
    """The annotations in a file, those of the questions in file ``questions`` alone if one is given; and what they are,
    for messages.

    Raises:
        InputError: unreadable files, and a question without annotation; names the file.
    """
    rows = read_list(annotations, "annotations")
    if questions is None:
        return rows, annotations
    return _restrict(rows, read_list(questions, "questions"), questions), f"{annotations} restricted to {questions}"


@no_garbage_collection()
def per_question_of_files(
    predictions: str, annotations: str, questions: str | None = None, allow_extra: bool = False
) -> tuple[dict[Hashable, float], list[Any]]:
    """What ``per_question`` gives, of files, and the annotations; ``questions`` restricts both to its questions.

    Raises:
        InputError: unreadable files, and as ``per_question``; names the file.
    """
    given, (rows, against) = read_list(predictions, None), read_annotations(annotations, questions)
    with naming(f"{predictions} against {against}"):
        by_question = per_question(given, rows, allow_extra or questions is not None)
    if len(given) > len(by_question):
        extra = len(given) - len(by_question)
        note = f"note: {extra} predictions belong to no question of {against} and were not counted"
        print(printable(note), file=sys.stderr)
    return by_question, rows


def main(arguments: list[str] | None = None) -> None:
    """The command ``python -m evaluation.vqa``."""
    parser = Parser(prog="python -m evaluation.vqa", description=__doc__)
    parser.add_argument(
        "--predictions", required=True, metavar="P.json", help='official results: [{"question_id", "answer"}]'
    )
    parser.add_argument("--annotations", required=True, metavar="A.json", help="official VQA v2 annotations")
    parser.add_argument(
        "--questions", metavar="Q.json", help="official VQA v2 questions: score the predictions for these alone"
    )
    parser.add_argument(
        "--allow_extra", action="store_true", help="leave predictions for other questions out, instead of refusing them"
    )
    parser.add_argument("--per_question", metavar="D.json", help="also write the accuracy of each question")
    parser.add_argument("--out", required=True, metavar="M.json", help="where the accuracies go, in percent")
    bootstrap.add_option(parser)
    options = parser.parse_args(arguments)
    by_question, annotations = per_question_of_files(
        options.predictions, options.annotations, options.questions, options.allow_extra
    )
    scores = summary(by_question, annotations)
    found = bootstrap.confidence(bootstrap.vqa_parts(by_question, annotations)) if options.intervals else {}
    parts = {"overall": ("overall", scores["overall"])}
    parts |= {f"per_answer_type/{name}": (name, value) for name, value in scores["per_answer_type"].items()}
    line = " ".join(
        f"{printable(name)} {bootstrap.shown(value, found.get(key), '.2f')}" for key, (name, value) in parts.items()
    )
    try:
        if options.per_question:
            write_json(options.per_question, {str(question): value for question, value in by_question.items()})
    finally:  # last, as a reader of the line that has left ends the command
        write_scores(options.out, bootstrap.beside(scores, found), line)


if __name__ == "__main__":
    sys.exit(run(main))
