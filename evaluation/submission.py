"""A file for the VQA v2 server (test-dev, test-standard): checked against the questions, and written in its format.

The server (EvalAI) scores nothing of a file that lacks a question or has one too many, and allows few uploads a day.
Here every question of ``--questions`` must have exactly one answer, a text, and with ``--answers`` one of those. Since
2021 the server wants all questions of test2015 for test-dev, too (v2_OpenEnded_mscoco_test2015_questions.json).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from evaluation import vqa
from evaluation.common import InputError, Parser, first_few, naming, printable, read_json, run, write_text

PART = "test-dev"  # in the data_subtype of questions that are a part of test2015


def submission(
    predictions: Sequence[Mapping[str, Any]],
    questions: Sequence[Mapping[str, Any]],
    answers: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """The rows ``{"question_id": int, "answer": text}`` that the server takes, in the order of the questions.

    Args:
        predictions: rows with ``question_id`` and ``answer``; other fields are left out.
        questions: the official questions, of which ``question_id`` is read.
        answers: those that may be given; None: any text.
    Raises:
        InputError: rows of another form; ids that are no whole numbers or occur twice; questions without prediction,
            predictions without question, and answers that may not be given, all of them counted.
    """
    asked = vqa.by_id(questions, "question", _check_number)
    given = vqa.by_id(predictions, "prediction", _read_answer)
    if not asked:
        raise InputError("there are no questions")
    faults = []
    if missing := [question for question in asked if question not in given]:
        faults.append(f"{len(missing)} of {len(asked)} questions have no prediction: question_id {first_few(missing)}")
    if extra := [question for question in given if question not in asked]:
        faults.append(f"{len(extra)} of {len(given)} predictions are for no question: question_id {first_few(extra)}")
    advice = ["predict the split of these questions"] if faults else []
    if answers is not None:
        listed = frozenset(answers)
        if unknown := [question for question, answer in given.items() if answer not in listed]:
            kinds = list(dict.fromkeys(given[question] for question in unknown))
            of = f"of question_id {first_few(unknown)}"
            faults.append(f"{len(unknown)} answers are not in the list: {first_few(kinds)}, {of}")
    if faults:
        raise InputError("; ".join([*faults, *advice]))
    return [{"question_id": question, "answer": given[question]} for question in asked]


def _check_number(row: Mapping[str, Any]) -> None:
    if not isinstance(row["question_id"], int):
        raise InputError("the server's ids are whole numbers, not text")


def _read_answer(row: Mapping[str, Any]) -> str:
    _check_number(row)
    return vqa.read_prediction(row)


def read_answers(path: str) -> list[str]:
    """The answers in a JSON list, or the names in a JSON object ``{answer: label}``. Raises InputError."""
    answers = read_json(path)
    if isinstance(answers, dict):
        answers = list(answers)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"{path}: must be a JSON list of answers, or an object {{answer: label}}")
    return answers


def main(arguments: list[str] | None = None) -> None:
    """The command ``python -m evaluation.submission``."""
    parser = Parser(prog="python -m evaluation.submission", description=__doc__)
    add = parser.add_argument
    add("--predictions", required=True, metavar="P.json", help="predictions_test.json of a VQA run")
    add("--questions", required=True, metavar="Q.json", help="v2_OpenEnded_mscoco_test2015_questions.json")
    add("--answers", metavar="L.json", help="answer_list.json of the run: refuse answers that are not in it")
    add("--out", required=True, metavar="S.json", help="where the file for the server goes")
    options = parser.parse_args(arguments)
    head = read_json(options.questions)
    questions = vqa.listed(head, options.questions, "questions")
    answers = None if options.answers is None else read_answers(options.answers)
    against = options.questions + ("" if answers is None else f" and {options.answers}")
    with naming(f"{options.predictions} against {against}"):
        rows = submission(vqa.read_list(options.predictions, None), questions, answers)
    write_text(options.out, json.dumps(rows))
    subset = str(head.get("data_subtype", ""))
    told = f"{options.out}: {len(rows)} answers, one for each question{f' of {subset}' if subset else ''}"
    print(printable(told))
    if PART in subset:
        note = (
            f"note: {options.questions} has the questions of {subset} alone; since 2021 the server wants an answer to "
            "every question of test2015 for test-dev, too"
        )
        print(printable(note), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main))
