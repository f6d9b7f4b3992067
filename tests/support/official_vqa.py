"""The official VQA evaluation as it works (``VQAEval`` of GT-Vision-Lab/VQA), written anew: the slow reference.

For every question: the ten answers are cleaned in place; where they differ, each of them and the prediction are
normalized mark by mark, with a search for digit-comma-digit at every mark; then every answer is compared with the nine
others. Nothing is kept from question to question.

    python -m tests.support.official_vqa [--questions 214354] [--rounds 3]

times it and ``evaluation.vqa`` in pairs, in one process, on made-up annotations of the size and shape of val2014, from
files to scores; both must give the same numbers.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import vqa
from evaluation.contractions import CONTRACTIONS

MARKS = [*';/[]"{}()=+\\_-><@`,?!']
NUMBERS = "none zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(max(number - 1, 0)) for number, word in enumerate(NUMBERS)}
ARTICLES = ["a", "an", "the"]
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
COMMA = re.compile(r"(\d)(,)(\d)")

Scores = dict[str, Any]


def _clean(text: str) -> str:
    text = text.replace("\n", " ")
    text = text.replace("\t", " ")
    return text.strip()


def _without_marks(text: str) -> str:
    result = text
    for mark in MARKS:
        if (mark + " " in text or " " + mark in text) or re.search(COMMA, text) is not None:
            result = result.replace(mark, "")
        else:
            result = result.replace(mark, " ")
    return PERIOD.sub("", result, int(re.UNICODE))


def _words(text: str, numbers: dict[str, str]) -> str:
    words = []
    for word in text.lower().split():
        word = numbers.setdefault(word, word)
        if word not in ARTICLES:
            words.append(word)
    for place, word in enumerate(words):
        if word in CONTRACTIONS:
            words[place] = CONTRACTIONS[word]
    return " ".join(words)


def evaluate(predictions: list[dict[str, Any]], annotations: list[dict[str, Any]], decimals: int = 6) -> Scores:
    """``overall``, ``per_answer_type``, ``per_question_type``, ``per_question``. Changes the annotations' answers."""
    results = {row["question_id"]: row for row in predictions}
    numbers = dict(DIGITS)
    overall: list[float] = []
    kinds: dict[str, dict[str, list[float]]] = {"answer_type": defaultdict(list), "question_type": defaultdict(list)}
    by_question = {}
    for annotation in annotations:
        answers, given = annotation["answers"], _clean(results[annotation["question_id"]]["answer"])
        for answer in answers:
            answer["answer"] = _clean(answer["answer"])
        if len({answer["answer"] for answer in answers}) > 1:
            for answer in answers:
                answer["answer"] = _words(_without_marks(answer["answer"]), numbers)
            given = _words(_without_marks(given), numbers)
        accuracies = []
        for answer in answers:
            others = [item for item in answers if item != answer]
            matching = [item for item in others if item["answer"] == given]
            accuracies.append(min(1, float(len(matching)) / 3))
        mean = float(sum(accuracies)) / len(accuracies)
        overall.append(mean)
        for key, groups in kinds.items():
            groups[annotation[key]].append(mean)
        by_question[annotation["question_id"]] = round(100 * mean, decimals)

    def percent(values: list[float]) -> float:
        return round(100 * float(sum(values)) / len(values), decimals)

    per_type = {f"per_{key}": {name: percent(group) for name, group in groups.items()} for key, groups in kinds.items()}
    return {"overall": percent(overall), **per_type, "per_question": by_question}


