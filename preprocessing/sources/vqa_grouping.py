"""Groups questions into VQA rows with labels and soft scores: what all VQA converters share."""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preprocessing.errors import UserError
from preprocessing.images.exclusion import EXCLUDED
from preprocessing.images.image_refs import ImageRef
from preprocessing.running.storage import StoragePath, storage_path
from preprocessing.shards.schema import ANSWER_LIST
from preprocessing.sources.source import Faults, Row, Source
from preprocessing.text.answers import (
    Labels,
    build_answer_list,
    labels_of,
    normalize_answer,
    read_answer_list,
    resolve_answer_list,
    soft_score,
)
from preprocessing.text.cleaning import text_fault

_MAX_EXAMPLES = 10  # entries of an answer list in a message


@dataclass(frozen=True)
class RawQuestion:
    """One question of a raw data set."""

    image: ImageRef
    image_id: str
    text: str
    question_id: int
    answers: tuple[str, ...]  # as people wrote them: ten, one, or none on test splits
    main_answer: str | None  # counts for the answer list; None: the most frequent of `answers`
    where: str  # file and record, for messages
    counts: bool = True  # whether its main answer counts for the answer list
    excluded: bool = False  # whether --exclude names its image
    votes: bool = False  # whether a single answer is the vote of one person, not the right answer


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the answer list."""
    parser.add_argument(
        "--answer-list",
        metavar="FILE",
        help="answers by label: the JSON list of X-VLM, ALBEF, BLIP or lxmert, or lxmert's JSON object {answer: label} "
        "(default: built from the train split)",
    )
    parser.add_argument(
        "--min-answers",
        type=int,
        default=9,
        metavar="N",
        help="a built list holds the answers that are right for at least N training questions (default 9)",
    )


def answer_list_option(args: argparse.Namespace) -> list[str] | None:
    """The list in the file of --answer-list; None without the option. Raises UserError."""
    return None if args.answer_list is None else read_answer_list(storage_path(args.answer_list))


def vqa_source(
    asked: Sequence[RawQuestion],
    inputs: Sequence[StoragePath],
    args: argparse.Namespace,
    given: Sequence[str] | None,
    named: str | None,
    min_answers: int,
    faults: Faults,
    beside: Counter[str] | None = None,
) -> Source:
    """Group questions by image, in the order of first mention, and label them by the data set's answer list.

    The list is `given`, of the file `named`, or is found or built by `resolve_answer_list` from the main answers of the
    questions and from those counted in `beside`. Questions whose image is excluded and those
    without a word are left out and counted by reason. So are training questions with a `text_fault` and those without a
    listed answer, which stay in other splits, with empty lists. Raises UserError for a duplicate question id, for an
    image id of two images, for a list that is found where `beside` gives another, and as `resolve_answer_list` does.
    """
    faults.check(len(asked), args.max_dropped)  # before an answer list is built from too few questions
    _check_unique(asked)
    source = Source("vqa", [], inputs, {"questions": len(asked)}, faults=faults)
    if not asked:
        return source
    source.counts["images"] = len({question.image_id for question in asked})
    allowed = [question for question in asked if not question.excluded]
    source.left_out[f"question: {EXCLUDED}"] = len(asked) - len(allowed)
    kept = []
    for question in allowed:
        fault = text_fault(question.text) if args.split == "train" else ""
        if question.text.strip() and not fault:
            kept.append(question)
        else:
            source.left_out[f"question {fault or 'without a word'}"] += 1
    source.left_out = +source.left_out  # without a zero
    said = [Counter(normalize_answer(answer) for answer in question.answers) for question in kept]
    main = Counter(
        normalize_answer(question.main_answer) if question.main_answer is not None else answers.most_common(1)[0][0]
        for question, answers in zip(kept, said, strict=True)
        if answers and question.counts
    )
    main.update(beside or ())
    source.answer_list = resolve_answer_list(
        storage_path(args.out), args.split, given, main, min_answers, args.overwrite
    )
    place = storage_path(args.out) / ANSWER_LIST
    if beside and source.answer_list != build_answer_list(main, min_answers):  # the one found may be a killed run's
        raise UserError(
            f"{place}: is there and stays, so --answer-annotations would not count; leave them out, or choose another "
            "--out"
        )
    labels = labels_of(source.answer_list)
    source.rows = _label(kept, said, labels.of, source, args.split == "train")
    source.notes += _notes(source, labels, named or f"{place}", args.split)
    return source


def _notes(source: Source, labels: Labels, where: str, split: str) -> list[str]:
    """What to tell of the answer list in file `where`: entries spelled otherwise, those without use, what to do."""
    listed = source.answer_list or []
    keep = "keep them for a head that was trained with this list, else take them out"
    notes = [
        ("are spelled as no normalized answer is", labels.respelled),
        (f"can never be right; {keep}", labels.unreachable),
    ]
    if split == "train":
        taught = {label for row in source.rows for some in row.columns["answer_labels"] for label in some}
        untaught = [repr(listed[label]) for label in sorted(set(labels.of.values()) - taught)]
        notes.append((f"are the answer of no training question, so that none is learnt; {keep}", untaught))
    return [
        f"{where}: {len(entries)} of {len(listed)} entries {what}: {', '.join(entries[:_MAX_EXAMPLES])}"
        + (", …" if len(entries) > _MAX_EXAMPLES else "")
        for what, entries in notes
        if entries
    ]


def _label(
    asked: Sequence[RawQuestion], said: Sequence[Counter[str]], labels: dict[str, int], source: Source, training: bool
) -> list[Row]:
    """One row an image: its questions, each with those of its normalized answers (`said`) that have a label."""
    listed = source.answer_list or []
    rows: dict[str, Row] = {}
    for question, answers in zip(asked, said, strict=True):
        known = [answer for answer in answers if answer in labels]
        if not known and training:
            source.left_out[_why_unanswered(answers)] += 1
            continue
        known.sort(key=lambda answer: (-answers[answer], labels[answer]))
        only = len(question.answers) == 1 and not question.votes  # Visual Genome, easy-VQA: the right answer
        row = rows.get(question.image_id) or rows.setdefault(question.image_id, _empty_row(question))
        row.columns["questions"].append(question.text)
        row.columns["question_id"].append(question.question_id)
        row.columns["answers"].append([listed[labels[answer]] for answer in known])
        row.columns["answer_labels"].append([labels[answer] for answer in known])
        row.columns["answer_scores"].append([1.0 if only else soft_score(answers[answer]) for answer in known])
    return list(rows.values())


def _why_unanswered(answers: Counter[str]) -> str:
    """Why a training question is left out. `answers` are normalized."""
    if not answers:
        return "question without an answer"
    return "question without a listed answer" if any(answers) else "question whose answers have no word"


def _empty_row(question: RawQuestion) -> Row:
    lists = ("questions", "question_id", "answers", "answer_labels", "answer_scores")
    columns: dict[str, Any] = {name: [] for name in lists}
    return Row(question.image_id, (question.image,), {**columns, "image_id": question.image_id})


def _check_unique(asked: Sequence[RawQuestion]) -> None:
    questions: set[int] = set()
    images: dict[str, ImageRef] = {}
    for question in asked:
        if not -(2**63) <= question.question_id < 2**63:
            raise UserError(f"{question.where}: question_id {question.question_id} has over 64 bits; fix the file")
        if question.question_id in questions:
            raise UserError(f"{question.where}: question_id {question.question_id} occurs twice; make ids unique")
        questions.add(question.question_id)
        if images.setdefault(question.image_id, question.image) != question.image:
            raise UserError(f"{question.where}: image_id {question.image_id} stands for two images; make ids unique")
