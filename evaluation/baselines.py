"""Baselines for VQA v2 that ignore the image: the numbers to compare a score with.

    python -m evaluation.baselines --train-questions Q.json --train-annotations A.json \\
        --questions Q.json --annotations A.json --out M.json

``majority_baseline`` answers each question with the training answer that scores best. ``text_only_baseline`` answers
with the one that scores best on the training questions with the same words, or the majority answer if there are none:
no model that sees only the words can learn more from the training set.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from evaluation import vqa
from evaluation.common import InputError, Parser, excerpt, first_few, naming, run, write_scores

Rows = Sequence[Mapping[str, Any]]
Scores = dict[str, float]


def vqa_baselines(
    train_questions: Rows,
    train_annotations: Rows,
    questions: Rows,
    annotations: Rows,
    names: Sequence[str] = ("training questions", "training annotations", "questions", "annotations"),
) -> dict[str, float]:
    """Official overall accuracy, percent, of the two blind models.

    Args:
        train_questions, questions: rows with ``question_id`` and ``question``.
        train_annotations, annotations: rows with ``question_id`` and ``answers``.
        names: of the four, for messages: their files.
    Raises:
        InputError: rows of another form, no annotations, an annotation without its question, and a question without
            annotation, which only the training questions may be; names the one of the four at fault.
    """
    words, said = _joined(train_questions, train_annotations, names[:2])
    asked, right = _joined(questions, annotations, names[2:])
    if lacking := [question for question in asked if question not in right]:
        raise InputError(
            f"{names[2]}: {len(lacking)} of {len(asked)} questions have no annotation in {names[3]}: question_id "
            f"{first_few(lacking)}; give questions and annotations of one split"
        )
    overall: Scores = defaultdict(float)
    by_words: dict[str, Scores] = defaultdict(lambda: defaultdict(float))
    for question, answers in said.items():
        for answer, score in _soft_scores(answers).items():
            overall[answer] += score
            by_words[words[question]][answer] += score
    majority = _best(overall)
    best = {key: _best(scores) for key, scores in by_words.items()}
    blind = {
        "majority_baseline": [{"question_id": question, "answer": majority} for question in asked],
        "text_only_baseline": [
            {"question_id": question, "answer": best.get(text, majority)} for question, text in asked.items()
        ],
    }
    return {name: vqa.score(rows, annotations)["overall"] for name, rows in blind.items()}


def _joined(
    questions: Rows, annotations: Rows, names: Sequence[str]
) -> tuple[dict[Hashable, str], dict[Hashable, list[str]]]:
    """The words of each question and the answers of each annotation, by ``question_id``."""
    with naming(names[0]):
        words = vqa.by_id(questions, "question", _key)
    with naming(names[1]):
        answers = vqa.by_id(annotations, "annotation", vqa.read_annotation)
        if not answers:
            raise InputError("there are no annotations")
        if unknown := [question for question in answers if question not in words]:
            raise InputError(
                f"{len(unknown)} of {len(answers)} annotations are for no question of {names[0]}: question_id "
                f"{first_few(unknown)}; give questions and annotations of one split"
            )
    return words, answers


def _key(row: Mapping[str, Any]) -> str:
    """The words of a question."""
    if not isinstance(row.get("question"), str):
        raise InputError(f"'question' must be text, got {excerpt(row.get('question'))}")
    return " ".join(str(row["question"]).lower().split())


def _soft_scores(texts: Sequence[str]) -> dict[str, float]:
    """Each answer's official accuracy, in percent."""
    return {text: vqa.accuracy(text, texts) for text in dict.fromkeys(texts)}


def _best(scores: Scores) -> str:
    """The answer with the highest score; of equal ones the first in alphabetical order."""
    return min(scores, key=lambda answer: (-scores[answer], answer))


def main(arguments: list[str] | None = None) -> None:
    """The command ``python -m evaluation.baselines``."""
    parser = Parser(prog="python -m evaluation.baselines", description=__doc__)
    files = ("train_questions", "train_annotations", "questions", "annotations")
    for name in files:
        parser.add_argument(f"--{name.replace('_', '-')}", required=True, help="VQA v2 JSON file")
    parser.add_argument("--out", required=True, help="JSON file to write")
    options = vars(parser.parse_args(arguments))
    rows = {name: vqa.read_list(options[name], name.removeprefix("train_")) for name in files}
    scores = vqa_baselines(**rows, names=[options[name] for name in files])
    write_scores(options["out"], scores, " ".join(f"{name} {value:.2f}" for name, value in scores.items()))


if __name__ == "__main__":
    raise SystemExit(run(main))
