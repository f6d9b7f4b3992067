"""VQA answers: official normalization, soft scores, and the answer list that labels index."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from preprocessing.errors import UserError
from preprocessing.formats.annotations import read_json
from preprocessing.local_files import json_excerpt
from preprocessing.running.storage import StoragePath
from preprocessing.shards.schema import ANSWER_LIST
from preprocessing.shards.writer import prepared_splits

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")  # sic: the look-behind of the official code has this typo
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIODS_STRIPPED = 32  # sic: the official code passes re.UNICODE (32) as `count`
_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
# A contraction is recognized with any one of its apostrophes missing. The last entry is an error of the official list.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, mark in enumerate(word)
    if mark == "'"
} | {"somebody'd": "somebodyd"}


@lru_cache(maxsize=1 << 18)
def normalize_answer(answer: str) -> str:
    """An answer as the official VQA evaluation compares it (Agrawal et al., github.com/GT-Vision-Lab/VQA).

    The evaluation does not normalize unanimous answers. Here every answer is normalized: labels must not depend on
    the answers of others.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    delete_all = _COMMA_IN_NUMBER.search(text) is not None
    clean = text
    for mark in _PUNCTUATION:
        if mark in clean:
            clean = clean.replace(mark, "" if delete_all or f"{mark} " in text or f" {mark}" in text else " ")
    clean = _PERIOD.sub("", clean, count=_PERIODS_STRIPPED)
    words = (_NUMBERS.get(word, word) for word in clean.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@dataclass(frozen=True)
class Labels:
    """What an answer list says.

    Attributes:
        of: normalized answer -> label.
        respelled: messages on entries that are not normalized; "two" and "t-shirt" are the labels of "2" and "t shirt".
        unreachable: messages on entries that are the label of no answer: their normalized form is another entry's, or
            empty ("", "the").
    """

    of: dict[str, int]
    respelled: list[str]
    unreachable: list[str]


def labels_of(listed: Sequence[str]) -> Labels:
    """The labels of normalized answers by a list, whose entries may be spelled otherwise."""
    labels = {answer: label for label, answer in enumerate(listed) if answer and normalize_answer(answer) == answer}
    respelled, unreachable = [], []
    for label, answer in enumerate(listed):
        normal = normalize_answer(answer)
        if not normal:
            unreachable.append(f"{answer!r} (nothing is left of it)")
        elif labels.setdefault(normal, label) != label:
            unreachable.append(f"{answer!r} ({listed[labels[normal]]!r} stands for it)")
        elif normal != answer:
            respelled.append(f"{answer!r} is taken for {normal!r}")
    return Labels(labels, respelled, unreachable)


def soft_score(count: int) -> float:
    """The training target of an answer that `count` of ten people gave, as in ViLT and EVE: 0.3, 0.6, 0.9, then 1."""
    return min(1.0, 0.3 * count) if count < 4 else 1.0


def build_answer_list(counts: Mapping[str, int], min_answers: int) -> list[str]:
    """The answers given at least `min_answers` times, most frequent first. Raises UserError when there is none."""
    kept = [answer for answer, count in counts.items() if count >= min_answers and answer]
    if not kept:
        raise UserError(f"--min-answers {min_answers}: no answer is given that often; lower it")
    return sorted(kept, key=lambda answer: (-counts[answer], answer))


def read_answer_list(path: StoragePath) -> list[str]:
    """The distinct answers in a JSON list or a JSON object {answer: label}, in the order of their labels.

    So the lists of ALBEF, X-VLM and BLIP (``answer_list.json``) and lxmert's (``trainval_label2ans.json``, whose first
    entry is "", and ``trainval_ans2label.json``) are read. Raises UserError naming the file and the entry at fault.
    """
    answers = read_json(path)
    if isinstance(answers, dict):
        answers = _by_label(answers, path)
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{path}: is neither a JSON list of answers, such as X-VLM's, nor an object {{answer: label}}")
    places: dict[str, int] = {}
    for index, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise UserError(f"{path}: entry {index} is {json_excerpt(answer)}, no text; fix the list")
        if (first := places.setdefault(answer, index)) != index:
            raise UserError(f"{path}: entries {first} and {index} are both {json_excerpt(answer)}; take one out")
    return answers


def _by_label(labels: Mapping[str, Any], path: StoragePath) -> list[str]:
    """The answers of {answer: label} by label, which must be the numbers from 0, each once."""
    answers: dict[int, str] = {}
    for answer, label in labels.items():
        if type(label) is not int or not 0 <= label < len(labels) or label in answers:
            other = f", as that of {json_excerpt(answers[label])}" if type(label) is int and label in answers else ""
            raise UserError(
                f"{path}: the label of {json_excerpt(answer)} is {json_excerpt(label)}{other}; labels must be the "
                f"numbers 0 to {len(labels) - 1}, each once"
            )
        answers[label] = answer
    return [answers[label] for label in range(len(answers))]


def resolve_answer_list(
    out: StoragePath, split: str, given: Sequence[str] | None, counts: Counter[str], min_answers: int, overwrite: bool
) -> list[str]:
    """The answer list for the data set folder `out`. Writes nothing.

    It is `given`, else the list in `out`, else (for the training split only) built from `counts`. Raises UserError when
    there is none, and when other splits in `out` were labeled by another list.
    """
    path = out / ANSWER_LIST
    existing = read_answer_list(path) if path.exists() else None
    others = sorted(set(prepared_splits(out)) - {split})
    if given is not None:
        answers = list(given)
    elif split == "train" and (existing is None or (overwrite and not others)):
        answers = build_answer_list(counts, min_answers)
    elif existing is not None:
        answers = existing
    else:
        raise UserError(f"{path}: no such file; convert the train split into this folder first, or give --answer-list")
    if existing is not None and answers != existing and others:
        raise UserError(
            f"{path}: differs from the answer list given, and {others[0]} is labeled by it; choose another --out"
        )
    return answers