def made_up(questions: int, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(predictions, annotations) in the proportions of VQA v2.

    38 % yes/no, 12 % numbers, the rest among 3,000 answers of Zipf's law; each human gives the main answer with a
    probability of the question, else another one, in 5 % one that nobody else ever gave; a third is unanimous.
    """
    draw = np.random.default_rng(seed)
    syllables = ["ba", "co", "di", "fu", "ga", "he", "li", "mo", "ne", "pu", "ra", "so", "ti", "wa"]
    heads = ["the {}", "{}", "{} {}", "{}-{}", "{}'s", "{}, {}", "{}.", "{} & {}"]
    likely = [0.03, 0.62, 0.25, 0.03, 0.02, 0.02, 0.02, 0.01]
    names = ["".join(syllables[n] for n in row[: 1 + row[0] % 3]) for row in draw.integers(14, size=(6000, 3)).tolist()]
    chosen = zip(draw.choice(8, 3000, p=likely).tolist(), draw.integers(6000, size=(3000, 2)).tolist(), strict=True)
    listed = [heads[head].format(names[first], names[second]) for head, (first, second) in chosen]
    weight = 1 / np.arange(1, 3001)
    pools = {
        "yes/no": (["yes", "no"], np.array([0.52, 0.48])),
        "number": ([str(n) for n in range(1, 30)] + ["two", "none", "1,000"], 1 / np.arange(1, 33) ** 1.5),
        "other": (listed, weight),
    }
    kinds = draw.choice(3, questions, p=[0.38, 0.12, 0.5])
    agreement = np.where(draw.random(questions) < 0.33, 1.0, draw.beta(3, 2, questions))
    openings = [f"what is {name}" for name in names[:65]]
    predictions, annotations = [], []
    for kind in range(3):
        name = list(pools)[kind]
        texts, weights = pools[name]
        rows = np.flatnonzero(kinds == kind)
        drawn = draw.choice(len(texts), (len(rows), 11), p=weights / weights.sum())
        agree, odd = draw.random((len(rows), 11)) < agreement[rows, None], draw.random((len(rows), 11)) < 0.05
        for place, row in enumerate(rows.tolist()):
            said = [texts[drawn[place, 0]] if a else texts[d] for a, d in zip(agree[place], drawn[place], strict=True)]
            if agreement[row] < 1:
                said = [f"{text} {row}" if odd[place, n] and n else text for n, text in enumerate(said)]
            answers = [
                {"answer": text, "answer_confidence": "yes", "answer_id": n + 1} for n, text in enumerate(said[1:])
            ]
            annotations.append(
                {"question_type": openings[row % 65], "multiple_choice_answer": said[0], "answers": answers,
                 "image_id": row // 5, "answer_type": name, "question_id": row}
            )  # fmt: skip
            predictions.append({"answer": texts[drawn[place, -1]] if row % 4 == 0 else said[0], "question_id": row})
    annotations.sort(key=lambda row: row["question_id"])
    return predictions, annotations


def _official_from_files(predictions: str, annotations: str) -> Scores:
    return evaluate(json.loads(Path(predictions).read_text()), json.loads(Path(annotations).read_text())["annotations"])


def _ours_from_files(predictions: str, annotations: str) -> Scores:
    vqa.clean.cache_clear(), vqa.normalize.cache_clear()  # as in a process of its own
    by_question, rows = vqa.per_question_of_files(predictions, annotations)
    return vqa.summary(by_question, rows) | {"per_question": by_question}


def pairs(questions: int, rounds: int, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of each round, official and ours, from files (written below ``folder``) to scores, which must agree."""
    seconds: dict[Callable[[str, str], Scores], list[float]] = {_official_from_files: [], _ours_from_files: []}
    paths = str(folder / "predictions.json"), str(folder / "annotations.json")
    predictions, annotations = made_up(questions)
    Path(paths[0]).write_text(json.dumps(predictions))
    Path(paths[1]).write_text(json.dumps({"annotations": annotations}))
    del predictions, annotations
    for _ in range(rounds):
        found = []
        for score, taken in seconds.items():
            begin = time.perf_counter()
            found.append(score(*paths))
            taken.append(time.perf_counter() - begin)
        assert found[0] == found[1], "the scores differ"
    official, ours = seconds.values()
    return official, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=214_354)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        official, ours = pairs(options.questions, options.rounds, Path(scratch))
    for name, taken in (("official", official), ("evaluation.vqa", ours)):
        print(f"{name:15s} best {min(taken):8.2f} s  median {statistics.median(taken):8.2f} s")
    ratios = sorted(first / second for first, second in zip(official, ours, strict=True))
    print(f"{options.questions} questions, same scores; ratio of the best {min(official) / min(ours):.1f}, of pairs "
          f"{ratios[0]:.1f} to {ratios[-1]:.1f}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
